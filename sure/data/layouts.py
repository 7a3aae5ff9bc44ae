"""Which files of a folder belong together: Decathlon, nnU-Net raw, ACDC, or images and labels apart."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sure.data.nifti import SUFFIXES, is_nifti, stem
from sure.errors import UserError
from sure.files import read_json

IMAGE_FOLDERS = ("images", "imagesTr", "image", "imgs", "img", "volumes")
LABEL_FOLDERS = (
    *("labels", "labelsTr", "label", "masks", "mask", "segmentations", "segmentation"),
    *("segs", "seg", "gts", "gt", "annotations"),
)
ACDC_CLASSES = ("background", "right ventricle", "myocardium", "left ventricle")

_IMAGE_ENDING = re.compile(r"[_-](image|img|volume)$", re.IGNORECASE)
_LABEL_ENDING = re.compile(r"[_-](seg|segmentation|gt|labels?|masks?)$", re.IGNORECASE)
MISSING_LABEL = "image without label"
_SAMPLE = 4096
_CHANNEL = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})")
_ACDC_FRAME = re.compile(r"(?P<case>patient\d+_frame\d+)(?P<truth>_gt)?")


@dataclass(frozen=True)
class Case:
    """One subject: a path for each channel (or one 4D file with the channels last), and its label map."""

    name: str
    images: tuple[Path, ...]
    label: Path | None


@dataclass(frozen=True)
class Fault:
    """Something wrong with one file of one case."""

    case: str
    file: Path
    problem: str


@dataclass(frozen=True)
class Dataset:
    """What `discover` found. `cases` are complete, sorted by name; what is not complete is in `problems`."""

    root: Path
    layout: str
    """decathlon, nnunet, acdc or folders."""
    cases: tuple[Case, ...]
    class_names: tuple[str, ...] | None
    """One per class, background first; None where the layout does not declare them."""
    problems: tuple[Fault, ...] = ()
    ignore_label: int | None = None
    """Label value of voxels that count nowhere (nnU-Net's "ignore")."""
    channels: int | None = None
    """Image channels declared by the layout."""


def files_digest(cases: Iterable[Case]) -> str:
    """SHA-256 of the cases' names, and of size, beginning, middle and end of their files, wherever these lie."""
    digest = hashlib.sha256()
    for case in sorted(cases, key=lambda c: c.name):
        digest.update(case.name.encode("utf-8", "surrogateescape"))
        for path in (*case.images, *([] if case.label is None else [case.label])):
            size = path.stat().st_size
            digest.update(str(size).encode())
            with path.open("rb") as file:
                for place in (0, size // 2, size - _SAMPLE):
                    file.seek(max(place, 0))
                    digest.update(file.read(_SAMPLE))
    return digest.hexdigest()


def discover(root: Path, *, images: Path | None = None, labels: Path | None = None) -> Dataset:
    """Find the cases below `root`, in sorted order, without reading a volume.

    Args:
        root: folder of a data set.
        images: folder of images, absolute or inside `root`; given with `labels`, detection is skipped.
        labels: folder of label maps, likewise.

    Raises UserError where nothing known is found; single missing files become `problems` instead.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: {'expected a folder, found a file' if root.exists() else 'no such folder'}")
    if (images is None) != (labels is None):
        raise UserError("images and labels: give both folders or neither")
    if images is not None and labels is not None:
        dataset = _folders(root, root / images, root / labels)
    elif (root / "dataset.json").exists():
        dataset = _described(root)
    elif acdc := _acdc_root(root):
        dataset = _acdc(root, acdc)
    else:
        dataset = _folders(root, *_image_and_label_folders(root))
    if not dataset.cases and not dataset.problems:
        raise UserError(f"{root}: no case found ({dataset.layout} layout, {' or '.join(SUFFIXES)} files)")
    return dataset


def _described(root: Path) -> Dataset:
    """A folder with dataset.json: nnU-Net (v2 keys) or Decathlon."""
    file = root / "dataset.json"
    try:
        spec = read_json(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(spec, dict):
        raise UserError(f"{file}: expected an object, got {type(spec).__name__}")
    if "channel_names" in spec:
        return _nnunet(root, file, spec)
    if "training" in spec:
        return _decathlon(root, file, spec)
    raise UserError(f'{file}: expected "training" (Decathlon) or "channel_names" (nnU-Net), found {list(spec)}')


def _decathlon(root: Path, file: Path, spec: dict[str, Any]) -> Dataset:
    class_names = None
    if "labels" in spec:
        names = _mapping(file, spec, "labels")
        class_names = _class_names(file, {str(name): value for value, name in names.items()}, len(names))
    entries = spec["training"]
    if not isinstance(entries, list):
        raise UserError(f'{file}: "training": expected a list, got {type(entries).__name__}')
    cases, problems = [], []
    for i, entry in enumerate(entries):
        if not (isinstance(entry, dict) and isinstance(entry.get("image"), str)):
            raise UserError(f'{file}: "training"[{i}]: expected {{"image": path, "label": path}}, got {entry!r}')
        image, given = root / entry["image"], entry.get("label")
        label = root / given if isinstance(given, str) else None
        name = stem(image)
        # nnU-Net v1 names CASE.nii.gz where CASE_0000.nii.gz, CASE_0001.nii.gz, ... lie.
        parts = [] if image.is_file() else _channel_files(image)
        images = tuple(parts) or (image,)
        missing = [path for path in (*images, label) if path is not None and not path.is_file()]
        problems += [Fault(name, path, "named in dataset.json, but not there") for path in missing]
        if label is None:
            problems.append(Fault(name, image, MISSING_LABEL))
        elif not missing:
            cases.append(Case(name, images, label))
    modality = spec.get("modality")
    channels = len(modality) if isinstance(modality, dict) and modality else None
    return _dataset(root, "decathlon", cases, class_names, problems, channels=channels)


def _channel_files(image: Path) -> list[Path]:
    if not image.parent.is_dir():
        return []
    matches = ((_CHANNEL.fullmatch(stem(path)), path) for path in _files(image.parent))
    return [path for match, path in matches if match and match["case"] == stem(image)]


def _nnunet(root: Path, file: Path, spec: dict[str, Any]) -> Dataset:
    ending = spec.get("file_ending", ".nii.gz")
    if ending not in SUFFIXES:
        raise UserError(f'{file}: "file_ending": expected {" or ".join(SUFFIXES)}, got {ending!r}')
    values = dict(_mapping(file, spec, "labels"))
    regions = [name for name, value in values.items() if isinstance(value, list)]
    if regions:
        raise UserError(f"{file}: region-based labels are not supported ({', '.join(regions)}); expected one number")
    ignore = values.pop("ignore", None)
    class_names = _class_names(file, values, len(values))
    if ignore is not None:
        ignore = _integer(file, ignore)
        if ignore < len(class_names):
            raise UserError(f'{file}: "labels": ignore has the value {ignore}, which is a class')
    channels = len(_mapping(file, spec, "channel_names"))
    images, labels = _required_folder(root / "imagesTr"), _required_folder(root / "labelsTr")

    found: dict[str, dict[int, Path]] = defaultdict(dict)
    problems = []
    for path in _files(images, ending):
        match = _CHANNEL.fullmatch(path.name.removesuffix(ending))
        if match:
            found[match["case"]][int(match["channel"])] = path
        else:
            problems.append(Fault(stem(path), path, "expected a name like CASE_0000, with its channel"))
    truths = {path.name.removesuffix(ending): path for path in _files(labels, ending)}
    cases = []
    for name in sorted(found.keys() | truths.keys()):
        paths, label = found.get(name, {}), truths.get(name)
        if label is None:
            problems.append(Fault(name, paths[min(paths)], MISSING_LABEL))
        elif not paths:
            problems.append(Fault(name, label, "label without image"))
        elif sorted(paths) != list(range(channels)):
            got = ", ".join(f"{c:04d}" for c in sorted(paths))
            problems.append(Fault(name, paths[min(paths)], f"expected {channels} channels from 0000, found {got}"))
        else:
            cases.append(Case(name, tuple(paths[c] for c in range(channels)), label))
    return _dataset(root, "nnunet", cases, class_names, problems, ignore_label=ignore, channels=channels)


def _acdc_root(root: Path) -> Path | None:
    """`root`, or its `training` folder as ACDC is distributed, if there are patients in it."""
    for folder in (root, root / "training"):
        if any(_ACDC_FRAME.fullmatch(stem(p)) for p in folder.glob("patient*/patient*.nii*") if is_nifti(p)):
            return folder
    return None


def _acdc(root: Path, folder: Path) -> Dataset:
    frames: dict[str, Path] = {}
    truths: dict[str, Path] = {}
    for path in sorted(folder.glob("patient*/patient*.nii*")):
        match = _ACDC_FRAME.fullmatch(stem(path)) if is_nifti(path) else None
        if match:
            (truths if match["truth"] else frames)[match["case"]] = path
    cases, problems = [], []
    for name in sorted(frames.keys() | truths.keys()):
        if name not in truths:
            problems.append(Fault(name, frames[name], MISSING_LABEL))
        elif name not in frames:
            problems.append(Fault(name, truths[name], "label without image"))
        else:
            cases.append(Case(name, (frames[name],), truths[name]))
    return _dataset(root, "acdc", cases, ACDC_CLASSES, problems, channels=1)


def _image_and_label_folders(root: Path) -> tuple[Path, Path]:
    folders = sorted(path for path in root.iterdir() if path.is_dir())
    pair = []
    for wanted in (IMAGE_FOLDERS, LABEL_FOLDERS):
        known = {name.lower() for name in wanted}
        found = [path for path in folders if path.name.lower() in known]
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise UserError(f"{root}: several folders could be meant: {names}; keep one of them")
        pair += found
    if len(pair) != 2:
        empty = "empty folder" if not any(root.iterdir()) else "no known layout"
        raise UserError(
            f"{root}: {empty}; looked for dataset.json (Decathlon, nnU-Net),"
            " patientNNN/patientNNN_frameNN.nii.gz (ACDC), and"
            f" a folder of images ({', '.join(IMAGE_FOLDERS)}) beside one of labels ({', '.join(LABEL_FOLDERS)})"
        )
    return pair[0], pair[1]


def _folders(root: Path, images: Path, labels: Path) -> Dataset:
    """Pair by name: the same, the same without an ending like _seg, or CASE_0000, CASE_0001 with CASE."""
    for folder in (images, labels):
        _required_folder(folder)
        if not _files(folder):
            raise UserError(f"{folder}: no {' or '.join(SUFFIXES)} file in it")
    remaining = {stem(path): path for path in _files(images)}
    short = {_IMAGE_ENDING.sub("", name): name for name in remaining}
    channels: dict[str, list[str]] = defaultdict(list)
    for name in sorted(remaining):
        match = _CHANNEL.fullmatch(name)
        if match and int(match["channel"]) == len(channels[match["case"]]):
            channels[match["case"]].append(name)
    cases, problems = [], []
    for path in _files(labels):
        full, name = stem(path), _LABEL_ENDING.sub("", stem(path))
        # The full name goes first: a label called like its image needs no guess about endings.
        matches: Iterable[list[str]] = (
            *([key] for key in (full, name, short.get(full, ""), short.get(name, ""))),
            *(channels.get(key, []) for key in (full, name)),
        )
        members = next((m for m in matches if m and all(key in remaining for key in m)), None)
        if members is None:
            problems.append(Fault(full, path, "label without image"))
        else:
            cases.append(Case(name, tuple(remaining.pop(key) for key in members), path))
    problems += [Fault(name, path, MISSING_LABEL) for name, path in remaining.items()]
    return _dataset(root, "folders", cases, None, problems)


def _dataset(
    root: Path,
    layout: str,
    cases: list[Case],
    class_names: tuple[str, ...] | None,
    problems: list[Fault],
    *,
    ignore_label: int | None = None,
    channels: int | None = None,
) -> Dataset:
    """Sorted; of cases that share a name only the first stays, since results are filed by name."""
    unique: dict[str, Case] = {}
    for case in sorted(cases, key=lambda c: (c.name, c.images)):
        first = unique.setdefault(case.name, case)
        if first is not case:
            problems.append(Fault(case.name, case.images[0], f"same case name as {first.images[0]}"))
    problems = sorted(problems, key=lambda f: (f.case, f.file))
    kept = tuple(unique.values())
    return Dataset(root, layout, kept, class_names, tuple(problems), ignore_label, channels)


def _class_names(file: Path, values: dict[str, Any], count: int) -> tuple[str, ...]:
    """Names by class index, from {name: value}; the values must be 0..count-1."""
    names = {_integer(file, value): name for name, value in values.items()}
    if sorted(names) != list(range(count)) or count < 2:
        raise UserError(f'{file}: "labels": expected distinct names for 0, 1, 2, ... without gaps, got {values}')
    return tuple(names[i] for i in range(count))


def _integer(file: Path, value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise UserError(f'{file}: "labels": expected a whole number, got {value!r}') from None


def _mapping(file: Path, spec: dict[str, Any], key: str) -> dict[str, Any]:
    if not isinstance(spec.get(key), dict) or not spec[key]:
        raise UserError(f'{file}: "{key}": expected a mapping with entries, got {spec.get(key)!r}')
    return spec[key]


def _required_folder(path: Path) -> Path:
    if not path.is_dir():
        raise UserError(f"{path}: no such folder")
    return path


def _files(folder: Path, ending: str | tuple[str, ...] = SUFFIXES) -> list[Path]:
    return sorted(p for p in folder.iterdir() if is_nifti(p) and p.name.endswith(ending) and p.is_file())
