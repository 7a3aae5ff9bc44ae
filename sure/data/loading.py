"""Volumes as tensors: normalised images, label maps, and training patches that depend on seeds alone."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import monai.transforms as mt
import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset as TorchDataset

from sure.config import TrainConfig
from sure.data.layouts import Case
from sure.data.nifti import map_nifti, read_nifti, scaled, spacing_of
from sure.errors import UserError
from sure.files import atomic

Moments = Sequence[tuple[float, float]]

IGNORE = 255
"""Label of voxels that count nowhere: padding, and what the data set itself says to ignore."""

_ACDC_PATIENT = re.compile(r"(patient\d+)_frame\d+")


@dataclass(frozen=True)
class EvaluationCase:
    """A full volume, normalised as in training, with the geometry that its results must carry."""

    name: str
    image: torch.Tensor
    """float32 `(M, *spatial)`, z-scored."""
    label: torch.Tensor | None
    """int16 `(1, *spatial)`, IGNORE where ignored; None where the case has no label."""
    affine: NDArray[np.float64]
    header: nib.Nifti1Header
    """Of the first channel's file: what `save_nifti` takes as `like`."""

    @property
    def spacing(self) -> tuple[float, ...]:
        """Voxel size in mm, in array-axis order."""
        return spacing_of(self.affine, self.image.ndim - 1)


def load_image(case: Case) -> tuple[NDArray[np.float32], NDArray[np.float64], nib.Nifti1Header]:
    """Intensities as stored: `(float32 (M, *spatial), affine 4x4, header of the first file)`.

    One file for each channel, or one 4D file with the channels last. Raises UserError for a file that cannot
    be read, is no image of real finite numbers, or has another shape than the first.
    """
    channels: list[NDArray[np.float32]] = []
    affines, headers = [], []
    for path in case.images:
        array, affine, header = read_nifti(path)
        if array.ndim == 4 and (len(case.images) == 1 or array.shape[3] == 1):
            array = np.moveaxis(array, 3, 0)
        elif array.ndim in (2, 3):
            array = array[None]
        else:
            raise UserError(f"{path}: expected a 2D or 3D image, found shape {array.shape}")
        if array.dtype.kind not in "biuf":
            raise UserError(f"{path}: expected real numbers, found {array.dtype}")
        if channels and array.shape != channels[0].shape:
            raise UserError(f"{path}: expected shape {channels[0].shape[1:]}, found {array.shape[1:]}")
        with np.errstate(over="ignore"):
            channels.append(array.astype(np.float32))
        if not np.isfinite(channels[-1]).all():
            raise UserError(f"{path}: expected finite voxels, found NaN, infinity or more than float32 holds")
        affines.append(affine)
        headers.append(header)
    return channels[0] if len(channels) == 1 else np.concatenate(channels), affines[0], headers[0]


def load_label(case: Case, *, ignore_label: int | None = None) -> NDArray[np.int16]:
    """The label map, int16 `(1, *spatial)`, with `ignore_label` replaced by IGNORE.

    Raises UserError where there is none, it cannot be read, or it holds other than whole numbers in [0, 255).
    """
    if case.label is None:
        raise UserError(f"{case.name}: has no label")
    array, _, _ = read_nifti(case.label)
    if array.ndim == 4 and array.shape[3] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or array.dtype.kind not in "biuf":
        raise UserError(f"{case.label}: expected a 2D or 3D label map, found {array.dtype} {array.shape}")
    return _labels(array, ignore_label, case.label)[None]


def _labels(array: NDArray[Any], ignore_label: int | None, source: Path) -> NDArray[np.int16]:
    ignored = np.zeros(array.shape, bool) if ignore_label is None else array == ignore_label
    # Written so that NaN fails too.
    sound = ignored | ((array >= 0) & (array < IGNORE) & (array == np.rint(array)))
    if not sound.all():
        raise UserError(f"{source}: expected whole numbers from 0 to {IGNORE - 1}, found {array[~sound][0]:g}")
    return np.where(ignored, IGNORE, array).astype(np.int16)


def normalise(image: NDArray[np.float32], moments: Moments | None = None) -> NDArray[np.float32]:
    """z-score of each channel over its volume, `(M, *spatial)` to the same; a constant channel becomes 0.

    Of a part of a volume with the whole's `moments`, mean and standard deviation of each channel.

    Not MONAI's NormalizeIntensity: its float32 moments divide a constant image by rounding noise and overflow
    on large intensities.
    """
    normalised = np.empty_like(image)
    moments = [_moments(channel) for channel in image] if moments is None else moments
    for channel, target, (mean, std) in zip(image, normalised, moments, strict=True):
        if std <= 1e-6 * abs(mean):
            target[...] = 0
            continue
        for plane in range(channel.shape[-1]):  # a whole volume in float64 would be several times its size
            target[..., plane] = (channel[..., plane].astype(np.float64) - mean) / std
    return normalised


def _moments(channel: NDArray[np.float32]) -> tuple[float, float]:
    """Mean and standard deviation in float64, plane by plane along the last axis."""
    planes = range(channel.shape[-1])
    mean = sum(float(channel[..., p].sum(dtype=np.float64)) for p in planes) / channel.size
    squares = sum(float(((channel[..., p].astype(np.float64) - mean) ** 2).sum()) for p in planes)
    return mean, math.sqrt(squares / channel.size)


def load_case(case: Case, *, ignore_label: int | None = None) -> EvaluationCase:
    """Read and normalise one case; its label too, where it has one. Raises UserError as its parts do."""
    image, affine, header = load_image(case)
    label = None if case.label is None else torch.from_numpy(load_label(case, ignore_label=ignore_label))
    if label is not None and label.shape[1:] != image.shape[1:]:
        raise UserError(f"{case.label}: expected shape {image.shape[1:]}, found {tuple(label.shape[1:])}")
    return EvaluationCase(case.name, torch.from_numpy(normalise(image)), label, affine, header)


class TrainingData(TorchDataset[dict[str, torch.Tensor]]):
    """Random patches of cases that are held in memory, or read from a cache on disk.

    Item i is `{"image": float32 (M, *patch), "label": uint8 (1, *patch), "case": position in names}`; smaller images
    are padded with 0, the mean, and their label with IGNORE. There are `patches_per_image` items for each volume, in
    2D for each slice along the last axis. Half of the patches are centred on a foreground voxel where the image has
    one.

    An item is a function of (config.seed, epoch, i) alone: neither the number of workers, nor the order, nor
    earlier epochs matter, so a resumed run sees what an uninterrupted one would have seen.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        config: TrainConfig,
        *,
        ignore_label: int | None = None,
        cache: Path | None = None,
    ) -> None:
        """Read all `cases`, one after another.

        With `cache`, a folder, patches are read by memory map, and of a volume no more than the patch. An uncompressed
        .nii file, one for all channels and at least as large as a patch, is mapped itself, and what has to be known of
        the whole goes to the cache; any other is normalised, padded and written there once. What lies there of the
        same file, size and time of change is used as it is, also by several processes at once.

        Raises UserError for none, for unreadable ones, and for 2D images in 3D training.
        """
        if not cases:
            raise UserError("no case to train on")
        self._config = config
        # Shared memory: workers that outlive an epoch see set_epoch too.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        keys = ("image", "label")
        self._items: list[dict[str, Any] | _Cached] = []
        self.names = [case.name for case in cases]
        for number, case in enumerate(cases):
            if cache is not None:
                self._items += _cached_views(case, config, ignore_label, cache, number)
                continue
            views, foreground = _padded_views(case, config, ignore_label)
            self._items += [
                {"image": image, "label": label, "case": number, "foreground": indices}
                for (image, label), indices in zip(views, foreground, strict=True)
            ]
        size = config.patch
        self._crop = mt.Compose([mt.RandSpatialCropd(keys, size, random_size=False)])
        self._crop_foreground = mt.Compose(
            [
                mt.RandCropByPosNegLabeld(
                    keys,
                    "label",
                    size,
                    pos=1,
                    neg=0,
                    fg_indices_key="foreground",
                    bg_indices_key="background",
                )
            ]
        )
        self._augment = mt.Compose(
            [
                *(mt.RandFlipd(keys, prob=0.5, spatial_axis=axis) for axis in range(config.spatial_dims)),
                mt.RandScaleIntensityd("image", factors=0.1, prob=0.5),
                mt.RandShiftIntensityd("image", offsets=0.1, prob=0.5),
            ]
        )

    @property
    def channels(self) -> int:
        """Image channels M."""
        return int(_loaded(self._items[0])["image"].shape[0])

    def set_epoch(self, epoch: int) -> None:
        """Choose the patches of `epoch`; workers that are already running follow."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self._items) * self._config.patches_per_image

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"index: expected 0 to {len(self) - 1}, got {index}")
        seeds = np.random.SeedSequence([self._config.seed, int(self._epoch), index])
        choose, crop, augment = (int(s) for s in seeds.generate_state(3))
        item = _loaded(self._items[index // self._config.patches_per_image])
        if choose % 2 and len(item["foreground"]):
            # neg=0 draws none of "background", but without it MONAI would search the label again.
            both = {**item, "background": item["foreground"]}
            (patch,) = cast(list[dict[str, Any]], self._crop_foreground.set_random_state(crop)(both))
        else:
            patch = self._crop.set_random_state(crop)({k: item[k] for k in ("image", "label")})
        if "decode" in item:
            patch = item["decode"](patch)
        if self._config.augment:
            patch = self._augment.set_random_state(augment)(patch)
        tensors = {k: _plain(patch[k]).contiguous() for k in ("image", "label")}
        return {**tensors, "case": torch.tensor(item["case"])}


def split_cases(cases: Sequence[Case], folds: int, fold: int, seed: int) -> tuple[list[Case], list[Case]]:
    """`(train, held_out)` of one fold of a cross-validation.

    A permutation drawn from `seed` deals the cases to the folds; it does not depend on their order here,
    which both results keep. The frames of one ACDC patient stay together. Raises UserError for fewer cases
    (patients) than folds, ValueError for an impossible fold.
    """
    if folds < 2 or not 0 <= fold < folds:
        raise ValueError(f"fold: expected 0 <= fold < folds and folds >= 2, got fold {fold} of {folds}")
    groups = sorted({patient_of(case) for case in cases})
    if len(groups) < folds:
        raise UserError(f"folds: expected at most one for each case, got {folds} folds for {len(groups)} cases")
    order = np.random.default_rng(seed).permutation(len(groups))
    held = {groups[i] for i in order[fold::folds]}
    return [c for c in cases if patient_of(c) not in held], [c for c in cases if patient_of(c) in held]


def patient_of(case: Case) -> str:
    """Whose image it is: the frames of one ACDC patient share a name, any other case is a patient of its own."""
    match = _ACDC_PATIENT.fullmatch(case.name)
    return match[1] if match else case.name


def _padded_views(
    case: Case, config: TrainConfig, ignore_label: int | None
) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], list[NDArray[np.int64]]]:
    """Image and uint8 label of the whole case, or in 2D of its slices along the last axis, at least as large as a
    patch; and the positions of foreground voxels in each flattened label.
    """
    loaded = load_case(case, ignore_label=ignore_label)
    if loaded.label is None:
        raise UserError(f"{case.name}: has no label to train on")
    ndim = loaded.image.ndim - 1
    if ndim < config.spatial_dims:
        raise UserError(f"{case.images[0]}: expected a 3D image for spatial_dims 3, found a 2D image")
    size = (*config.patch, *(-1,) * (ndim - config.spatial_dims))  # -1 keeps the axis of the slices
    pad = mt.Compose([mt.SpatialPadd("image", size), mt.SpatialPadd("label", size, value=IGNORE)])
    padded = pad({"image": loaded.image, "label": loaded.label.to(torch.uint8)})
    image, label = (_plain(padded[k]) for k in ("image", "label"))
    views = list(zip(_slices(image, config), _slices(label, config), strict=True))
    return views, [_foreground(y) for _, y in views]


def _slices(volume: torch.Tensor, config: TrainConfig) -> Sequence[torch.Tensor]:
    """What items are cut from: `(C, *spatial)`, or its slices along the last axis."""
    return [volume] if volume.ndim - 1 == config.spatial_dims else volume.unbind(-1)


def _foreground(label: torch.Tensor) -> NDArray[np.int64]:
    flat = label.flatten()
    return torch.nonzero((flat > 0) & (flat != IGNORE))[:, 0].numpy()


@dataclass(frozen=True)
class _Cached:
    """One view of a case on disk: the files, which are opened at each use, and so by every worker for itself."""

    image: Path
    label: Path
    positions: Path
    number: int | None
    """Of the slice; None for the whole."""
    foreground: tuple[int, int]
    case: int
    moments: Moments | None = None
    """Where image and label are NIfTI files."""
    ignore_label: int | None = None


def _loaded(item: dict[str, Any] | _Cached) -> dict[str, Any]:
    """The item's arrays, those on disk as memory maps; `decode` turns the numbers in a file into what is trained on."""
    if not isinstance(item, _Cached):
        return item
    positions = np.load(item.positions, mmap_mode="r")[slice(*item.foreground)]
    found: dict[str, Any] = {"case": item.case, "foreground": positions}
    if item.moments is None:
        maps = {"image": np.load(item.image, mmap_mode="c"), "label": np.load(item.label, mmap_mode="c")}
        return found | {k: torch.from_numpy(v if item.number is None else v[item.number]) for k, v in maps.items()}
    image, label = map_nifti(item.image), map_nifti(item.label)
    if image is None or label is None:
        raise UserError(f"{item.image}: changed while it was trained on")
    for key, (stored, _, _) in (("image", image), ("label", label)):
        channels = _channels_first(stored)
        found[key] = torch.from_numpy(channels if item.number is None else channels[..., item.number])

    def decode(patch: dict[str, Any]) -> dict[str, Any]:
        x, y = (scaled(_plain(patch[k]).numpy(), *m[1:]) for k, m in (("image", image), ("label", label)))
        y = _labels(y, item.ignore_label, item.label).astype(np.uint8)
        x = normalise(np.ascontiguousarray(x, np.float32), item.moments)
        return {"image": torch.from_numpy(x), "label": torch.from_numpy(y)}

    return {**found, "decode": decode}


def _channels_first(stored: NDArray[Any]) -> NDArray[Any]:
    return np.moveaxis(stored, 3, 0) if stored.ndim == 4 else stored[None]


def _mappable(case: Case, config: TrainConfig) -> bool:
    """Whether patches can be cut from the case's own files."""
    if len(case.images) != 1 or case.label is None:
        return False
    maps = [map_nifti(case.images[0]), map_nifti(case.label)]
    shapes = [_channels_first(m[0]).shape[1:] for m in maps if m is not None]
    # Shorter than a patch, it must be padded.
    return len(shapes) == 2 and all(n >= w for n, w in zip(shapes[0], config.patch, strict=False))


def _cached_views(case: Case, config: TrainConfig, ignore_label: int | None, cache: Path, number: int) -> list[_Cached]:
    """The views of a case on disk; what the cache lacks of them is written first."""
    sources = [path.resolve() for path in (*case.images, case.label) if path is not None]
    known = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in sources]
    key = hashlib.sha256(repr((known, config.patch, config.spatial_dims, ignore_label)).encode()).hexdigest()[:16]
    mapped = _mappable(case, config)
    parts = ("moments",) if mapped else ("image", "label")
    files = {part: cache / f"{case.name}-{key}.{part}.npy" for part in (*parts, "foreground", "bounds")}
    if not all(path.is_file() for path in files.values()):
        arrays: dict[str, NDArray[Any]] = {}
        if mapped:
            arrays["moments"] = np.array([_moments(channel) for channel in load_image(case)[0]])
            label = torch.from_numpy(load_label(case, ignore_label=ignore_label)).to(torch.uint8)
            foreground = [_foreground(y) for y in _slices(label, config)]
        else:
            views, foreground = _padded_views(case, config, ignore_label)
            for i, part in enumerate(parts):
                arrays[part] = np.stack([v[i].numpy() for v in views]) if len(views) > 1 else views[0][i].numpy()
        arrays |= {"foreground": np.concatenate(foreground), "bounds": np.cumsum([0, *map(len, foreground)])}
        cache.mkdir(parents=True, exist_ok=True)
        for part, array in arrays.items():
            with atomic(files[part]) as temporary, temporary.open("wb") as file:
                np.save(file, array)
    bounds = np.load(files["bounds"]).tolist()
    # A volume of one slice is cut from its file as any other, but stored as that slice.
    volume = mapped and config.spatial_dims == 2 and map_nifti(sources[0])[0].ndim > 2  # type: ignore[index]
    sliced = volume or len(bounds) > 2
    image_file, label_file = sources if mapped else (files["image"], files["label"])
    moments = [tuple(m) for m in np.load(files["moments"]).tolist()] if mapped else None
    return [
        _Cached(image_file, label_file, files["foreground"], i if sliced else None, ends, number, moments, ignore_label)
        for i, ends in enumerate(itertools.pairwise(bounds))
    ]


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """Without MONAI's metadata, which would travel through every worker."""
    return tensor.as_tensor() if hasattr(tensor, "as_tensor") else tensor
