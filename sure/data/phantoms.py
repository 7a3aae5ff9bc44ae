"""Synthetic short-axis cardiac MRI whose edges are sharp here and blurred there, with the truth beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.special import ndtr

from sure.data.nifti import save_nifti
from sure.errors import UserError
from sure.files import atomic_folder, check_writable, resolved

CLASSES = ("background", "right ventricle", "myocardium", "left ventricle")
SPACING = (1.6, 1.6, 2.2)
"""mm"""

_SIGMAS = (0.0, 0.8, 1.6, 2.6)
"""Blurs between which the image is mixed, in voxels of an image of 64 in-plane voxels."""

Array = NDArray[np.floating]


class _Tissues(NamedTuple):
    """Intensities, blood of the left ventricle being about 1."""

    lung: float
    soft: float
    fat: float
    liver: float
    myocardium: float
    right: float
    left: float


def phantom(shape: Sequence[int], rng: np.random.Generator) -> dict[str, NDArray[Any]]:
    """One heart of random pose, size, shape and contrast.

    Args:
        shape: voxels along two in-plane axes and the long axis of the heart, each at least 16.
        rng: source of all that is random.

    Returns `image` float32 (arbitrary units, >= 0), `label` uint8 (0 background, 1 right ventricle,
    2 myocardium, 3 left ventricle, as ACDC numbers them) and `blur` float32, the standard deviation in voxels
    of the Gaussian that the tissue was smoothed with at each voxel; all of `shape`. Raises UserError.
    """
    size = tuple(int(n) for n in shape)
    if len(size) != 3 or min(size) < 16:
        raise UserError(f"shape: expected three sizes of at least 16 voxels, got {size}")
    x, y, z = _coordinates(size, rng)
    left, epicardium, right = (_signed_distance(f) for f in _heart(x, y, z, rng))
    label = np.zeros(size, np.uint8)
    label[right < 0] = 1
    label[epicardium < 0] = 2
    label[left < 0] = 3

    tissues = _Tissues(*(rng.normal(m, s) for m, s in (
        (0.07, 0.01), (0.36, 0.03), (0.76, 0.05), (0.42, 0.04), (0.24, 0.03), (0.90, 0.05), (1.0, 0.04),
    )))  # fmt: skip
    heart = np.minimum(epicardium, right)
    tissue = _background(x, y, z, heart, tissues, rng)
    # The free wall of the right ventricle, too thin to be labelled.
    tissue += (tissues.myocardium - tissue) * _occupancy(right - 1.0)
    # Tissue varies within an organ too.
    tissue *= 1 + 0.06 * _smooth_noise(size, 2.0, rng)
    for distance, value in ((right, tissues.right), (epicardium, tissues.myocardium), (left, tissues.left)):
        tissue += (value - tissue) * _occupancy(distance)
    tissue += (tissues.myocardium - tissue) * 0.7 * _papillary(x, y, z, left, rng)

    blur = _blur_map(size, rng)
    image = _blurred(tissue, blur) * np.exp(0.14 * _smooth_noise(size, min(size) / 2.5, rng))
    noise = rng.uniform(0.025, 0.045) * rng.standard_normal((2, *size), dtype=np.float32)
    image = np.hypot(image + noise[0], noise[1])  # Rician: the magnitude of a complex signal
    return {"image": image.astype(np.float32), "label": label, "blur": blur}


def write_phantoms(out: Path, *, cases: int = 24, shape: tuple[int, int, int] = (64, 64, 48), seed: int = 0) -> Path:
    """Write `cases` phantoms of `shape` voxels as a Decathlon data set into `out`, and return `out`.

    The same `seed` gives the same files. The folder appears complete or not at all. Raises UserError for bad
    sizes and seeds, and where `out` holds anything already.
    """
    out = resolved(Path(out))
    if cases < 1:
        raise UserError(f"cases: expected at least 1, got {cases}")
    if seed < 0:
        raise UserError(f"seed: expected 0 or more, got {seed}")
    check_writable(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is not an empty folder")
    with atomic_folder(out) as temporary:
        (temporary / "imagesTr").mkdir()
        (temporary / "labelsTr").mkdir()
        names = [f"phantom_{i:03d}.nii.gz" for i in range(cases)]
        for i, name in enumerate(names):
            rng = np.random.default_rng([seed, i])
            drawn = phantom(shape, rng)
            header = _header(shape, rng)
            scanner = rng.uniform(350, 900)
            save_nifti(np.rint(drawn["image"] * scanner), header, temporary / "imagesTr" / name, np.int16)
            save_nifti(drawn["label"], header, temporary / "labelsTr" / name, np.uint8)
        spec = {
            "name": "Cardiac phantoms",
            "description": f"Synthetic short-axis cardiac MRI, seed {seed}",
            "tensorImageSize": "3D",
            "modality": {"0": "MRI"},
            "labels": {str(i): name for i, name in enumerate(CLASSES)},
            "numTraining": cases,
            "numTest": 0,
            "training": [{"image": f"./imagesTr/{n}", "label": f"./labelsTr/{n}"} for n in names],
            "test": [],
        }
        (temporary / "dataset.json").write_text(json.dumps(spec, indent=1) + "\n", encoding="utf-8")
    return out


def _header(shape: Sequence[int], rng: np.random.Generator) -> nib.Nifti1Header:
    """An oblique short-axis plane: rotated, anisotropic, away from the origin."""
    angles = np.deg2rad(np.array((60.0, -51.0, 25.0)) + rng.uniform(-8, 8, 3))
    affine = np.eye(4)
    affine[:3, :3] = nib.eulerangles.euler2mat(*angles) * SPACING
    affine[:3, 3] = rng.uniform(-15, 15, 3) - affine[:3, :3] @ (np.array(shape) / 2)
    header = nib.Nifti1Header()
    header.set_data_shape(tuple(shape))
    header.set_xyzt_units("mm", "sec")
    header.set_qform(affine, code="scanner")
    header.set_sform(affine, code="scanner")
    return header


def _coordinates(size: tuple[int, ...], rng: np.random.Generator) -> tuple[Array, Array, Array]:
    """Position in the heart's frame, about -1 to 1 over the image, bent by a smooth random deformation."""
    axes = [np.linspace(-1, 1, n, dtype=np.float32) for n in size]
    x, y, z = np.meshgrid(*axes, indexing="ij")
    x, y, z = (c + 0.045 * _smooth_noise(size, min(size) / 6, rng) for c in (x, y, z))
    dx, dy, dz = rng.uniform(-0.12, 0.12, 3)
    x, y, z = x - dx, y - dy, z - dz
    # The long axis leans, then the short-axis plane turns.
    tilt, turn = rng.uniform(-0.15, 0.15, 2), rng.uniform(-0.45, 0.45)
    x, y = x + tilt[0] * z, y + tilt[1] * z
    c, s = np.cos(turn), np.sin(turn)
    return c * x + s * y, c * y - s * x, z


def _heart(x: Array, y: Array, z: Array, rng: np.random.Generator) -> tuple[Array, Array, Array]:
    """Functions below 0 inside the left cavity, the epicardium, and the right ventricle."""
    radius, wall = rng.uniform(0.25, 0.34), rng.uniform(0.11, 0.16)
    apex, base = rng.uniform(0.70, 0.80), rng.uniform(0.60, 0.72)
    squeeze = rng.uniform(0.92, 1.08)
    x, y = (x - 0.17) * squeeze, y / squeeze
    across = np.hypot(x, y)
    # Half an ellipsoid towards the apex, nearly a cylinder towards the base, where a plane cuts it.
    profile = np.where(z > 0, z / apex, 0.35 * z / base) ** 2
    cut = -z - base
    left = np.maximum(np.sqrt((across / radius) ** 2 + profile) - 1, cut / radius)
    outside = radius + wall
    deep = np.where(z > 0, z / (apex + 0.8 * wall), 0.35 * z / base) ** 2
    epicardium = np.maximum(np.sqrt((across / outside) ** 2 + deep) - 1, cut / outside)
    # The right ventricle wraps the septum: an ellipsoid, shorter than the left, minus the epicardium.
    width, height = outside * rng.uniform(0.98, 1.15), outside * rng.uniform(1.0, 1.18)
    long = np.where(z > 0, z / (apex * rng.uniform(0.78, 0.92)), 0.35 * z / base) ** 2
    x_right, y_right = x + outside * rng.uniform(0.72, 0.85), y - rng.uniform(-0.06, 0.06)
    right = np.sqrt((x_right / width) ** 2 + (y_right / height) ** 2 + long) - 1
    return left, epicardium, np.maximum.reduce([right, cut / width, -epicardium])


def _background(x: Array, y: Array, z: Array, heart: Array, t: _Tissues, rng: np.random.Generator) -> Array:
    """Lungs; the chest wall with its fat in front (low y), liver and spleen below, spine and aorta behind.

    `heart` is the distance in voxels to the heart as a whole, which lies in its sac of tissue and fat.
    """
    scene = np.full(x.shape, t.lung, np.float32)

    def paint(distance: Array, value: float) -> None:
        scene[:] += (value - scene) * _occupancy(distance)

    # Vessels of the lung: sparse, faint.
    scene += 0.12 * np.clip(_smooth_noise(x.shape, 1.5, rng) - 1.4, 0, 1.5)
    scale = _scale(x.shape)
    paint(heart - scale * (3.2 + 2.4 * _smooth_noise(x.shape, 7.0, rng)), t.fat * 0.8)
    paint(heart - scale * rng.uniform(0.3, 0.8), t.soft)
    bend = rng.uniform(0.2, 0.35) * (x - rng.uniform(-0.2, 0.2)) ** 2
    front = rng.uniform(-0.80, -0.68) + bend
    paint(_signed_distance(y - front), t.soft)
    paint(_signed_distance(y - front + 0.14), t.fat)
    liver = np.hypot(x + rng.uniform(0.75, 0.95), y - rng.uniform(0.8, 0.95)) - rng.uniform(0.5, 0.62) - 0.2 * z
    paint(_signed_distance(liver), t.liver)
    spleen = np.hypot(x - rng.uniform(0.95, 1.1), y - rng.uniform(0.5, 0.7)) - rng.uniform(0.1, 0.25) - 0.2 * z
    paint(_signed_distance(spleen), 0.8 * t.liver)
    spine = np.hypot((x - rng.uniform(0.0, 0.1)) / 1.3, y - 1.12) - rng.uniform(0.2, 0.26)
    paint(_signed_distance(spine), t.soft * 1.15)
    aorta = np.hypot(x - rng.uniform(0.35, 0.5), y - rng.uniform(0.80, 0.86)) - rng.uniform(0.10, 0.13)
    paint(_signed_distance(aorta) - scale, t.myocardium)
    paint(_signed_distance(aorta), t.right)
    return scene


def _papillary(x: Array, y: Array, z: Array, left: Array, rng: np.random.Generator) -> Array:
    """Occupancy of the two papillary muscles: dark columns in the blood, which the truth counts as cavity."""
    inside = _occupancy(left)
    columns = np.zeros(x.shape, np.float32)
    for angle in (rng.uniform(0.5, 1.1), rng.uniform(3.6, 4.2)):
        along = 0.17 * np.array((np.cos(angle), np.sin(angle)))
        f = np.sqrt((x - 0.17 - along[0]) ** 2 + (y - along[1]) ** 2 + ((z - 0.1) / 6) ** 2) - 0.055
        columns = np.maximum(columns, _occupancy(_signed_distance(f)))
    return columns * inside


def _blur_map(size: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Smooth, and about uniform over the range of blurs, so that every boundary is sharp and soft in turn."""
    uniform = ndtr(1.3 * _smooth_noise(size, min(size) / 8, rng))
    return (_scale(size) * (0.25 + (_SIGMAS[-1] - 0.25) * uniform)).astype(np.float32)


def _blurred(image: Array, sigma: Array) -> Array:
    """`image` under a Gaussian whose width differs from voxel to voxel, linear between a few fixed widths."""
    sigmas = _scale(image.shape) * np.array(_SIGMAS)
    stack = np.stack([ndimage.gaussian_filter(image, s, mode="nearest") if s else image for s in sigmas])
    position = np.interp(sigma, sigmas, np.arange(len(sigmas)))
    below = np.minimum(position.astype(int), len(sigmas) - 2)[None]
    low, high = np.take_along_axis(stack, below, 0)[0], np.take_along_axis(stack, below + 1, 0)[0]
    return low + (high - low) * (position - below[0]).astype(np.float32)


def _scale(size: Sequence[int]) -> float:
    """Voxels here for one of an image of 64 in-plane voxels."""
    return min(size[:2]) / 64


def _signed_distance(f: Array) -> Array:
    """Distance in voxels to the zero set of `f`, to first order: good where voxels are partly filled."""
    slope = np.sqrt(sum(g * g for g in np.gradient(f)))
    return f / np.maximum(slope, 1e-6)


def _occupancy(distance: Array) -> Array:
    """Share of a voxel that lies inside, from the signed distance of its centre: the partial volume."""
    return np.clip(0.5 - distance, 0, 1)


def _smooth_noise(size: tuple[int, ...], sigma: float, rng: np.random.Generator) -> Array:
    """A smooth Gaussian field of mean 0 and variance 1, correlated over about `sigma` voxels."""
    step = max(1, int(sigma / 1.5))  # drawn coarse, enlarged by splines: smooth fields need no fine grid
    coarse = tuple(-(-n // step) + 3 for n in size)
    field = ndimage.gaussian_filter(rng.standard_normal(coarse), sigma / step, mode="wrap")
    if step > 1:
        grids = [np.arange(n) / step + 1 for n in size]
        field = ndimage.map_coordinates(field, np.meshgrid(*grids, indexing="ij"), order=3, mode="nearest")
    else:
        field = field[tuple(slice(n) for n in size)]
    return ((field - field.mean()) / field.std()).astype(np.float32)
