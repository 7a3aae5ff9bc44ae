"""The phantoms look as promised: four classes, blur that weakens edges, noise, reproducible files."""

from __future__ import annotations

import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage
from scipy.stats import spearmanr

from sure.data import check_dataset, discover, phantom, write_phantoms
from sure.errors import UserError


@pytest.fixture(scope="module")
def phantoms() -> list[dict[str, np.ndarray]]:
    return [phantom((64, 64, 48), np.random.default_rng(i)) for i in range(8)]


def test_shapes_types_and_ranges(phantoms):
    for p in phantoms:
        assert {k: (v.shape, v.dtype) for k, v in p.items()} == {
            "image": ((64, 64, 48), np.float32),
            "label": ((64, 64, 48), np.uint8),
            "blur": ((64, 64, 48), np.float32),
        }
        assert np.isfinite(p["image"]).all()
        assert p["image"].min() >= 0
        assert p["blur"].min() > 0
    assert not np.array_equal(phantoms[0]["label"], phantoms[1]["label"])


def test_anatomy(phantoms):
    touching = np.ones((3, 3, 3), bool)
    for p in phantoms:
        label, image = p["label"], p["image"]
        for c in (1, 2, 3):
            parts, n = ndimage.label(label == c, touching)
            share = np.bincount(parts.ravel())[1:].max() / (label == c).sum()
            assert share > 0.98, f"class {c} is in {n} pieces"
            assert 0.01 < (label == c).mean() < 0.10
        # Myocardium closes around the cavity: below the base no cavity voxel meets anything else in its slice.
        middle = label[:, :, 20:32]
        around = ndimage.binary_dilation(middle == 3, np.ones((3, 3, 1), bool))
        assert set(np.unique(middle[around])) == {2, 3}
        # Blood is bright, muscle dark, in the core of each.
        core = {c: ndimage.binary_erosion(label == c) for c in (1, 2, 3)}
        mean = {c: image[m].mean() for c, m in core.items()}
        assert min(mean[1], mean[3]) > 1.5 * mean[2]


def blur_and_gradient(p: dict[str, np.ndarray], classes: tuple[int, int] | None = None) -> list[np.ndarray]:
    """Both over the boundary voxels, or those between two `classes` alone, where the contrast is the same."""
    gradient = np.sqrt(sum(ndimage.sobel(p["image"], axis, mode="nearest") ** 2 for axis in range(3))) / 32
    low, high = ndimage.minimum_filter(p["label"], 3), ndimage.maximum_filter(p["label"], 3)
    boundary = low != high if classes is None else (low == classes[0]) & (high == classes[1])
    return [p["blur"][boundary], gradient[boundary]]


def test_edges_are_weak_where_they_are_blurred(phantoms):
    pairs = [blur_and_gradient(p) for p in phantoms]
    assert max(spearmanr(*pair).statistic for pair in pairs) < -0.15
    assert spearmanr(*(np.concatenate(side) for side in zip(*pairs, strict=True))).statistic < -0.35
    for blur, gradient in pairs:
        assert np.quantile(blur, 0.9) - np.quantile(blur, 0.1) > 1.0  # it varies along one boundary
        assert gradient[blur < 0.8].mean() > 1.3 * gradient[blur > 2.0].mean()
    cavity = [blur_and_gradient(p, (2, 3)) for p in phantoms]
    assert np.mean([spearmanr(*pair).statistic for pair in cavity]) < -0.5


def test_noise_is_rician(phantoms):
    """Where there is next to no signal the magnitude stays well above 0 and is skewed."""
    for p in phantoms:
        dark = p["image"][p["image"] < np.quantile(p["image"], 0.2)]
        assert dark.mean() > 0.02
    rough = [p["image"] - ndimage.gaussian_filter(p["image"], 1) for p in phantoms]
    assert all(0.01 < r.std() < 0.08 for r in rough)


def test_drawn_again_from_the_same_seed():
    a, b = (phantom((24, 20, 16), np.random.default_rng(4)) for _ in range(2))
    assert all(np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("shape", [(16, 16, 16), (96, 64, 24), (17, 40, 31)])
def test_other_shapes_hold_all_classes(shape):
    for seed in range(4):
        drawn = phantom(shape, np.random.default_rng(seed))
        assert drawn["image"].shape == shape
        assert set(np.unique(drawn["label"])) == {0, 1, 2, 3}
        assert np.isfinite(drawn["image"]).all()


@pytest.mark.parametrize("shape", [(15, 64, 64), (64, 64), (64, 64, 48, 2), (0, 0, 0)])
def test_shapes_that_hold_no_heart_are_refused(tmp_path, shape):
    with pytest.raises(UserError, match="shape: expected three sizes of at least 16"):
        write_phantoms(tmp_path / "out", cases=1, shape=shape)
    assert list(tmp_path.iterdir()) == []


def test_files_are_a_sound_data_set_with_a_real_geometry(tmp_path):
    out = write_phantoms(tmp_path / "deep/out", cases=3, shape=(32, 32, 24), seed=7)
    assert out == tmp_path / "deep/out"
    dataset = discover(out)
    assert dataset.layout == "decathlon"
    assert len(dataset.cases) == 3
    assert dataset.class_names is not None
    assert dataset.class_names[3] == "left ventricle"
    assert check_dataset(dataset) == (4, [])
    affines = []
    for case in dataset.cases:
        image, label = nib.load(case.images[0]), nib.load(case.label)
        assert image.get_data_dtype() == np.int16
        assert label.get_data_dtype() == np.uint8
        assert image.get_fdata().max() > 200
        assert int(image.header["qform_code"]) == int(image.header["sform_code"]) == 1
        np.testing.assert_allclose(image.get_qform(), image.get_sform(), atol=1e-4)
        np.testing.assert_allclose(image.header.get_zooms(), (1.6, 1.6, 2.2), rtol=1e-5)
        assert np.abs(image.affine[:3, :3]).min() > 0.01  # turned about every axis
        np.testing.assert_array_equal(image.affine, label.affine)
        affines.append(image.affine)
    assert not np.allclose(affines[0], affines[1])


def test_the_same_seed_writes_the_same_files(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_phantoms(tmp_path / name, cases=2, shape=(16, 16, 16), seed=seed)
    files = {n: {p.relative_to(tmp_path / n): p.read_bytes() for p in (tmp_path / n).rglob("*.*")} for n in "abc"}
    assert len(files["a"]) == 5
    assert files["a"] == files["b"]
    image = Path("imagesTr/phantom_001.nii.gz")
    assert files["a"][image] != files["c"][image]
    # One phantom does not depend on how many are drawn.
    write_phantoms(tmp_path / "d", cases=3, shape=(16, 16, 16), seed=1)
    assert files["a"][image] == (tmp_path / "d" / image).read_bytes()


def test_nothing_is_overwritten_and_nothing_half_written(tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("keep")
    with pytest.raises(UserError, match="full: exists and is not an empty folder"):
        write_phantoms(tmp_path / "full", cases=1, shape=(16, 16, 16))
    with pytest.raises(UserError, match=r"mine\.txt: exists"):
        write_phantoms(tmp_path / "full/mine.txt", cases=1, shape=(16, 16, 16))
    with pytest.raises(UserError, match="cases: expected at least 1, got 0"):
        write_phantoms(tmp_path / "none", cases=0)
    with pytest.raises(UserError, match="seed: expected 0 or more, got -1"):
        write_phantoms(tmp_path / "none", seed=-1)
    (tmp_path / "empty").mkdir()
    write_phantoms(tmp_path / "empty", cases=1, shape=(16, 16, 16))

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("sure.data.phantoms.save_nifti", fail)
    with pytest.raises(OSError, match="disk full"):
        write_phantoms(tmp_path / "out", cases=1, shape=(16, 16, 16))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "full"]


def test_fast_enough_for_a_demo(tmp_path):
    start = time.process_time()
    write_phantoms(tmp_path / "out", cases=3)
    assert time.process_time() - start < 3 * 1.6  # CPU seconds: 24 cases in under 20 s on two cores
