"""A small data set and an untrained network, for the tests of prediction, evaluation and report."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from monai.networks.nets import UNet

from sure.checkpoint import Run
from sure.config import TrainConfig

SHAPE = (22, 20, 13)
CLASSES = ("background", "shell", "core")
AFFINE = np.array([[0.0, -1.5, 0.1, 7], [1.2, 0, 0, -3], [0, 0.1, 2.5, 11], [0, 0, 0, 1]])


def make_run(path: Path, *, loss: str = "edl", dims: int = 3, channels: int = 1, seed: int = 0, **config) -> Run:
    """An untrained run that was told to hold `case_0` and `case_2` out."""
    torch.manual_seed(seed)
    settings = TrainConfig(loss=loss, spatial_dims=dims, patch_size=(16,) * dims, **config)
    model = UNet(dims, channels, len(CLASSES), (4, 8), (2,), norm="instance").eval()
    held_out = ("case_0", "case_2")
    return Run(path, settings, model, len(CLASSES), channels, CLASSES, held_out, 7, "final")


def write_case(root: Path, name: str, seed: int, *, shape: tuple[int, ...] = SHAPE) -> tuple[Path, Path]:
    """Image and label of a noisy ball in a shell, with unlike qform and sform codes."""
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    radius = np.sqrt(sum((a - rng.uniform(-0.2, 0.2)) ** 2 for a in axes))
    label = (radius < 0.7).astype(np.uint8) + (radius < 0.4)
    image = (100 * label + rng.normal(0, 15, shape)).astype(np.int16)
    paths = root / "images" / f"{name}.nii.gz", root / "labels" / f"{name}.nii.gz"
    for path, array in zip(paths, (image, label.astype(np.uint8)), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        stored = nib.Nifti1Image(array, AFFINE)
        stored.set_sform(AFFINE, code=4)
        stored.set_qform(AFFINE, code=1, strip_shears=True)
        stored.header.set_xyzt_units("mm", "sec")
        nib.save(stored, path)
    return paths


def write_data(root: Path, count: int = 4) -> Path:
    """`count` cases called case_0, case_1, ... in two folders."""
    for i in range(count):
        write_case(root, f"case_{i}", i)
    return root
