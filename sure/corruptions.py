"""Images made worse on purpose, from slightly to strongly: noise, blur and the artefacts of MRI.

Each corruption is a function of the image, its severity and a seed alone. The seed fixes what is random (the noise
field, the place of a spike, the shape of a bias field), the severity scales it: levels of a sweep differ in nothing
else, as in the published evaluation, whose noise levels share their seed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import monai.transforms as mt
import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

import sure_kernels as sk
from sure.data import normalise

NOISE_STD = 0.3
"""Standard deviation of the noise whose mean grows, as published."""
BIAS_DEGREE = 3

Apply = Callable[[Tensor, float, int], Tensor]
"""Image (M, *spatial) with standard deviation 1, severity, seed; gives a new image."""


@dataclass(frozen=True)
class Corruption:
    """A row of the table of corruptions."""

    title: str
    parameter: str
    unit: str
    levels: tuple[float, ...]
    """From mild to strong."""
    clean: float
    """The severity of an image that is left alone."""
    apply: Apply
    limit: float = 1e6
    """Severities lie below it."""
    as_acquired: bool = True
    """Applied to intensities from 0 on, as a scanner gives them, and normalised again as every image is; noise is
    instead added to the normalised image, as published."""

    def __call__(self, image: Tensor, level: float, seed: int) -> Tensor:
        """`image` (M, *spatial), float32 and normalised, made worse, as a new tensor."""
        if not self.as_acquired:
            return self.apply(image, level, seed)
        lowest = image.flatten(1).amin(1).view(-1, *[1] * (image.ndim - 1))
        worse = self.apply(image - lowest, level, seed)
        return torch.from_numpy(normalise(worse.numpy()))


def seed_of(seed: int, case: str, corruption: str) -> int:
    """The seed of a corruption of a case: the same wherever it is asked for, another for every case."""
    digest = hashlib.sha256(f"{seed}\0{case}\0{corruption}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


def _gaussian(image: Tensor, mean: float, std: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return sk.add_gaussian_noise(image[None], mean=mean, std=std, generator=generator)[0]


def _rician(image: Tensor, level: float, seed: int) -> Tensor:
    noise = mt.RandRicianNoise(prob=1.0, std=level, sample_std=False)
    noise.set_random_state(seed)
    return _tensor(noise(image))


def _blur(image: Tensor, level: float, seed: int) -> Tensor:
    # Not MONAI's GaussianSmooth: it takes what lies outside for 0 and so darkens the image towards its border
    axes = tuple(range(1, image.ndim))
    return torch.from_numpy(ndimage.gaussian_filter(image.numpy(), level, mode="nearest", axes=axes))


def _low_resolution(image: Tensor, level: float, seed: int) -> Tensor:
    modes = {1: ("area", "linear"), 2: ("area", "bilinear"), 3: ("area", "trilinear")}
    down, up = modes[image.ndim - 1]
    coarse = mt.RandSimulateLowResolution(1.0, down, up, zoom_range=(1 / level, 1 / level))
    return _tensor(coarse(image))


def _bias_field(image: Tensor, level: float, seed: int) -> Tensor:
    field = mt.RandBiasField(BIAS_DEGREE, coeff_range=(-level, level), prob=1.0)
    field.set_random_state(seed)
    return _tensor(field(image))


def _contrast(image: Tensor, level: float, seed: int) -> Tensor:
    adjust = mt.AdjustContrast(level)
    return torch.stack([_tensor(adjust(channel)) for channel in image])


def _ghosts(image: Tensor, level: float, seed: int) -> Tensor:
    """Two ghosts a quarter of the field of view away along one axis, each `level` / 2 as bright as the image.

    The lines of k-space along that axis are weighted by 1 + level cos(2 pi k shift / n), as by a movement that
    repeats itself while they are acquired; here in closed form, as the circular shifts that this is.
    """
    axis = 1 + int(np.random.default_rng(seed).integers(image.ndim - 1))
    shift = max(1, round(image.shape[axis] / 4))
    return image + level / 2 * (image.roll(shift, axis) + image.roll(-shift, axis))


def _spikes(image: Tensor, level: float, seed: int) -> Tensor:
    """One coefficient of k-space as large as that of a wave whose amplitude is `level` standard deviations."""
    rng = np.random.default_rng(seed)
    # from an eighth to three eighths of the band on every axis: neither the mean nor a shade over the whole image
    offset = [round(n * rng.uniform(1 / 8, 3 / 8)) * rng.choice((-1, 1)) for n in image.shape[1:]]
    place = tuple(int((n // 2 + o) % n) for n, o in zip(image.shape[1:], offset, strict=True))  # k-space is periodic
    intensity = float(np.log(level * image[0].numel()))
    return _tensor(mt.KSpaceSpikeNoise(place, intensity)(image))


def _gibbs(image: Tensor, level: float, seed: int) -> Tensor:
    return _tensor(mt.GibbsNoise(level)(image))


def _tensor(image: Any) -> Tensor:
    """Without MONAI's metadata."""
    return (image.as_tensor() if hasattr(image, "as_tensor") else image).float()


SD = "standard deviations of the image"
CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_mean": Corruption(
        "Gaussian noise of growing mean", "mean", SD, (0.1, 0.3, 0.5, 0.7, 0.9), 0.0,
        lambda image, level, seed: _gaussian(image, level, NOISE_STD, seed), as_acquired=False,
    ),
    "gaussian_std": Corruption(
        "Gaussian noise of growing spread", "standard deviation", SD, (0.1, 0.2, 0.4, 0.6, 1.0), 0.0,
        lambda image, level, seed: _gaussian(image, 0.0, level, seed), as_acquired=False,
    ),
    "rician": Corruption(
        "Rician noise", "standard deviation", SD, (0.1, 0.2, 0.4, 0.6, 1.0), 0.0, _rician,
    ),
    "blur": Corruption(
        "Gaussian blur", "standard deviation", "voxels", (0.5, 0.75, 1.0, 1.5, 2.0), 0.0, _blur, limit=1e3,
    ),
    "low_resolution": Corruption(
        "Low resolution", "voxel size", "voxels of the image", (1.5, 2.0, 2.5, 3.0, 4.0), 1.0, _low_resolution,
    ),
    "bias_field": Corruption(
        "Bias field", "largest coefficient", "of the field's logarithm", (0.05, 0.1, 0.2, 0.3, 0.5), 0.0, _bias_field,
    ),
    "contrast": Corruption("Contrast", "gamma", "exponent", (1.25, 1.5, 2.0, 3.0, 4.0), 1.0, _contrast),
    "ghosts": Corruption(
        "Motion ghosts", "brightness", "share of the image, both ghosts together", (0.1, 0.2, 0.4, 0.6, 0.8), 0.0,
        _ghosts,
    ),
    "spikes": Corruption("Spike in k-space", "amplitude", SD, (0.25, 0.5, 1.0, 1.5, 2.0), 0.0, _spikes),
    "gibbs": Corruption(
        "Gibbs ringing", "share cut off", "radius of k-space", (0.4, 0.5, 0.6, 0.7, 0.8), 0.0, _gibbs, limit=1.0,
    ),
}  # fmt: skip
"""By name; levels from mild to strong."""
