"""The slices of a case that a report scrolls through: as `sure evaluate` stores them, and as images of a page."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from PIL import Image

VIEWS = ("sagittal", "coronal", "axial")
MOST_SLICES, MOST_PIXELS = 96, 256
"""What is stored of a case: at most so many slices, and pixels along a side of each."""
ANISOTROPIC = 1.5
"""Slices follow the axis of the thickest voxels where these are so many times as thick as along the axial one."""
REDUCTIONS = ((1, 1), (1, 2), (2, 2), (2, 4), (3, 4), (4, 8))
"""Steps within slices and between them, tried in turn until a case is small enough."""

Voxels = NDArray[np.uint8]


@dataclass(frozen=True)
class Stack:
    """Slices of one case and what a run made of them, each array (slices, height, width), first row at the top."""

    image: Voxels
    truth: Voxels
    prediction: Voxels
    uncertainty: Voxels
    """In steps of 1/255."""
    size: tuple[float, float]
    """Width and height in mm."""
    view: str
    """"axial", "coronal" or "sagittal"; "" of a 2D image."""
    reduced: bool = False
    """Whether voxels or slices are left out."""

    def every(self, within: int, between: int) -> Stack:
        """Every `within`-th row and column of every `between`-th slice, the one with most foreground among them."""
        first = self.fullest % between
        cut = {name: getattr(self, name)[first::between, ::within, ::within] for name in ARRAYS}
        return replace(self, **cut, reduced=self.reduced or (within, between) != (1, 1))

    @property
    def fullest(self) -> int:
        """The slice with most of the true foreground, the middle one where there is none."""
        areas = (self.truth > 0).sum((1, 2))
        return int(areas.argmax()) if areas.any() else len(areas) // 2


ARRAYS = ("image", "truth", "prediction", "uncertainty")


def oriented(arrays: Sequence[NDArray], affine: NDArray[np.float64]) -> tuple[list[NDArray], NDArray[np.float64]]:
    """Volumes (3 axes) turned to right, anterior, superior as far as axes can be, and the spacing in mm."""
    orientation = nib.orientations.io_orientation(affine)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)[np.argsort(orientation[:, 0])]
    return [nib.orientations.apply_orientation(a, orientation) for a in arrays], spacing


def stack(
    image: NDArray, truth: NDArray, prediction: NDArray, uncertainty: NDArray, affine: NDArray[np.float64]
) -> Stack:
    """All slices of a volume, axial or across its thickest voxels; of a 2D image, the image. Arrays are (*spatial)."""
    low, high = np.percentile(image, (0.5, 99.5))
    shown = np.clip((image - low) / max(float(high - low), 1e-12), 0, 1)
    arrays = [np.rint(255 * shown), truth, prediction, np.rint(255 * np.clip(uncertainty, 0, 1))]
    arrays = [np.asarray(a).astype(np.uint8) for a in arrays]
    if image.ndim == 2:
        spacing, view = np.linalg.norm(affine[:3, :3], axis=0)[:2], ""
        cuts = [a.T[None] for a in arrays]
    else:
        arrays, spacing = oriented(arrays, affine)
        axis = int(spacing.argmax()) if spacing.max() > ANISOTROPIC * spacing[2] else 2
        view, spacing = VIEWS[axis], np.delete(spacing, axis)
        cuts = [np.moveaxis(a, axis, 0).transpose(0, 2, 1) for a in arrays]
    slices, height, width = cuts[0].shape
    shown, true, predicted, uncertain = (np.ascontiguousarray(cut[:, ::-1]) for cut in cuts)
    size = float(width * spacing[0]), float(height * spacing[1])
    whole = Stack(shown, true, predicted, uncertain, size, view)
    return whole.every(math.ceil(max(height, width) / MOST_PIXELS), math.ceil(slices / MOST_SLICES))


def arrays_of(cut: Stack) -> dict[str, NDArray]:
    """For a file of arrays; `stack_of` undoes it."""
    arrays = {f"slices_{name}": getattr(cut, name) for name in ARRAYS}
    rest = {name: np.array(getattr(cut, name)) for name in ("size", "view", "reduced")}
    return arrays | {f"slices_{name}": value for name, value in rest.items()}


def stack_of(stored: Any) -> Stack | None:
    """From an open file of arrays; None where it holds no slices."""
    if "slices_size" not in stored:
        return None
    width, height = stored["slices_size"]
    size, view = (float(width), float(height)), str(stored["slices_view"])
    image, truth, prediction, uncertainty = (stored[f"slices_{name}"] for name in ARRAYS)
    reduced = "slices_reduced" in stored and bool(stored["slices_reduced"])  # older files do not tell
    return Stack(image, truth, prediction, uncertainty, size, view, reduced)


def viewer(stacks: dict[str, Stack], limit: int) -> dict[str, Any] | None:
    """What the page's script draws a case from, in at most `limit` characters; None where that is not enough.

    Args:
        stacks: by run name, all of the same case.
    """
    for within, between in REDUCTIONS:
        cuts = {name: whole.every(within, between) for name, whole in stacks.items()}
        first = next(iter(cuts.values()))
        slices, height, width = first.image.shape
        columns = max(1, round(math.sqrt(slices * height / width)))
        found: dict[str, Any] = {
            "slices": slices,
            "height": height,
            "width": width,
            "columns": columns,
            "start": first.fullest,
            "size": first.size,
            "image": _sprite(first.image, columns),
            "truth": _sprite(first.truth, columns),
            "runs": [
                {
                    "name": name,
                    "prediction": _sprite(cut.prediction, columns),
                    "uncertainty": _sprite(cut.uncertainty, columns),
                }
                for name, cut in cuts.items()
            ],
        }
        images = [found["image"], found["truth"]] + [run[key] for run in found["runs"] for key in run if key != "name"]
        if sum(map(len, images)) <= limit:
            return found | {"view": first.view, "reduced": any(cut.reduced for cut in cuts.values())}
    return None


def _sprite(voxels: Voxels, columns: int) -> str:
    """All slices in one grey PNG, row by row, as a data URI."""
    slices, height, width = voxels.shape
    rows = math.ceil(slices / columns)
    padded = np.zeros((rows * columns, height, width), np.uint8)
    padded[:slices] = voxels
    sheet = padded.reshape(rows, columns, height, width).transpose(0, 2, 1, 3).reshape(rows * height, columns * width)
    buffer = io.BytesIO()
    Image.fromarray(sheet).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
