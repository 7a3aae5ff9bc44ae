"""3-tap gradient filters on the device: the pieces of a kernel that marches along z.

The filters are separable, so a plane is reduced first: for each of its voxels the derivative along w and along h,
each smoothed across the other axis, and the value smoothed across both (`plane_parts`, 9 loads, 5 for the central
difference). Three successive planes then give the gradient of the middle one (`gradient`), so that a program which
keeps the parts of two planes in registers loads every plane once:

    before = plane_parts(p_image, z0 - 1, ...)
    here = plane_parts(p_image, z0, ...)
    for z in range(z0, z1):
        after = plane_parts(p_image, z + 1, ...)
        gradient(before, here, after, z, ...)

Side taps are 1 and centre taps CENTRE here; the normalisation is in the scales that `axis_scales` of `launch.py`
gives. CENTRE is the centre tap over the side tap: 2 for Sobel, 10/3 for Scharr, and 0 says that nothing is smoothed.
PADDING is one of `taps.PADDING_MODES`. It acts on each axis by itself: an index just outside is read from
`neighbour`, then left (replicate, reflect), masked off (zeros) or mirrored in the edge value (extrapolate,
2 a - b). On an axis of length 1 `neighbour` is the voxel itself, and so is its mirror image.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def march_program(D, H, W, STEPS, BLOCK: tl.constexpr):
    """(image, first plane, flat index of the first voxel in its plane) of this program, int64: see `march_grid`."""
    i_program = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(tl.cast(H, tl.int64) * W, BLOCK)
    chunks = tl.cdiv(D, STEPS)
    i_tile = i_program % tiles
    i_chunk = (i_program // tiles) % chunks
    return i_program // (tiles * chunks), i_chunk * STEPS, i_tile * BLOCK


@triton.jit
def plane_position(start, W, BLOCK: tl.constexpr):
    """Row and column (int32) of the BLOCK voxels of a plane that follow the flat index `start` (int64).

    The wide division is done once a program; the one a voxel needs stays narrow.
    """
    row = start // W
    o_flat = (start - row * W).to(tl.int32) + tl.arange(0, BLOCK)  # [BLOCK]
    return row.to(tl.int32) + o_flat // W, o_flat % W


@triton.jit
def neighbour(i, N, PADDING: tl.constexpr):
    """The index that stands for i in [-1, N] on an axis of length N."""
    if PADDING == "reflect" or PADDING == "extrapolate":
        i = tl.minimum(tl.abs(i), (N - 1) + (N - 1 - tl.abs(i)))
    return tl.minimum(tl.maximum(i, 0), N - 1)


@triton.jit
def _row_parts(p_row, o_left, o_here, o_right, m, m_first, m_last, CENTRE: tl.constexpr, PADDING: tl.constexpr):
    """Difference along w and smoothed value of one row, columns extended by PADDING: two [BLOCK]."""
    m_left, m_right = m, m
    if PADDING == "zeros":
        m_left, m_right = m & (m_first == 0), m & (m_last == 0)
    b_left = tl.load(p_row + o_left, mask=m_left, other=0.0).to(tl.float32)
    b_here = tl.load(p_row + o_here, mask=m, other=0.0).to(tl.float32)
    b_right = tl.load(p_row + o_right, mask=m_right, other=0.0).to(tl.float32)
    if PADDING == "extrapolate":
        b_left = tl.where(m_first, 2.0 * b_here - b_left, b_left)
        b_right = tl.where(m_last, 2.0 * b_here - b_right, b_right)
    b_smooth = b_here
    if CENTRE > 0:
        b_smooth = b_left + b_right + CENTRE * b_here
    return b_right - b_left, b_smooth


@triton.jit
def plane_parts(p_image, z, o_h, o_w, m, D, H, W, s_d, s_h, s_w, CENTRE: tl.constexpr, PADDING: tl.constexpr):
    """Parts of plane z in [-1, D] at rows `o_h` and columns `o_w`: d/dw, d/dh and the smoothed value, [BLOCK] each.

    `p_image` points to the first voxel of one channel of one image; voxels where `m` is false are 0.
    """
    s_d, s_h, s_w = tl.cast(s_d, tl.int64), tl.cast(s_h, tl.int64), tl.cast(s_w, tl.int64)
    p_plane = p_image + neighbour(z, D, PADDING) * s_d
    o_left, o_here, o_right = neighbour(o_w - 1, W, PADDING) * s_w, o_w * s_w, neighbour(o_w + 1, W, PADDING) * s_w
    p_above = p_plane + neighbour(o_h - 1, H, PADDING) * s_h
    p_here = p_plane + o_h * s_h
    p_below = p_plane + neighbour(o_h + 1, H, PADDING) * s_h
    m_left, m_right, m_top, m_bottom = o_w == 0, o_w == W - 1, o_h == 0, o_h == H - 1
    m_above, m_below = m, m
    if PADDING == "zeros":
        m = m & (z >= 0) & (z < D)
        m_above, m_below = m & (o_h > 0), m & (o_h < H - 1)
    b_dw, b_here = _row_parts(p_here, o_left, o_here, o_right, m, m_left, m_right, CENTRE, PADDING)
    if CENTRE > 0:
        b_dw_above, b_above = _row_parts(p_above, o_left, o_here, o_right, m_above, m_left, m_right, CENTRE, PADDING)
        b_dw_below, b_below = _row_parts(p_below, o_left, o_here, o_right, m_below, m_left, m_right, CENTRE, PADDING)
        if PADDING == "extrapolate":
            b_dw_above = tl.where(m_top, 2.0 * b_dw - b_dw_above, b_dw_above)
            b_dw_below = tl.where(m_bottom, 2.0 * b_dw - b_dw_below, b_dw_below)
        b_dw = b_dw_above + b_dw_below + CENTRE * b_dw
    else:
        b_above = tl.load(p_above + o_here, mask=m_above, other=0.0).to(tl.float32)
        b_below = tl.load(p_below + o_here, mask=m_below, other=0.0).to(tl.float32)
    if PADDING == "extrapolate":
        b_above = tl.where(m_top, 2.0 * b_here - b_above, b_above)
        b_below = tl.where(m_bottom, 2.0 * b_here - b_below, b_below)
    b_dh = b_below - b_above
    b_smooth = b_here
    if CENTRE > 0:
        b_smooth = b_above + b_below + CENTRE * b_here
    return b_dw, b_dh, b_smooth


@triton.jit
def _across_planes(b_before, b_here, b_after, CENTRE: tl.constexpr):
    """Smoothing along z."""
    result = b_here
    if CENTRE > 0:
        result = b_before + b_after + CENTRE * b_here
    return result


@triton.jit
def _mirrored(at_edge, b_here, b_beyond, PADDING: tl.constexpr):
    """What a plane beyond the last one is worth."""
    if PADDING == "extrapolate":
        b_beyond = tl.where(at_edge, 2.0 * b_here - b_beyond, b_beyond)
    return b_beyond


@triton.jit
def gradient(
    dw_before, dh_before, smooth_before, dw, dh, smooth, dw_after, dh_after, smooth_after,
    z, D, scale_d, scale_h, scale_w, CENTRE: tl.constexpr, PADDING: tl.constexpr,
):  # fmt: skip
    """(d/dd, d/dh, d/dw) of plane z from the parts of planes z - 1, z and z + 1, [BLOCK] each."""
    first, last = z == 0, z == D - 1
    smooth_before = _mirrored(first, smooth, smooth_before, PADDING)
    smooth_after = _mirrored(last, smooth, smooth_after, PADDING)
    if CENTRE > 0:
        dw_before = _mirrored(first, dw, dw_before, PADDING)
        dh_before = _mirrored(first, dh, dh_before, PADDING)
        dw_after = _mirrored(last, dw, dw_after, PADDING)
        dh_after = _mirrored(last, dh, dh_after, PADDING)
    return (
        (smooth_after - smooth_before) * scale_d,
        _across_planes(dh_before, dh, dh_after, CENTRE) * scale_h,
        _across_planes(dw_before, dw, dw_after, CENTRE) * scale_w,
    )


@triton.jit
def voxel_gradient(
    p_image, z, o_h, o_w, m, D, H, W, s_d, s_h, s_w, scale_d, scale_h, scale_w,
    DIMS: tl.constexpr, CENTRE: tl.constexpr, PADDING: tl.constexpr,
):  # fmt: skip
    """(d/dd, d/dh, d/dw) of plane z without marching: 27 loads in 3D, 9 in 2D (where d/dd is 0)."""
    dw, dh, smooth = plane_parts(p_image, z, o_h, o_w, m, D, H, W, s_d, s_h, s_w, CENTRE, PADDING)
    if DIMS == 2:
        return tl.zeros_like(smooth), dh * scale_h, dw * scale_w
    else:
        dw0, dh0, smooth0 = plane_parts(p_image, z - 1, o_h, o_w, m, D, H, W, s_d, s_h, s_w, CENTRE, PADDING)
        dw2, dh2, smooth2 = plane_parts(p_image, z + 1, o_h, o_w, m, D, H, W, s_d, s_h, s_w, CENTRE, PADDING)
        return gradient(
            dw0, dh0, smooth0, dw, dh, smooth, dw2, dh2, smooth2,
            z, D, scale_d, scale_h, scale_w, CENTRE, PADDING,
        )  # fmt: skip


@triton.jit
def adjoint_weights(i, N, LEFT: tl.constexpr, CENTRE: tl.constexpr, RIGHT: tl.constexpr, PADDING: tl.constexpr):
    """Weights of y[i - 1], y[i], y[i + 1] in the transpose of out[i] = LEFT x[i-1] + CENTRE x[i] + RIGHT x[i+1].

    x is extended by PADDING; what out[0] and out[N - 1] took from beyond the ends is given back to the voxels that
    the extension was made from. Weights of y outside [0, N) are 0.
    """
    before = tl.where(i > 0, RIGHT, 0.0)
    after = tl.where(i < N - 1, LEFT, 0.0)
    here = tl.where(i >= 0, CENTRE, 0.0)
    if PADDING == "replicate":
        here += tl.where(i == 0, LEFT, 0.0) + tl.where(i == N - 1, RIGHT, 0.0)
    if PADDING == "reflect" or PADDING == "extrapolate":
        # An axis of length 1 is replicated.
        here += tl.where(N == 1, LEFT + RIGHT, 0.0)
        if PADDING == "reflect":
            before += tl.where(i == 1, LEFT, 0.0)
            after += tl.where(i == N - 2, RIGHT, 0.0)
        else:
            here += tl.where((i == 0) & (N > 1), 2.0 * LEFT, 0.0)
            here += tl.where((i == N - 1) & (N > 1), 2.0 * RIGHT, 0.0)
            before -= tl.where(i == 1, LEFT, 0.0)
            after -= tl.where(i == N - 2, RIGHT, 0.0)
    return before, here, after
