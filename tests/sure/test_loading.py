"""Volumes, patches, folds, and NIfTI files written on the grid of another."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from sure.config import TrainConfig
from sure.data import (
    IGNORE,
    Case,
    TrainingData,
    UnreadableError,
    discover,
    load_case,
    load_image,
    load_label,
    loading,
    normalise,
    read_nifti,
    save_nifti,
    split_cases,
)
from sure.errors import UserError

HIPPOCAMPUS = Path(__file__).resolve().parents[2].parent / "shared/data/hippocampus"
OBLIQUE = nib.affines.from_matvec(
    nib.eulerangles.euler2mat(0.3, -0.2, 0.5) @ np.diag((1.5, 1.2, 3.0)), (-80.5, 12.25, 40.0)
)


def write(path: Path, array: np.ndarray, affine: np.ndarray = OBLIQUE) -> Path:
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def make_case(folder: Path, name: str = "c", shape: tuple[int, ...] = (20, 18, 9), channels: int = 1) -> Case:
    rng = np.random.default_rng(shape)
    label = np.zeros(shape, np.uint8)
    label[tuple(slice(n // 3, n // 2) for n in shape)] = 1
    label[(0,) * len(shape)] = 2
    images = tuple(
        write(folder / f"{name}_{i:04d}.nii.gz", rng.normal(500 * (i + 1), 60, shape).astype(np.float32))
        for i in range(channels)
    )
    return Case(name, images, write(folder / f"{name}_seg.nii.gz", label))


# Reading


def test_image_and_label_shapes_and_types(tmp_path):
    case = make_case(tmp_path, channels=2)
    image, affine, header = load_image(case)
    assert image.shape == (2, 20, 18, 9)
    assert image.dtype == np.float32
    np.testing.assert_allclose(affine, OBLIQUE, atol=1e-5)
    assert header.get_data_shape() == (20, 18, 9)
    np.testing.assert_array_equal(image[1], nib.load(case.images[1]).get_fdata(dtype=np.float32))
    label = load_label(case)
    assert label.shape == (1, 20, 18, 9)
    assert label.dtype == np.int16


def test_channels_in_one_4d_file_come_first(tmp_path):
    stored = np.arange(5 * 6 * 7 * 3, dtype=np.int16).reshape(5, 6, 7, 3)
    image, _, _ = load_image(Case("c", (write(tmp_path / "c.nii.gz", stored),), None))
    np.testing.assert_array_equal(image, np.moveaxis(stored, 3, 0))


def test_scaled_integers_are_read_as_nibabel_reads_them(tmp_path):
    stored = nib.Nifti1Image(np.arange(60, dtype=np.int16).reshape(3, 4, 5), OBLIQUE)
    stored.header.set_slope_inter(0.5, -10)
    nib.save(stored, tmp_path / "c.nii.gz")
    array, _, _ = read_nifti(tmp_path / "c.nii.gz")
    np.testing.assert_array_equal(array, nib.load(tmp_path / "c.nii.gz").get_fdata())
    assert array.max() != 59


def test_ignored_labels_become_the_ignore_value(tmp_path):
    case = make_case(tmp_path)
    assert load_label(case, ignore_label=2)[0, 0, 0, 0] == IGNORE
    assert set(np.unique(load_label(case, ignore_label=2))) == {0, 1, IGNORE}


@pytest.mark.parametrize("bad", [0.5, np.nan, -1, 255])
def test_labels_that_are_no_classes_are_refused(tmp_path, bad):
    array = np.zeros((4, 4, 4), np.float32)
    array[1, 2, 3] = bad
    with pytest.raises(UserError, match=r"l\.nii: expected whole numbers from 0 to 254, found"):
        load_label(Case("c", (), write(tmp_path / "l.nii", array)))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((4, 4, 4), np.inf, np.float32), "finite"),
        (np.full((4, 4, 4), 1e300), "float32"),
        (np.zeros((4, 4, 4), np.complex64), "real numbers, found complex64"),
        (np.zeros((4, 4, 4, 1, 3), np.float32), "2D or 3D"),
    ],
)
def test_images_that_are_none_are_refused(tmp_path, array, message):
    with pytest.raises(UserError, match=rf"i\.nii: .*{message}"):
        load_image(Case("c", (write(tmp_path / "i.nii", array),), None))


def test_label_of_another_shape_is_refused(tmp_path):
    label = write(tmp_path / "l.nii", np.zeros((4, 4, 5), np.uint8))
    with pytest.raises(UserError, match=r"l\.nii: expected shape \(4, 4, 4\), found \(4, 4, 5\)"):
        load_case(Case("c", (write(tmp_path / "i.nii", np.zeros((4, 4, 4), np.uint8)),), label))


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1.7e6, 1e30])
def test_normalised_to_mean_0_and_deviation_1_whatever_the_scale(scale):
    image = np.random.default_rng(0).uniform(0, scale, (2, 9, 8, 7)).astype(np.float32)
    image[1] += np.float32(scale)
    result = normalise(image)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result.mean((1, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(result.std((1, 2, 3)), 1, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e7 / 3, -3e38])
def test_constant_channel_becomes_zero(value):
    assert not normalise(np.full((1, 31, 17, 13), value, np.float32)).any()


# Writing


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize(("qcode", "scode"), [(1, 1), (1, 0), (0, 2), (0, 0), (3, 4)])
def test_saved_files_keep_the_geometry(tmp_path, qcode, scode, ending):
    like = nib.Nifti1Image(np.random.default_rng(0).random((7, 6, 5)).astype(np.float32), OBLIQUE)
    like.header.set_xyzt_units("mm", "sec")
    like.header.set_slope_inter(3.0, 7.0)
    like.header["cal_max"] = 99
    like.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"a patient's name"))
    like.set_sform(OBLIQUE @ np.diag((1, 1, 1, 1)), code=scode)
    like.set_qform(OBLIQUE, code=qcode)
    nib.save(like, tmp_path / f"like{ending}")
    before = (tmp_path / f"like{ending}").read_bytes()
    like = nib.load(tmp_path / f"like{ending}")

    array = np.random.default_rng(1).random((7, 6, 5)).astype(np.float32)
    save_nifti(array, tmp_path / f"like{ending}", tmp_path / f"out{ending}", np.float32)
    save_nifti(array > 0.5, like.header, tmp_path / f"seg{ending}", np.uint8)
    assert (tmp_path / f"like{ending}").read_bytes() == before
    for name, expected in (("out", array), ("seg", array > 0.5)):
        out = nib.load(tmp_path / f"{name}{ending}")
        np.testing.assert_array_equal(np.asanyarray(out.dataobj), expected)
        assert out.get_data_dtype() == (np.float32 if name == "out" else np.uint8)
        np.testing.assert_array_equal(out.affine, like.affine)
        for form in ("qform", "sform"):
            kept, kept_code = getattr(like, f"get_{form}")(coded=True)
            found, code = getattr(out, f"get_{form}")(coded=True)
            assert code == kept_code
            if kept is None:
                assert found is None
            else:
                np.testing.assert_array_equal(found, kept)
        assert out.header.get_zooms() == like.header.get_zooms()
        assert out.header.get_xyzt_units() == ("mm", "sec")
        assert len(out.header.extensions) == 0
        assert out.header["cal_max"] == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"{n}{ending}" for n in ("like", "out", "seg"))


@pytest.mark.parametrize(
    ("like_shape", "shape"), [((7, 6), (7, 6)), ((7, 6, 5, 1), (7, 6, 5)), ((7, 6, 5, 3), (7, 6, 5))]
)
def test_saved_2d_and_4d_neighbours(tmp_path, like_shape, shape):
    like = nib.load(write(tmp_path / "like.nii.gz", np.zeros(like_shape, np.int16)))
    save_nifti(np.ones(shape), tmp_path / "like.nii.gz", tmp_path / "out.nii.gz", np.uint8)
    out = nib.load(tmp_path / "out.nii.gz")
    assert out.shape == (like_shape if like_shape[-1] == 1 else shape)
    np.testing.assert_array_equal(out.affine, like.affine)
    assert out.header.get_zooms()[: len(shape)] == like.header.get_zooms()[: len(shape)]


def test_saved_on_an_affine_and_as_nifti2(tmp_path):
    save_nifti(np.ones((3, 4, 5)), OBLIQUE, tmp_path / "a.nii.gz", np.int16)
    np.testing.assert_allclose(nib.load(tmp_path / "a.nii.gz").affine, OBLIQUE, atol=1e-5)
    nib.save(nib.Nifti2Image(np.zeros((3, 4, 5), np.uint8), OBLIQUE), tmp_path / "two.nii.gz")
    save_nifti(np.ones((3, 4, 5)), tmp_path / "two.nii.gz", tmp_path / "b.nii.gz", np.float32)
    assert isinstance(nib.load(tmp_path / "b.nii.gz"), nib.Nifti2Image)


def test_what_does_not_fit_is_not_written(tmp_path):
    ones = np.ones((3, 4, 5))
    with pytest.raises(ValueError, match="whole numbers that fit uint8"):
        save_nifti(ones * 256, OBLIQUE, tmp_path / "a.nii.gz", np.uint8)
    with pytest.raises(ValueError, match="whole numbers"):
        save_nifti(ones * np.nan, OBLIQUE, tmp_path / "a.nii.gz", np.uint8)
    with pytest.raises(ValueError, match=r"\.nii or \.nii\.gz"):
        save_nifti(ones, OBLIQUE, tmp_path / "a.mha", np.uint8)
    write(tmp_path / "like.nii.gz", np.zeros((3, 4, 6), np.uint8))
    with pytest.raises(ValueError, match=r"expected shape \(3, 4, 6\)"):
        save_nifti(ones, tmp_path / "like.nii.gz", tmp_path / "a.nii.gz", np.uint8)
    with pytest.raises(UnreadableError):
        save_nifti(ones, tmp_path / "none.nii.gz", tmp_path / "a.nii.gz", np.uint8)
    assert [p.name for p in tmp_path.iterdir()] == ["like.nii.gz"]


def test_interrupted_write_keeps_the_old_file(tmp_path, monkeypatch):
    save_nifti(np.ones((3, 4, 5)), OBLIQUE, tmp_path / "a.nii.gz", np.uint8)
    before = (tmp_path / "a.nii.gz").read_bytes()

    def half(self, file):
        file.write(bytes(400))
        raise OSError("disk full")

    monkeypatch.setattr(nib.Nifti1Image, "to_stream", half)
    with pytest.raises(OSError, match="disk full"):
        save_nifti(np.zeros((3, 4, 5)), OBLIQUE, tmp_path / "a.nii.gz", np.uint8)
    assert [p.name for p in tmp_path.iterdir()] == ["a.nii.gz"]
    assert (tmp_path / "a.nii.gz").read_bytes() == before


def test_same_values_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        save_nifti(np.ones((3, 4, 5)), OBLIQUE, tmp_path / f"{name}.nii.gz", np.uint8)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


# Patches


def config(**changes) -> TrainConfig:
    return TrainConfig(**{"patch_size": (8, 12, 16), "patches_per_image": 3, **changes})


def items(data: TrainingData, epoch: int, **loader) -> list[dict[str, torch.Tensor]]:
    data.set_epoch(epoch)
    return list(DataLoader(data, batch_size=None, **loader))


def equal(a: list[dict[str, torch.Tensor]], b: list[dict[str, torch.Tensor]]) -> bool:
    return all(torch.equal(x[k], y[k]) for x, y in zip(a, b, strict=True) for k in ("image", "label"))


def test_patches_have_the_asked_for_shape_whatever_the_image(tmp_path):
    cases = [make_case(tmp_path, f"c{i}", shape, 2) for i, shape in enumerate(((20, 18, 9), (5, 30, 40), (8, 12, 16)))]
    data = TrainingData(cases, config())
    assert len(data) == 9
    assert data.channels == 2
    for item in items(data, 0):
        assert type(item["image"]) is type(item["label"]) is torch.Tensor
        assert item["image"].shape == (2, 8, 12, 16)
        assert item["label"].shape == (1, 8, 12, 16)
        assert item["image"].dtype == torch.float32
        assert item["label"].dtype == torch.uint8


def test_padding_is_ignored_and_the_rest_is_the_image(tmp_path):
    case = make_case(tmp_path, shape=(5, 7, 9))
    (item,) = items(TrainingData([case], config(patches_per_image=1, augment=False)), 0)
    valid = item["label"] != IGNORE
    assert valid.sum() == 5 * 7 * 9
    assert not item["image"][~valid].any()
    loaded = load_case(case)
    assert torch.equal(item["image"][valid], loaded.image.flatten())
    assert torch.equal(item["label"][valid], loaded.label.flatten().to(torch.uint8))


def test_augmentation_moves_image_and_label_together(tmp_path):
    shape = (8, 12, 16)
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    label = (array % 7).astype(np.uint8)
    case = Case("c", (write(tmp_path / "i.nii", array),), write(tmp_path / "l.nii", label))
    seen = set()
    for item in items(TrainingData([case], config(patches_per_image=20)), 0):
        # Scale and shift keep the order of the voxels, which therefore tells where each of them came from.
        order = item["image"].flatten().argsort().argsort()
        assert torch.equal(item["label"].flatten().long(), order % 7)
        seen.add((int(order[0]), float(item["image"].std().round(decimals=3))))
    assert len({first for first, _ in seen}) > 3
    assert len({spread for _, spread in seen}) > 3


@pytest.mark.parametrize("depth", [5, 60])
def test_foreground_is_seen_in_half_of_the_patches_padded_or_not(tmp_path, depth):
    label = np.zeros((depth, 60, 60), np.uint8)
    label[2:4, 50:52, 30:32] = 1
    image = np.random.default_rng(0).random(label.shape).astype(np.float32)
    case = Case("c", (write(tmp_path / "i.nii", image),), write(tmp_path / "l.nii", label))
    data = TrainingData([case], config(patch_size=(8,), patches_per_image=60))
    with_foreground = sum(bool((item["label"] == 1).any()) for item in items(data, 0))
    assert 15 <= with_foreground <= 45


@pytest.mark.parametrize("augment", [False, True])
def test_items_depend_on_seed_epoch_and_index_alone(tmp_path, augment):
    cases = [make_case(tmp_path, f"c{i}") for i in range(2)]
    data = TrainingData(cases, config(augment=augment, patch_size=(8,)))
    first = items(data, 0)
    fifth = items(data, 5)
    assert not equal(first, fifth)
    assert equal(fifth, items(data, 5, num_workers=2, multiprocessing_context="fork"))
    assert equal(fifth, items(TrainingData(cases, config(augment=augment, patch_size=(8,))), 5))
    np.random.seed(0)  # noqa: NPY002 - a stranger's global state must not matter
    torch.manual_seed(3)
    data.set_epoch(5)
    assert equal(fifth[::-1], [data[i] for i in reversed(range(len(data)))])
    assert not equal(fifth, items(TrainingData(cases, config(augment=augment, patch_size=(8,), seed=1)), 5))


def test_workers_that_stay_alive_follow_the_epoch(tmp_path):
    data = TrainingData([make_case(tmp_path)], config(patch_size=(8,)))
    loader = DataLoader(data, batch_size=None, num_workers=1, persistent_workers=True, multiprocessing_context="fork")
    for epoch in (0, 1):
        data.set_epoch(epoch)
        assert equal(list(loader), items(data, epoch))


def test_2d_trains_on_slices_and_on_flat_images(tmp_path):
    settings = config(spatial_dims=2, patch_size=(24, 12), patches_per_image=2)
    data = TrainingData([make_case(tmp_path, "v", (20, 18, 9)), make_case(tmp_path, "f", (30, 12))], settings)
    assert len(data) == (9 + 1) * 2
    assert all(item["image"].shape == (1, 24, 12) for item in items(data, 0))
    with pytest.raises(UserError, match="expected a 3D image for spatial_dims 3"):
        TrainingData([make_case(tmp_path, "f", (30, 12))], config())


def test_nothing_to_train_on_is_said(tmp_path):
    with pytest.raises(UserError, match="no case"):
        TrainingData([], config())
    with pytest.raises(UserError, match="c: has no label"):
        TrainingData([Case("c", make_case(tmp_path).images, None)], config())
    data = TrainingData([make_case(tmp_path)], config())
    with pytest.raises(IndexError):
        data[len(data)]


# Folds


def test_folds_hold_each_case_out_once_whatever_the_order():
    cases = [Case(f"c{i:02d}", (), None) for i in range(23)]
    held = []
    for fold in range(5):
        train, out = split_cases(cases, 5, fold, seed=3)
        assert not set(train) & set(out)
        assert len(train) + len(out) == 23
        assert len(out) in (4, 5)
        again = split_cases(cases[::-1], 5, fold, seed=3)
        assert set(again[1]) == set(out)
        assert again[1] == out[::-1]
        held += out
    assert sorted(held, key=lambda c: c.name) == cases
    assert split_cases(cases, 5, 0, seed=4)[1] != split_cases(cases, 5, 0, seed=3)[1]


def test_frames_of_a_patient_stay_together():
    cases = [Case(f"patient{i:03d}_frame{f:02d}", (), None) for i in range(1, 11) for f in (1, 12)]
    for fold in range(5):
        train, out = split_cases(cases, 5, fold, seed=0)
        assert len(out) == 4
        assert not {c.name[:10] for c in train} & {c.name[:10] for c in out}
    with pytest.raises(UserError, match="11 folds for 10 cases"):
        split_cases(cases, 11, 0, seed=0)
    with pytest.raises(ValueError, match="fold 5 of 5"):
        split_cases(cases, 5, 5, seed=0)


@pytest.mark.skipif(not HIPPOCAMPUS.is_dir(), reason="the hippocampus images are not beside this checkout")
def test_real_images_of_any_scale_become_patches():
    dataset = discover(HIPPOCAMPUS)
    cases = dataset.cases[::12]
    loaded = [load_case(case) for case in cases]
    assert all(abs(float(c.image.mean())) < 1e-4 and abs(float(c.image.std()) - 1) < 1e-3 for c in loaded)
    assert all(c.spacing == pytest.approx((1, 1, 1)) for c in loaded)
    for item in items(TrainingData(cases, config(patch_size=(48,), patches_per_image=1)), 0):
        assert item["image"].isfinite().all()
        assert set(item["label"].unique().tolist()) <= {0, 1, 2, IGNORE}
        assert (item["label"] == 1).any()


def plain_files(
    folder: Path, shape: tuple[int, ...], dtype: type | str, scale: float | None, channels: int = 1
) -> Case:
    """An uncompressed case, stored with a scale where one is given."""
    rng = np.random.default_rng(3)
    size = shape if channels == 1 else (*shape, channels)
    header = nib.Nifti1Header(endianness="<" if np.dtype(dtype).isnative else ">")
    image = nib.Nifti1Image(rng.integers(0, 200, size).astype(dtype), np.eye(4), header, dtype=dtype)
    if scale is not None:
        image.header.set_slope_inter(scale, 7)
    label = nib.Nifti1Image(rng.integers(0, 4, shape).astype(np.int16), np.eye(4))
    folder.mkdir()
    for name, stored in (("image.nii", image), ("label.nii", label)):
        stored.to_filename(folder / name)
    return Case(folder.name, (folder / "image.nii",), folder / "label.nii")


@pytest.mark.parametrize("dims", [2, 3])
def test_a_cache_gives_the_same_items(tmp_path, dims):
    """Compressed or not, larger and smaller than a patch, scaled, of other types: bit for bit what memory gives."""
    cases = [
        make_case(tmp_path, "a", (20, 18, 9)),
        make_case(tmp_path, "b", (9, 30, 12)),
        plain_files(tmp_path / "c", (20, 18, 17), np.uint8, None),
        plain_files(tmp_path / "d", (20, 18, 17), np.int16, 0.37),
        plain_files(tmp_path / "e", (20, 18, 17), ">i2", None),
        plain_files(tmp_path / "f", (20, 18, 1), np.float32, None),
    ]
    settings = config(spatial_dims=dims, patch_size=(16,), patches_per_image=3)
    expected = TrainingData(cases, settings, ignore_label=3)
    first = TrainingData(cases, settings, ignore_label=3, cache=tmp_path / "cache")
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").iterdir()}
    again = TrainingData(cases, settings, ignore_label=3, cache=tmp_path / "cache")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").iterdir()} == files
    mapped = sorted(p.name[0] for p in files if ".moments." in p.name)
    assert mapped == (["c", "d", "f"] if dims == 2 else ["c", "d"])  # e has no native order, f no 16 slices
    assert len(files) == 3 * len(mapped) + 4 * (len(cases) - len(mapped))
    for data in (first, again):
        assert data.channels == expected.channels
        assert len(data) == len(expected)
        for index in range(0, len(expected), 1 if dims == 3 else 5):
            for key, value in expected[index].items():
                assert torch.equal(data[index][key], value), key
    # A changed file is read again.
    image = cases[0].images[0]
    nib.save(nib.Nifti1Image(np.asarray(nib.load(image).dataobj) * 2 + 1, np.eye(4)), image)
    TrainingData(cases, settings, ignore_label=3, cache=tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == len(files) + 4


def test_channels_in_one_plain_file_are_mapped(tmp_path):
    case = plain_files(tmp_path / "c", (20, 18, 17), np.int16, None, channels=2)
    settings = config(patch_size=(16,), patches_per_image=4)
    expected, data = TrainingData([case], settings), TrainingData([case], settings, cache=tmp_path / "cache")
    assert list((tmp_path / "cache").glob("*.moments.npy"))
    for mine, theirs in zip(items(data, 1), items(expected, 1), strict=True):
        assert mine["image"].shape == (2, 16, 16, 16)
        assert equal([mine], [theirs])


@pytest.mark.parametrize("plain", [False, True])
def test_a_patch_from_disk_reads_no_more_than_itself(tmp_path, plain):
    """A volume of 2 GB, none of it on disk but holes: what a patch takes of it is far less."""
    case = plain_files(tmp_path / "p", (20, 18, 17), np.float32, None) if plain else make_case(tmp_path)
    data = TrainingData([case], config(patch_size=(16,), patches_per_image=1), cache=tmp_path / "cache")
    shape = (1024, 1024, 512)
    for part, dtype in (("image", np.float32), ("label", np.uint8)):
        if plain:
            header = nib.Nifti1Header()
            header.set_data_dtype(dtype)
            header.set_data_shape(shape)
            with (tmp_path / "p" / f"{part}.nii").open("wb") as file:
                header.write_to(file)
                file.truncate(352 + np.dtype(dtype).itemsize * np.prod(shape, dtype=int))
        else:
            path = next((tmp_path / "cache").glob(f"*.{part}.npy"))
            np.lib.format.open_memmap(path, "w+", dtype, (1, *shape))

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before, item = resident(), loading._loaded(data._items[0])
    patch = data._crop(item)
    assert tuple(patch["image"].shape) == (1, 16, 16, 16)
    assert resident() - before < 50e6
