"""Segment new images: labels and uncertainty as NIfTI, on the grid of their image."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, cast

import nibabel as nib
import numpy as np
import torch
from tqdm import tqdm

from sure.calibrate import Scope, load_calibration
from sure.checkpoint import Run, load_run
from sure.data import Case, Dataset, Fault, check_dataset, discover, format_faults, load_case, save_nifti
from sure.data.layouts import MISSING_LABEL
from sure.data.nifti import SUFFIXES, is_nifti, stem
from sure.errors import UserError
from sure.files import check_writable, resolved
from sure.inference import infer_slabs

QUANTISED = {"uint8": float(np.nextafter(np.float32(1 / 255), 0)), "uint16": float(np.float32(1 / 65535))}
"""Types that uncertainty can be stored in, and their steps in float32, as headers hold them: none exceeds 1."""
_CHANNEL = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})")


def predict(
    run_path: Path,
    images: Sequence[Path],
    out: Path,
    *,
    checkpoint: str = "final",
    calibration: Path | None = None,
    abstain: Scope = "overall",
    quantise_uncertainty: Literal["off", "uint8", "uint16"] = "off",
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> list[Path]:
    """Write CASE_seg.nii.gz (uint8 labels) and CASE_unc.nii.gz (float32 uncertainty in [0, 1]) of every case.

    With a calibration also CASE_abstain.nii.gz (uint8), 1 where the run abstains; the labels stay as they are. All
    carry affine, qform, sform, spacing and shape of the image. Every input is read and checked before
    the first result is written; each file appears whole or not at all, replacing one of the same name.

    Args:
        run_path: folder of a training run.
        images: NIfTI files, folders of them, or roots of data sets in a layout that training reads; channels
            of one case are named CASE_0000, CASE_0001, ... or lie in one 4D file.
        out: folder for the results, made if missing.
        checkpoint: which of the run's checkpoints: final, best or latest.
        calibration: file of `sure calibrate` for this run.
        abstain: by its threshold for all voxels, or by those of the predicted classes.
        quantise_uncertainty: store CASE_unc.nii.gz as multiples of 1/255 or 1/65535, with scl_slope, so that readers
            get values off by half of that at most.
        device: where the network runs.
        progress: show progress bars on stderr.

    Returns:
        The files written.

    Raises:
        UserError: inputs that are missing, unreadable, not finite or unlike the training images, all of them
            in one table; two inputs for one output; an output that would replace an input, or lie in a folder whose
            images are read. Then nothing is written.
    """
    if quantise_uncertainty not in ("off", *QUANTISED):
        expected = ", ".join(("off", *QUANTISED))
        raise UserError(f"quantise_uncertainty: expected one of {expected}, got {quantise_uncertainty!r}")
    if abstain != "overall" and calibration is None:
        raise UserError(f"abstain: expected a calibration with {abstain!r} (`sure calibrate` writes one), got none")
    run = load_run(run_path, checkpoint=checkpoint, device=device)
    abstention = None if calibration is None else load_calibration(calibration, run, abstain)
    results = ("seg", "unc") if abstention is None else ("seg", "unc", "abstain")
    cases = collect_cases(images, run.in_channels)
    faults = [*_check_images(cases, run, progress), *_check_outputs(cases, out, results)]
    if faults:
        raise UserError(f"{len(faults)} of the inputs cannot be used:\n{format_faults(faults)}")
    if out.is_file():
        raise UserError(f"{out}: expected a folder, found a file")
    folders = [path for path in map(Path, images) if path.is_dir()]
    inside = [path for case in collect_cases(folders, run.in_channels) for path in case.images] if folders else []
    if resolved(out) in {resolved(path) for path in (*folders, *(path.parent for path in inside))}:
        raise UserError(f"{out}: the results would lie among the images and be taken for some; choose another folder")
    check_writable(out)
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for case in tqdm(cases, desc="predicting", unit="case", disable=not progress):
        loaded = load_case(case)
        spatial, header = loaded.image.shape[1:], loaded.header
        label, uncertainty = torch.empty(spatial, dtype=torch.uint8), torch.empty(spatial)
        refused = torch.empty(spatial if abstention is not None else 0, dtype=torch.bool)
        for part, slab in infer_slabs(run, loaded.image[None]):
            label[part], uncertainty[part] = slab.label, slab.uncertainty[0]
            if abstention is not None:
                refused[part] = abstention.mask(slab)
        del loaded  # the image makes room for the files
        scale = QUANTISED.get(quantise_uncertainty)
        stored = np.dtype(np.float32 if scale is None else quantise_uncertainty)
        kinds = [(label, np.dtype(np.uint8), None), (uncertainty, stored, scale)]
        if abstention is not None:
            kinds.append((refused, np.dtype(np.uint8), None))
        for path, (array, dtype, step) in zip(_outputs(case, out, results), kinds, strict=True):
            save_nifti(array.numpy(), header, path, dtype, scale=step)
            written.append(path)
    return written


def collect_cases(images: Sequence[Path], channels: int) -> list[Case]:
    """The cases among files, folders and roots of data sets, in the order given; labels are left aside.

    Args:
        images: files and folders, as `predict` takes them.
        channels: how many channels a case has; with more than one, files called CASE_0000, CASE_0001, ...
            form a case.

    Raises UserError for a path that is missing, not NIfTI, or a folder in which no image is found, and for
    a data set that lacks files.
    """
    cases: list[Case] = []
    files: list[Path] = []
    for path in map(Path, images):
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if is_nifti(p) and p.is_file())
            if inside:
                files += inside
            else:
                dataset = discover(path)
                # Labels are left aside: a case without one is as good as any.
                unlabelled = [f for f in dataset.problems if f.problem == MISSING_LABEL and channels == 1]
                faults = [f for f in dataset.problems if f not in unlabelled]
                if faults:
                    raise UserError(f"{path}: incomplete data set:\n{format_faults(faults)}")
                cases += [Case(case.name, case.images, None) for case in dataset.cases]
                cases += [Case(f.case, (f.file,), None) for f in unlabelled]
        elif not path.exists():
            raise UserError(f"{path}: no such file or folder")
        elif is_nifti(path):
            files.append(path)
        else:
            raise UserError(f"{path}: expected a file named {' or '.join(SUFFIXES)}, or a folder of them")
    cases += _group_channels(files, channels)
    if not cases:
        raise UserError("images: no image found")
    return cases


def _group_channels(files: Sequence[Path], channels: int) -> list[Case]:
    """One case per file; of a run with several channels, one per CASE_nnnn. Twins stay, to be reported."""
    groups: dict[tuple[Path, str], list[Path]] = defaultdict(list)
    for path in dict.fromkeys(files):
        match = _CHANNEL.fullmatch(stem(path))
        # In a run of one channel two files never share a case, and numbers other than 0000 are those of cases; so are
        # those of files that hold all channels.
        numbers = match is not None and (
            match["channel"] != "0000" or _numbered(path, match["case"]) if channels == 1 else _holds_channels(path)
        )
        if numbers:
            match = None
        name = match["case"] if match else stem(path)
        groups[path.parent if match and channels > 1 else path, name].append(path)
    for (place, name), paths in groups.items():
        if place != paths[0]:  # several files may share it
            found = sorted(stem(path).removeprefix(f"{name}_") for path in paths)
            if found != [f"{i:04d}" for i in range(len(found))]:
                raise UserError(f"{paths[0]}: expected channels of {name} from 0000 on, found {', '.join(found)}")
    return [Case(name, tuple(sorted(paths)), None) for (_, name), paths in groups.items()]


def _holds_channels(path: Path) -> bool:
    """Whether a 4D file, as far as its header can be read."""
    try:
        return len(cast(nib.Nifti1Image, nib.load(path)).shape) == 4
    except Exception:  # what is wrong with it is told when it is read
        return False


def _numbered(path: Path, case: str) -> bool:
    """Whether CASE_0000 is one of several that are numbered."""
    return any((path.parent / f"{case}_0001{suffix}").exists() for suffix in SUFFIXES)


def _check_images(cases: Sequence[Case], run: Run, progress: bool) -> list[Fault]:
    """Everything that reading all files brings up."""
    dataset = Dataset(Path(), "files", tuple(cases), None, channels=run.in_channels)
    classes, dims = run.num_classes, run.config.spatial_dims
    return check_dataset(dataset, num_classes=classes, labelled=False, spatial_dims=dims, progress=progress)[1]


def _check_outputs(cases: Sequence[Case], out: Path, results: Sequence[str]) -> list[Fault]:
    """Two cases for one name, and results that would replace an input."""
    first: dict[str, Case] = {}
    inputs = {resolved(path) for case in cases for path in case.images}
    faults = []
    for case in cases:
        other = first.setdefault(case.name, case)
        if other is not case:
            faults.append(Fault(case.name, case.images[0], f"would write the same files as {other.images[0]}"))
        faults += [
            Fault(case.name, path, "the result would replace an input")
            for path in _outputs(case, out, results)
            if resolved(path) in inputs
        ]
    return faults


def _outputs(case: Case, out: Path, results: Sequence[str]) -> list[Path]:
    return [out / f"{case.name}_{name}.nii.gz" for name in results]
