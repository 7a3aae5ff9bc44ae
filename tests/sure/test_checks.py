"""Every fault that a file can have is found, named and attributed, and none is invented."""

from __future__ import annotations

import gzip
import json
import re
import resource
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from sure.data import Case, Dataset, Fault, check_dataset, discover, format_faults, spacings_differ
from sure.errors import UserError

HIPPOCAMPUS = Path(__file__).resolve().parents[2].parent / "shared/data/hippocampus"
SHAPE = (9, 8, 7)
AFFINE = nib.affines.from_matvec(
    nib.eulerangles.euler2mat(0.3, -0.2, 0.5) @ np.diag((1.5, 1.2, 3.0)), (-80.5, 12.25, 40.0)
)


def image() -> np.ndarray:
    return np.random.default_rng(0).normal(100, 20, SHAPE).astype(np.float32)


def label() -> np.ndarray:
    return (np.arange(np.prod(SHAPE)).reshape(SHAPE) % 3).astype(np.uint8)


def write(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    nib.save(nib.Nifti1Image(array, affine), path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three sound cases of three classes, in two folders."""
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for name in "abc":
        write(tmp_path / f"images/{name}.nii.gz", image())
        write(tmp_path / f"labels/{name}.nii.gz", label())
    return tmp_path


def declare(root: Path, **spec) -> None:
    entries = [{"image": f"images/{n}.nii.gz", "label": f"labels/{n}.nii.gz"} for n in "abc"]
    labels = {"0": "background", "1": "one", "2": "two"}
    (root / "dataset.json").write_text(json.dumps({"labels": labels, "training": entries, **spec}))


def only_fault(root: Path, **options) -> Fault:
    num_classes, faults = check_dataset(discover(root), **options)
    assert len(faults) == 1, format_faults(faults)
    assert num_classes == 3
    return faults[0]


def test_sound_data_has_no_fault(root):
    assert check_dataset(discover(root)) == (3, [])
    write(root / "labels/b.nii.gz", np.zeros(SHAPE, np.int16))  # nothing to see in this case
    write(root / "labels/c.nii.gz", label().astype(np.float64))  # whole numbers in a float file
    write(root / "images/a.nii.gz", np.zeros(SHAPE, np.uint8))
    assert check_dataset(discover(root), progress=True) == (3, [])
    declare(root)
    assert check_dataset(discover(root)) == (3, [])
    assert check_dataset(discover(root), num_classes=5) == (5, [])


def patched(array: np.ndarray, value: float, dtype: type = np.float32) -> np.ndarray:
    array = array.astype(dtype)
    array[1, 2, 3] = value
    return array


def shifted(by: float) -> np.ndarray:
    return nib.affines.from_matvec(AFFINE[:3, :3], AFFINE[:3, 3] + AFFINE[:3, 0] * by)


@pytest.mark.parametrize(
    ("file", "array", "affine", "problem"),
    [
        ("images", patched(image(), np.nan), AFFINE, "1 voxels are NaN, infinite or too large for float32"),
        ("images", patched(image(), -np.inf), AFFINE, "1 voxels are NaN"),
        ("images", patched(image(), 1e300, np.float64), AFFINE, "1 voxels are NaN"),
        ("images", image().astype(np.complex64), AFFINE, "expected real numbers, found complex voxels"),
        ("images", np.zeros(SHAPE, [(c, "u1") for c in "RGB"]), AFFINE, "found coloured or structured voxels"),
        ("images", np.stack([image()] * 4, -1), AFFINE, r"expected a 3D image, found shape \(9, 8, 7, 4\)"),
        ("images", image(), np.diag((1.5, np.nan, 1, 1)), "affine holds NaN or infinity"),
        ("labels", patched(label(), 0.5), AFFINE, r"float labels: expected whole numbers, found 0\.5"),
        ("labels", patched(label(), np.nan), AFFINE, "1 voxels are NaN"),
        ("labels", patched(label(), -1), AFFINE, "labels out of range: expected 0 to 2 without gaps, found -1"),
        ("labels", patched(label(), 7, np.uint8), AFFINE, "labels out of range: .*, found 7"),
        ("labels", patched(label(), 1e30), AFFINE, "labels out of range"),
        ("labels", label() * np.complex64(1), AFFINE, "complex"),
        ("labels", label()[:-1], AFFINE, r"grid differs from the image: shape \(8, 8, 7\) against \(9, 8, 7\)"),
        ("labels", label()[..., 0], AFFINE, r"grid differs from the image: shape \(9, 8\)"),
        ("labels", label(), shifted(0.01), r"affine differs from the image's by 0\.01 voxels"),
        ("labels", label(), np.diag((-1, -1, 1, 1)) @ AFFINE, "affine differs"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_each_fault_is_named_once_with_its_file(root, file, array, affine, problem):
    stored = nib.Nifti1Image(array, AFFINE)
    stored.header.set_sform(affine, code=1)
    stored.header.set_qform(None, code=0)
    raw = bytearray(stored.to_bytes())
    raw[280:328] = np.asarray(affine[:3], "<f4").tobytes()  # srow_x, srow_y, srow_z as they are
    with gzip.open(root / f"{file}/b.nii.gz", "wb") as out:
        out.write(raw)
    fault = only_fault(root)
    assert (fault.case, fault.file) == ("b", root / f"{file}/b.nii.gz")
    assert re.search(problem, fault.problem), fault.problem
    assert "\n" not in fault.problem


@pytest.mark.parametrize("by", [1e-4, 9e-4])
def test_affines_may_differ_by_rounding(root, by):
    write(root / "labels/b.nii.gz", label(), shifted(by))
    assert check_dataset(discover(root)) == (3, [])


def truncated(raw: bytes) -> bytes:
    return raw[: len(raw) * 2 // 3]


def flipped(raw: bytes) -> bytes:
    return raw[:-6] + bytes([raw[-6] ^ 1]) + raw[-5:]  # within the checksum


def recompressed(change: Callable[[bytearray], object]) -> Callable[[bytes], bytes]:
    def apply(raw: bytes) -> bytes:
        plain = bytearray(gzip.decompress(raw))
        change(plain)
        return gzip.compress(bytes(plain))

    return apply


def dimensions(*dim: int) -> Callable[[bytearray], object]:
    return lambda plain: plain.__setitem__(slice(40, 56), np.array([*dim, *[1] * (8 - len(dim))], "<i2").tobytes())


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda raw: b"", "empty file"),
        (truncated, "gzip"),
        (lambda raw: raw[:20], "gzip"),
        (flipped, "gzip"),
        (lambda raw: raw + b"rubbish", "gzip"),
        (lambda raw: b"<html>not found</html>", "bad gzip"),
        (gzip.decompress, "bad gzip"),
        (recompressed(lambda plain: plain.__delitem__(slice(-100, None))), "truncated"),
        (recompressed(lambda plain: plain.__delitem__(slice(200, None))), "not a NIfTI file"),
        (recompressed(lambda plain: plain.__setitem__(slice(344, 348), b"oops")), "not a NIfTI file"),
        (recompressed(lambda plain: plain.__setitem__(slice(70, 72), b"\x99\x99")), "cannot be read"),
        (recompressed(dimensions(3, 32767, 32767, 32767)), "truncated: header claims shape"),
        (recompressed(dimensions(3, 0, 8, 7)), "has no voxels"),
        (recompressed(dimensions(3, -9, 8, 7)), "cannot be read|no voxels"),
        (recompressed(dimensions(12, 9, 8, 7)), "cannot be read"),
    ],
)
@pytest.mark.parametrize("file", ["images", "labels"])
def test_damaged_files_are_faults_not_crashes(root, file, damage, problem):
    path = root / f"{file}/b.nii.gz"
    path.write_bytes(damage(path.read_bytes()))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fault = only_fault(root)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB
    assert (fault.case, fault.file) == ("b", path)
    assert re.search(problem, fault.problem), fault.problem
    assert "\n" not in fault.problem


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.filterwarnings("error")
def test_random_damage_is_reported_or_harmless(tmp_path, packed):
    raw = nib.Nifti1Image(image(), AFFINE).to_bytes()
    path = tmp_path / ("x.nii.gz" if packed else "x.nii")
    case = Case("x", (path,), path)
    rng = np.random.default_rng(0)
    for _ in range(400):
        damaged = bytearray(raw)
        for at in rng.integers(0, 352, rng.integers(1, 4)):
            damaged[at] = rng.integers(256)
        if packed:
            damaged = bytearray(gzip.compress(raw if rng.random() < 0.5 else damaged, 1))
            damaged[rng.integers(len(damaged))] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        _, faults = check_dataset(Dataset(tmp_path, "folders", (case,), None), num_classes=3)
        assert all("\n" not in fault.problem for fault in faults)


@pytest.mark.parametrize("cut", [1, 100, 700])
def test_truncated_plain_files(root, cut):
    path = root / "images/b.nii"
    (root / "images/b.nii.gz").unlink()
    write(path, image())
    path.write_bytes(path.read_bytes()[:-cut])
    assert only_fault(root) == Fault(
        "b", path, f"truncated: header claims shape {SHAPE}, the file has {352 + 4 * 504 - cut} bytes"
    )


def test_missing_partners_are_listed_with_the_rest(root):
    (root / "images/a.nii.gz").unlink()
    (root / "labels/b.nii.gz").unlink()
    (root / "labels/c.nii.gz").write_bytes(b"")
    _, faults = check_dataset(discover(root), num_classes=3)
    assert [(f.case, f.problem) for f in faults] == [
        ("a", "label without image"),
        ("b", "image without label"),
        ("c", "empty file"),
    ]
    header, *rows = format_faults(faults).splitlines()
    assert header.split() == ["case", "problem", "file"]
    assert len(rows) == 3
    column = header.index("file")
    assert [row[column:] for row in rows] == [str(f.file) for f in faults]
    assert len({row.index(f.problem) for row, f in zip(rows, faults, strict=True)}) == 1


def test_several_faults_of_one_file(root):
    write(root / "labels/b.nii.gz", patched(label(), np.nan), shifted(3))
    _, faults = check_dataset(discover(root))
    assert {f.file.parent.name for f in faults} == {"labels"}
    assert len(faults) == 2


def test_declared_classes_and_the_ignore_label(root):
    for name in "abc":
        write(root / f"labels/{name}.nii.gz", patched(label(), 3, np.uint8))
        (root / f"images/{name}.nii.gz").rename(root / f"images/{name}_0000.nii.gz")
    (root / "images").rename(root / "imagesTr")
    (root / "labels").rename(root / "labelsTr")
    spec = {"channel_names": {"0": "MRI"}, "file_ending": ".nii.gz"}
    classes = {"background": 0, "one": 1, "two": 2}
    (root / "dataset.json").write_text(json.dumps({**spec, "labels": {**classes, "ignore": 3}}))
    assert check_dataset(discover(root)) == (3, [])
    (root / "dataset.json").write_text(json.dumps({**spec, "labels": classes}))
    num_classes, faults = check_dataset(discover(root))
    assert num_classes == 3
    assert [f.problem for f in faults] == ["labels out of range: expected 0 to 2, found 3"] * 3


def test_classes_asked_for_bound_the_labels(root):
    num_classes, faults = check_dataset(discover(root), num_classes=2)
    assert num_classes == 2
    assert [f.case for f in faults] == ["a", "b", "c"]


def test_masks_of_0_and_255_are_no_256_classes(root):
    for name in "abc":
        write(root / f"labels/{name}.nii.gz", ((label() > 0) * 255).astype(np.uint8))
    expected = r"at least 2 classes, 0, 1 and so on without gaps, found 0, 255 \(255 in .*labels/a\.nii\.gz\)"
    with pytest.raises(UserError, match=expected):
        check_dataset(discover(root))


def test_where_nothing_can_be_learned_the_faults_are_not_lost(root):
    for name in "ab":
        write(root / f"labels/{name}.nii.gz", np.zeros(SHAPE, np.uint8))
    (root / "labels/c.nii.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"(?s)at least 2 classes.*c\.nii\.gz"):
        check_dataset(discover(root))


def test_channels_must_agree(root):
    for name in "abc":
        (root / f"images/{name}.nii.gz").rename(root / f"images/{name}_0000.nii.gz")
        write(root / f"images/{name}_0001.nii.gz", image())
    assert check_dataset(discover(root)) == (3, [])
    write(root / "images/b_0001.nii.gz", image()[1:])
    assert only_fault(root).problem == "grid differs from the first channel: shape (8, 8, 7) against (9, 8, 7)"
    (root / "images/b_0001.nii.gz").unlink()
    assert only_fault(root).problem == "expected 2 image channels, found 1"


def test_channels_in_4d_files_need_a_declaration(root):
    for name in "abc":
        write(root / f"images/{name}.nii.gz", np.stack([image()] * 2, -1))
    declare(root, modality={"0": "T2", "1": "ADC"})
    assert check_dataset(discover(root)) == (3, [])
    write(root / "images/c.nii.gz", image())
    assert only_fault(root).problem == "expected 2 image channels, found 1"


def test_flat_images_are_fine_among_themselves(root):
    write(root / "images/b.nii.gz", image()[..., 0])
    write(root / "labels/b.nii.gz", label()[..., 0])
    assert only_fault(root).problem == "2D image among 3D images"
    for name in "ac":
        write(root / f"images/{name}.nii.gz", image()[..., 0])
        write(root / f"labels/{name}.nii.gz", label()[..., 0])
    assert check_dataset(discover(root)) == (3, [])
    _, faults = check_dataset(discover(root), spatial_dims=3)
    assert [f.problem for f in faults] == ["expected a 3D image for a 3D run, found a 2D image"] * 3
    assert check_dataset(discover(root), spatial_dims=2) == (3, [])


def test_flat_images_have_two_spacings(root):
    for i, name in enumerate("abc"):
        write(root / f"images/{name}.nii.gz", image()[..., 0], np.diag([1.0, 1.0, 1.0 + i, 1.0]))
    assert spacings_differ(discover(root)) == ""


def test_spacings_that_differ_are_told(root):
    assert spacings_differ(discover(root)) == ""
    for folder, values in (("images", image()), ("labels", label())):
        write(root / f"{folder}/b.nii.gz", values, np.diag([1.0, 1.005, 2.5, 1.0]))
    told = spacings_differ(discover(root))
    assert told == "voxels differ in size from case to case, from 1 x 1 x 2.5 to 1.5 x 1.2 x 3 mm"
    assert check_dataset(discover(root)) == (3, [])


def test_folder_where_a_file_belongs(root):
    (root / "images/b.nii.gz").unlink()
    (root / "images/b.nii.gz").mkdir()
    _, faults = check_dataset(discover(root))
    assert [f.problem for f in faults] == ["label without image"]


@pytest.mark.skipif(not HIPPOCAMPUS.is_dir(), reason="the hippocampus images are not beside this checkout")
def test_real_data_set_is_sound():
    assert check_dataset(discover(HIPPOCAMPUS)) == (3, [])
