"""3-tap gradient filters on the device: the pieces of a kernel that marches along z.

The filters are separable, so a plane is reduced first: for each of its voxels the derivative along w and along h,
each smoothed across the other axis, and the value smoothed across both (`plane_parts`, 9 loads, 5 for the central
difference). Three successive planes then give the gradient of the middle one, so that a program which keeps what it
needs of two planes in registers loads every plane once:

    planes = first_planes(p_image, z0, ...)
    for z in range(z0, z1):
        gradient, planes = march(planes, plane_parts(p_image, z + 1, ...), z, ...)

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
    """Row and column (int32) of the BLOCK voxels of a plane that follow the flat index `start` (int64 or int32).

    A wide division is done once a program; the one a voxel needs stays narrow.
    """
    o_flat = (start % W).to(tl.int32) + tl.arange(0, BLOCK)  # [BLOCK]
    return (start // W).to(tl.int32) + o_flat // W, o_flat % W


@triton.jit
def neighbour(i, N, PADDING: tl.constexpr):
    """The index that stands for i in [-1, N] on an axis of length N."""
    if PADDING == "reflect" or PADDING == "extrapolate":
        i = tl.minimum(tl.abs(i), (N - 1) + (N - 1 - tl.abs(i)))
    return tl.minimum(tl.maximum(i, 0), N - 1)


@triton.jit
def plane_step(z, D, s_d, PADDING: tl.constexpr):
    """How far it is from plane z in [0, D) to the one that stands for z + 1 in [1, D]."""
    back = 0
    if PADDING == "reflect" or PADDING == "extrapolate":
        back = tl.where(D > 1, -s_d, 0)
    return tl.where(z + 1 < D, s_d, back)


@triton.jit
def _read(p, m, PADDING: tl.constexpr):
    """Voxels as float32; `m` says where there are any, and only `zeros` need it."""
    if PADDING == "zeros":
        return tl.load(p, mask=m, other=0.0).to(tl.float32)
    else:
        return tl.load(p).to(tl.float32)


@triton.jit
def _row_parts(p_row, ahead, o_left, o_here, o_right, m, m_left, m_right, CENTRE: tl.constexpr, PADDING: tl.constexpr):
    """Difference along w and smoothed value of one row, columns extended by PADDING: two [BLOCK]."""
    b_left = _read(p_row + o_left + ahead, m & m_left, PADDING)
    b_here = _read(p_row + o_here + ahead, m, PADDING)
    b_right = _read(p_row + o_right + ahead, m & m_right, PADDING)
    if PADDING == "extrapolate":
        b_left = tl.where(m_left, b_left, 2.0 * b_here - b_left)
        b_right = tl.where(m_right, b_right, 2.0 * b_here - b_right)
    b_smooth = b_here
    if CENTRE > 0:
        b_smooth = b_left + b_right + CENTRE * b_here
    return b_right - b_left, b_smooth


@triton.jit
def plane_parts(p_image, z, o_h, o_w, D, H, W, s_d, s_h, s_w, CENTRE: tl.constexpr, PADDING: tl.constexpr):
    """Parts of plane z in [-1, D] at rows `o_h` and columns `o_w`: d/dw, d/dh and the smoothed value, [BLOCK] each.

    `p_image` points to the first voxel of one channel of one image.
    """
    p_plane = p_image + neighbour(z, D, PADDING) * tl.cast(s_d, tl.int64)
    return _parts(p_plane, 0, (z >= 0) & (z < D), o_h, o_w, H, W, s_h, s_w, CENTRE, PADDING)


@triton.jit
def parts_ahead(p_plane, ahead, o_plane, m, o_h, o_w, H, W, s_h, s_w, CENTRE: tl.constexpr, PADDING: tl.constexpr):
    """`plane_parts` of the plane `ahead` elements after that at `p_plane`; `m` says whether it is one of the volume.

    `o_plane` [BLOCK] differs from lane to lane, as flat indices of the voxels do; it and `ahead` have 32 bits, and so
    has their sum. An index of its own is what a lane scales and adds to the pointer of a tap in one instruction; a
    number that all lanes share takes them two.
    """
    return _parts(p_plane - o_plane, ahead + o_plane, m, o_h, o_w, H, W, s_h, s_w, CENTRE, PADDING)


@triton.jit
def _parts(p_plane, ahead, m, o_h, o_w, H, W, s_h, s_w, CENTRE: tl.constexpr, PADDING: tl.constexpr):
    """`plane_parts` of the plane `ahead` elements after `p_plane`; `m` says whether it is one of the volume.

    Rows from H on are those of row H - 1: reading some voxel costs less than a mask.
    """
    s_h, s_w = tl.cast(s_h, tl.int64), tl.cast(s_w, tl.int64)
    o_h = tl.minimum(o_h, H - 1)
    o_left, o_here, o_right = neighbour(o_w - 1, W, PADDING) * s_w, o_w * s_w, neighbour(o_w + 1, W, PADDING) * s_w
    p_here = p_plane + o_h * s_h
    p_above = p_plane + neighbour(o_h - 1, H, PADDING) * s_h
    p_below = p_plane + neighbour(o_h + 1, H, PADDING) * s_h
    m_left, m_right, m_above, m_below = o_w > 0, o_w < W - 1, o_h > 0, o_h < H - 1
    b_dw, b_here = _row_parts(p_here, ahead, o_left, o_here, o_right, m, m_left, m_right, CENTRE, PADDING)
    m_row_above, m_row_below = m & m_above, m & m_below
    if CENTRE > 0:
        b_dw_above, b_above = _row_parts(
            p_above, ahead, o_left, o_here, o_right, m_row_above, m_left, m_right, CENTRE, PADDING
        )
        b_dw_below, b_below = _row_parts(
            p_below, ahead, o_left, o_here, o_right, m_row_below, m_left, m_right, CENTRE, PADDING
        )
        if PADDING == "extrapolate":
            b_dw_above = tl.where(m_above, b_dw_above, 2.0 * b_dw - b_dw_above)
            b_dw_below = tl.where(m_below, b_dw_below, 2.0 * b_dw - b_dw_below)
        b_dw = b_dw_above + b_dw_below + CENTRE * b_dw
    else:
        b_above = _read(p_above + o_here + ahead, m_row_above, PADDING)
        b_below = _read(p_below + o_here + ahead, m_row_below, PADDING)
    if PADDING == "extrapolate":
        b_above = tl.where(m_above, b_above, 2.0 * b_here - b_above)
        b_below = tl.where(m_below, b_below, 2.0 * b_here - b_below)
    b_dh = b_below - b_above
    b_smooth = b_here
    if CENTRE > 0:
        b_smooth = b_above + b_below + CENTRE * b_here
    return b_dw, b_dh, b_smooth


@triton.jit
def _beyond(at_edge, parts_here, parts_beyond, PADDING: tl.constexpr):
    """The parts of a plane that may lie beyond the first or the last one."""
    if PADDING == "extrapolate":
        dw, dh, smooth = parts_beyond
        parts_beyond = (
            tl.where(at_edge, 2.0 * parts_here[0] - dw, dw),
            tl.where(at_edge, 2.0 * parts_here[1] - dh, dh),
            tl.where(at_edge, 2.0 * parts_here[2] - smooth, smooth),
        )
    return parts_beyond


@triton.jit
def _smoothing(before, here, CENTRE: tl.constexpr):
    """What two planes add to the smoothing along z of the second."""
    result = here
    if CENTRE > 0:
        result = before + CENTRE * here
    return result


@triton.jit
def start_march(before, here, z, CENTRE: tl.constexpr, PADDING: tl.constexpr):
    """What `march` keeps of planes z - 1 and z, from their parts: its sums of d/dw and d/dh, and what is to come."""
    before = _beyond(z == 0, here, before, PADDING)
    return _smoothing(before[0], here[0], CENTRE), _smoothing(before[1], here[1], CENTRE), before[2], here


@triton.jit
def first_planes(p_image, z, o_h, o_w, D, H, W, s_d, s_h, s_w, CENTRE: tl.constexpr, PADDING: tl.constexpr):
    """What `march` needs to begin at plane z, read from the image: see `plane_parts`."""
    before = plane_parts(p_image, z - 1, o_h, o_w, D, H, W, s_d, s_h, s_w, CENTRE, PADDING)
    here = plane_parts(p_image, z, o_h, o_w, D, H, W, s_d, s_h, s_w, CENTRE, PADDING)
    return start_march(before, here, z, CENTRE, PADDING)


@triton.jit
def march(planes, after, z, D, scale_d, scale_h, scale_w, CENTRE: tl.constexpr, PADDING: tl.constexpr):
    """(d/dd, d/dh, d/dw) of plane z, [BLOCK] each, from `after`, the parts of plane z + 1; and `planes` for that."""
    dw_sum, dh_sum, smooth_before, here = planes
    after = _beyond(z == D - 1, here, after, PADDING)
    dw, dh = dw_sum, dh_sum
    if CENTRE > 0:
        dw, dh = dw_sum + after[0], dh_sum + after[1]
    dw_sum, dh_sum = _smoothing(here[0], after[0], CENTRE), _smoothing(here[1], after[1], CENTRE)
    gradient = ((after[2] - smooth_before) * scale_d, dh * scale_h, dw * scale_w)
    return gradient, (dw_sum, dh_sum, here[2], after)


@triton.jit
def voxel_gradient(
    p_image, z, o_h, o_w, D, H, W, s_d, s_h, s_w, scale_d, scale_h, scale_w,
    DIMS: tl.constexpr, CENTRE: tl.constexpr, PADDING: tl.constexpr,
):  # fmt: skip
    """(d/dd, d/dh, d/dw) of plane z without marching: 27 loads in 3D, 9 in 2D (where d/dd is 0)."""
    dw, dh, smooth = plane_parts(p_image, z, o_h, o_w, D, H, W, s_d, s_h, s_w, CENTRE, PADDING)
    if DIMS == 2:
        return tl.zeros_like(smooth), dh * scale_h, dw * scale_w
    else:
        before = plane_parts(p_image, z - 1, o_h, o_w, D, H, W, s_d, s_h, s_w, CENTRE, PADDING)
        after = plane_parts(p_image, z + 1, o_h, o_w, D, H, W, s_d, s_h, s_w, CENTRE, PADDING)
        planes = start_march(before, (dw, dh, smooth), z, CENTRE, PADDING)
        result, _ = march(planes, after, z, D, scale_d, scale_h, scale_w, CENTRE, PADDING)
        return result


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
