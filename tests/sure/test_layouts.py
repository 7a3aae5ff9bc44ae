"""Which files are found, paired and named in each layout; discovery never opens a volume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sure.data import Case, discover, files_digest
from sure.errors import UserError

HIPPOCAMPUS = Path(__file__).resolve().parents[2].parent / "shared/data/hippocampus"


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"not opened")


def describe(root: Path, **spec) -> None:
    root.mkdir(exist_ok=True)
    (root / "dataset.json").write_text(json.dumps(spec))


def pairs(*names: str) -> list[dict[str, str]]:
    return [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in names]


LABELS = {"0": "background", "1": "tumour"}
NNUNET = {"channel_names": {"0": "T1", "1": "T2"}, "file_ending": ".nii.gz", "labels": {"background": 0, "tumour": 1}}


# Decathlon


def test_decathlon(tmp_path):
    describe(tmp_path, labels=LABELS, modality={"0": "MRI"}, training=pairs("b", "a"))
    touch(tmp_path, *(f"{d}/{n}.nii.gz" for d in ("imagesTr", "labelsTr") for n in "ab"))
    dataset = discover(tmp_path)
    assert dataset.layout == "decathlon"
    assert dataset.class_names == ("background", "tumour")
    assert dataset.channels == 1
    assert dataset.problems == ()
    assert dataset.cases == tuple(
        Case(n, (tmp_path / f"imagesTr/{n}.nii.gz",), tmp_path / f"labelsTr/{n}.nii.gz") for n in "ab"
    )


def test_decathlon_with_missing_files(tmp_path):
    describe(tmp_path, labels=LABELS, training=[*pairs("a", "b", "c"), {"image": "imagesTr/d.nii.gz"}])
    touch(tmp_path, "imagesTr/a.nii.gz", "labelsTr/b.nii.gz", "imagesTr/c.nii.gz", "labelsTr/c.nii.gz")
    dataset = discover(tmp_path)
    assert [c.name for c in dataset.cases] == ["c"]
    assert [(f.case, f.file.parent.name) for f in dataset.problems] == [
        ("a", "labelsTr"),
        ("b", "imagesTr"),
        ("d", "imagesTr"),
        ("d", "imagesTr"),
    ]
    assert {f.problem for f in dataset.problems} == {"named in dataset.json, but not there", "image without label"}


def test_decathlon_with_channels_in_files_as_nnunet_v1_has_them(tmp_path):
    describe(tmp_path, labels=LABELS, modality={"0": "T1", "1": "T2"}, training=pairs("a_01"))
    touch(tmp_path, "imagesTr/a_01_0000.nii.gz", "imagesTr/a_01_0001.nii.gz", "labelsTr/a_01.nii.gz")
    (case,) = discover(tmp_path).cases
    assert [p.name for p in case.images] == ["a_01_0000.nii.gz", "a_01_0001.nii.gz"]


def test_decathlon_where_two_entries_share_a_name(tmp_path):
    entries = [{"image": f"{d}/a.nii.gz", "label": f"{d}/a_seg.nii.gz"} for d in ("one", "two")]
    describe(tmp_path, labels=LABELS, training=entries)
    touch(tmp_path, *(f"{d}/{n}.nii.gz" for d in ("one", "two") for n in ("a", "a_seg")))
    dataset = discover(tmp_path)
    assert [c.images[0].parent.name for c in dataset.cases] == ["one"]
    assert [f.problem for f in dataset.problems] == [f"same case name as {tmp_path / 'one/a.nii.gz'}"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"labels": {"0": "a", "2": "b"}, "training": []}, "without gaps"),
        ({"labels": {"0": "a", "1": "a"}, "training": []}, "distinct names"),
        ({"labels": {"x": "a", "1": "b"}, "training": []}, "whole number, got 'x'"),
        ({"labels": ["a", "b"], "training": []}, '"labels": expected a mapping'),
        ({"labels": LABELS, "training": {"a": 1}}, '"training": expected a list, got dict'),
        ({"labels": LABELS, "training": ["a.nii.gz"]}, r'"training"\[0\]: expected'),
        ({"labels": LABELS}, '"training".*"channel_names"'),
        ({"labels": LABELS, "training": []}, "no case found"),
        ([1, 2], "expected an object, got list"),
    ],
)
def test_broken_descriptions_are_explained(tmp_path, spec, message):
    (tmp_path / "dataset.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match=message) as error:
        discover(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe\x00", b""])
def test_unreadable_description(tmp_path, content):
    (tmp_path / "dataset.json").write_bytes(content)
    with pytest.raises(UserError, match=r"dataset\.json: cannot be read as JSON"):
        discover(tmp_path)


# nnU-Net


def test_nnunet_with_channels_and_an_ignore_label(tmp_path):
    describe(tmp_path, **{**NNUNET, "labels": {"tumour": 1, "background": 0, "ignore": 2}}, numTraining=2)
    touch(tmp_path, *(f"imagesTr/c_{i}_000{k}.nii.gz" for i in "12" for k in "01"))
    touch(tmp_path, *(f"labelsTr/c_{i}.nii.gz" for i in "12"), "imagesTr/._c_1_0000.nii.gz", "imagesTr/notes.txt")
    dataset = discover(tmp_path)
    assert dataset.layout == "nnunet"
    assert dataset.class_names == ("background", "tumour")
    assert dataset.ignore_label == 2
    assert dataset.channels == 2
    assert dataset.problems == ()
    assert [c.name for c in dataset.cases] == ["c_1", "c_2"]
    assert [p.name for p in dataset.cases[0].images] == ["c_1_0000.nii.gz", "c_1_0001.nii.gz"]
    assert dataset.cases[0].label == tmp_path / "labelsTr/c_1.nii.gz"


def test_nnunet_with_missing_files(tmp_path):
    describe(tmp_path, **NNUNET)
    touch(tmp_path, *(f"imagesTr/{n}.nii.gz" for n in ("a_0000", "a_0001", "b_0000", "c_0000", "c_0001", "d")))
    touch(tmp_path, *(f"labelsTr/{n}.nii.gz" for n in "abe"))
    dataset = discover(tmp_path)
    assert [c.name for c in dataset.cases] == ["a"]
    assert [(f.case, f.problem) for f in dataset.problems] == [
        ("b", "expected 2 channels from 0000, found 0000"),
        ("c", "image without label"),
        ("d", "expected a name like CASE_0000, with its channel"),
        ("e", "label without image"),
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": {"background": 0, "whole": [1, 2], "core": 2}}, r"region-based labels.*whole"),
        ({"file_ending": ".png"}, r"expected \.nii or \.nii\.gz, got '\.png'"),
        ({"labels": {"background": 0, "tumour": 1, "ignore": 1}}, "ignore has the value 1"),
        ({"channel_names": {}}, '"channel_names": expected a mapping'),
        ({"labels": {"background": 0}}, "without gaps"),
        ({}, "imagesTr: no such folder"),
    ],
)
def test_nnunet_that_cannot_be_used_is_explained(tmp_path, changes, message):
    describe(tmp_path, **{**NNUNET, **changes})
    with pytest.raises(UserError, match=message):
        discover(tmp_path)


# ACDC


@pytest.mark.parametrize("inside", ["", "training/"])
def test_acdc(tmp_path, inside):
    for i in (2, 1):
        folder = f"{inside}patient{i:03d}/patient{i:03d}"
        touch(tmp_path, *(f"{folder}_{n}.nii.gz" for n in ("4d", "frame01", "frame01_gt", "frame12", "frame12_gt")))
        touch(tmp_path, f"{inside}patient{i:03d}/Info.cfg", f"{inside}patient{i:03d}/MANDATORY_CITATION.md")
    dataset = discover(tmp_path)
    assert dataset.layout == "acdc"
    assert [c.name for c in dataset.cases] == [f"patient{i:03d}_frame{f}" for i in (1, 2) for f in ("01", "12")]
    assert all(c.label.name == f"{c.name}_gt.nii.gz" for c in dataset.cases)
    assert len(dataset.class_names) == 4
    assert dataset.problems == ()


def test_acdc_with_missing_files(tmp_path):
    touch(tmp_path, *(f"patient001/patient001_{n}.nii.gz" for n in ("frame01", "frame02_gt", "frame03", "frame03_gt")))
    dataset = discover(tmp_path)
    assert [c.name for c in dataset.cases] == ["patient001_frame03"]
    assert [f.problem for f in dataset.problems] == ["image without label", "label without image"]


# Two folders


@pytest.mark.parametrize(
    ("images", "labels"), [("images", "labels"), ("imagesTr", "labelsTr"), ("Image", "Masks"), ("img", "segmentations")]
)
@pytest.mark.parametrize(
    ("image", "label"),
    [("a_1", "a_1"), ("a_1", "a_1_seg"), ("a_1", "a_1_gt"), ("a_1_image", "a_1_label"), ("a_1_img", "a_1"),
     ("a_1_0000", "a_1"), ("a_1_0000", "a_1_0000"), ("a_1_0000", "a_1_mask")],
)  # fmt: skip
def test_folders(tmp_path, images, labels, image, label):
    touch(tmp_path, f"{images}/{image}.nii.gz", f"{labels}/{label}.nii", f"{images}/b.nii", f"{labels}/b.nii.gz")
    dataset = discover(tmp_path)
    assert dataset.layout == "folders"
    assert dataset.class_names is None
    assert dataset.problems == ()
    assert [c.name for c in dataset.cases] == ["a_1_0000" if label == "a_1_0000" else "a_1", "b"]
    assert dataset.cases[0].images == (tmp_path / images / f"{image}.nii.gz",)
    assert dataset.cases[0].label == tmp_path / labels / f"{label}.nii"


def test_folders_with_channels_and_missing_files(tmp_path):
    touch(tmp_path, *(f"images/{n}.nii.gz" for n in ("a_0000", "a_0001", "b_0001", "c", "d_0001", "d_0002")))
    touch(tmp_path, *(f"labels/{n}.nii.gz" for n in ("a", "b", "d_0001", "d_0002", "e")))
    dataset = discover(tmp_path)
    assert [(c.name, len(c.images)) for c in dataset.cases] == [("a", 2), ("d_0001", 1), ("d_0002", 1)]
    assert [(f.case, f.problem) for f in dataset.problems] == [
        ("b", "label without image"),
        ("b_0001", "image without label"),
        ("c", "image without label"),
        ("e", "label without image"),
    ]


def test_named_folders(tmp_path):
    touch(tmp_path, "scans/a.nii.gz", "truth/a.nii.gz")
    for images, labels in ((Path("scans"), Path("truth")), (tmp_path / "scans", tmp_path / "truth")):
        (case,) = discover(tmp_path, images=images, labels=labels).cases
        assert case == Case("a", (tmp_path / "scans/a.nii.gz",), tmp_path / "truth/a.nii.gz")
    with pytest.raises(UserError, match="both folders or neither"):
        discover(tmp_path, images=Path("scans"))
    with pytest.raises(UserError, match="nowhere: no such folder"):
        discover(tmp_path, images=Path("scans"), labels=Path("nowhere"))


def test_what_is_no_data_set_is_explained(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such folder"):
        discover(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"empty folder; looked for dataset\.json.*patientNNN.*images.*labels"):
        discover(tmp_path)
    touch(tmp_path, "file.nii.gz")
    with pytest.raises(UserError, match="expected a folder, found a file"):
        discover(tmp_path / "file.nii.gz")
    with pytest.raises(UserError, match="no known layout"):
        discover(tmp_path)
    touch(tmp_path, "images/a.png", "labels/a.nii.gz")
    with pytest.raises(UserError, match=r"images: no \.nii or \.nii\.gz file"):
        discover(tmp_path)
    touch(tmp_path, "img/a.nii.gz")
    with pytest.raises(UserError, match="several folders could be meant: images, img"):
        discover(tmp_path)


@pytest.mark.skipif(not HIPPOCAMPUS.is_dir(), reason="the hippocampus images are not beside this checkout")
def test_real_data_set():
    dataset = discover(HIPPOCAMPUS)
    assert dataset.layout == "decathlon"
    assert len(dataset.cases) == 100
    assert dataset.problems == ()
    assert dataset.class_names == ("background", "Anterior", "Posterior")


def test_files_are_known_by_what_is_in_them(tmp_path):
    """Equal sizes are not enough; another folder does not matter."""

    def cases(root, middle):
        for folder in ("images", "labels"):
            (root / folder).mkdir(parents=True)
            (root / folder / "a.nii").write_bytes(bytes(20_000) + middle + bytes(20_000))
        return discover(root).cases

    one = files_digest(cases(tmp_path / "one", b"x"))
    assert files_digest(cases(tmp_path / "two", b"x")) == one
    assert files_digest(cases(tmp_path / "three", b"y")) != one
