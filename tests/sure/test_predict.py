"""Sliding-window inference, and prediction from files to files."""

from __future__ import annotations

import math
import shutil
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data.utils import compute_importance_map
from monai.inferers import sliding_window_inference
from tiny_run import AFFINE, SHAPE, make_run, write_case, write_data
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import sure.predict
import sure_kernels as sk
from sure import inference
from sure.errors import UserError
from sure.inference import infer
from sure.predict import collect_cases, predict


class Constant(nn.Module):
    """The same logits at every voxel."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, x):
        shape = (1, -1, *[1] * (x.ndim - 2))
        return self.logits.view(shape).expand(x.shape[0], -1, *x.shape[2:])


class Position(nn.Module):
    """Logits that grow with the place in the window, so that windows disagree where they overlap."""

    def forward(self, x):
        ramp = torch.linspace(-3, 3, x.shape[2]).view(1, 1, -1, 1, 1).expand(x.shape[0], 1, *x.shape[2:])
        return torch.cat([ramp, -ramp, x], 1)


@pytest.fixture
def use_run(monkeypatch, tmp_path):
    """Let `predict` load a run of our making."""

    def use(**options):
        run = make_run(tmp_path / "run", **options)
        monkeypatch.setattr(sure.predict, "load_run", lambda path, **_: run)
        return run

    return use


class TestInfer:
    def test_no_tensor_holds_all_classes_of_a_volume(self, tmp_path):
        """The largest are the ring of sums, as many planes as a window is wide, and a batch of windows."""

        class Largest(TorchDispatchMode):
            numel = 0

            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                out = func(*args, **(kwargs or {}))
                for x in pytree.tree_leaves(out):
                    self.numel = max(self.numel, x.numel() if isinstance(x, torch.Tensor) else 0)
                return out

        run, plane = make_run(tmp_path), 24 * 20
        image = torch.randn((1, 1, 40, 24, 20))
        with Largest() as seen:
            planes = sum(len(slab.label) for _, slab in inference.infer_slabs(run, image))
        assert planes == 40
        assert seen.numel == max(3 * 16 * plane, 2 * 3 * 16**3) < 3 * 40 * plane / 2

    @pytest.mark.parametrize("loss", ["edl", "dice_ce"])
    @pytest.mark.parametrize("shape", [SHAPE, (16, 16, 16), (41, 16, 30), (7, 33, 9), (57, 40, 33)])
    def test_slabs_are_monais_sliding_windows(self, tmp_path, loss, shape):
        """Blended all at once by MONAI, whatever the image's size is to a window's."""
        run = make_run(tmp_path, loss=loss)
        image = torch.randn((1, 1, *shape), generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            blend = sliding_window_inference(
                image, (16,) * 3, 2, partial(inference._window, run), overlap=inference.OVERLAP, mode="gaussian"
            )
        if loss == "edl":
            expected = sk.reference.dirichlet_uncertainty(blend, evidence="relu")
            probability, uncertainty = expected.probability[0], expected.vacuity[0]
        else:
            probability, uncertainty = blend[0], torch.special.entr(blend).sum(1) / math.log(3)
        found = infer(run, image)
        torch.testing.assert_close(found.probability, probability, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.uncertainty, uncertainty, rtol=1e-5, atol=1e-6)
        assert torch.equal(found.label, found.probability.argmax(0).to(torch.uint8))
        planes = [part[0] for part, _ in inference.infer_slabs(run, image)]
        assert [p.start for p in planes] == [0, *(p.stop for p in planes[:-1])]
        assert planes[-1].stop == shape[0]
        assert max(p.stop - p.start for p in planes) <= inference.PLANES

    @pytest.mark.parametrize("prior", [(1.0,), (2.0, 0.5, 1.0)])
    @pytest.mark.parametrize("evidence", ["softplus", "relu", "exp"])
    def test_constant_logits_give_the_formula(self, tmp_path, prior, evidence):
        run = make_run(tmp_path, prior=prior, evidence=evidence)
        run.model = Constant([-1.0, 0.5, 12.0])
        e = {
            "softplus": lambda z: math.log1p(math.exp(z)),
            "relu": lambda z: max(z, 0),
            "exp": lambda z: math.exp(min(z, 10)),
        }[evidence]
        weights = prior * 3 if len(prior) == 1 else prior
        alpha = [e(z) + b for z, b in zip([-1.0, 0.5, 12.0], weights, strict=True)]
        result = infer(run, torch.randn(1, 1, *SHAPE))
        assert result.probability.shape == (3, *SHAPE)
        assert result.uncertainty.shape == (1, *SHAPE)
        assert result.label.shape == SHAPE
        for k in range(3):
            expected = torch.full(SHAPE, alpha[k] / sum(alpha))
            torch.testing.assert_close(result.probability[k], expected, rtol=1e-5, atol=1e-7)
        expected = torch.full((1, *SHAPE), sum(weights) / sum(alpha))
        torch.testing.assert_close(result.uncertainty, expected, rtol=1e-5, atol=1e-7)
        assert (result.label == 2).all()

    def test_windows_blend_evidence_not_logits(self, tmp_path):
        run = make_run(tmp_path)
        run.model = nn.Sequential(Position())
        run.model.register_parameter("device", nn.Parameter(torch.zeros(1)))
        image = torch.zeros(1, 1, 24, 16, 16)  # two windows, overlapping by half along the first axis
        result = infer(run, image)
        evidence = torch.nn.functional.softplus
        x = torch.linspace(-3, 3, 16)
        weight = compute_importance_map((16, 16, 16), mode="gaussian", sigma_scale=0.125)[:, 8, 8]
        total, norm = torch.zeros(2, 24), torch.zeros(24)
        for start in (0, 8):
            place = slice(start, start + 16)
            total[:, place] += weight * evidence(torch.stack([x, -x]))
            norm[place] += weight
        alpha = torch.cat([total / norm, torch.full((1, 24), math.log(2))]) + 1
        expected = 3 / alpha.sum(0)
        torch.testing.assert_close(result.uncertainty[0, :, 8, 8], expected, rtol=1e-5, atol=0)

    def test_dice_ce_uses_entropy(self, tmp_path):
        run = make_run(tmp_path, loss="dice_ce")
        run.model = Constant([0.0, 0.0, 0.0])
        result = infer(run, torch.randn(1, 1, *SHAPE))
        torch.testing.assert_close(result.uncertainty, torch.ones(1, *SHAPE))
        assert (result.uncertainty <= 1).all()

    def test_2d_run_reads_a_volume_by_slices(self, tmp_path):
        run = make_run(tmp_path, dims=2)
        image = torch.randn(1, 1, *SHAPE)
        whole = infer(run, image)
        assert whole.label.shape == SHAPE
        one = infer(run, image[..., 5])
        torch.testing.assert_close(whole.probability[..., 5], one.probability)
        torch.testing.assert_close(whole.uncertainty[..., 5], one.uncertainty)

    def test_small_images_and_repeatability(self, tmp_path):
        run = make_run(tmp_path)
        image = torch.randn(1, 1, 7, 30, 5)
        first, second = infer(run, image), infer(run, image)
        assert first.label.shape == (7, 30, 5)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        torch.testing.assert_close(first.probability.sum(0), torch.ones(7, 30, 5))
        assert ((first.uncertainty > 0) & (first.uncertainty <= 1)).all()

    def test_errors(self, tmp_path):
        run = make_run(tmp_path, channels=2)
        with pytest.raises(UserError, match=r"expected shape \(1, 2, \*spatial\)"):
            infer(run, torch.zeros(1, 1, *SHAPE))
        with pytest.raises(UserError, match="a 3D run cannot read 2 spatial axes"):
            infer(run, torch.zeros(1, 2, 8, 8))


class TestFiles:
    @pytest.mark.parametrize("dims", [2, 3])
    def test_geometry_is_the_images(self, use_run, tmp_path, dims):
        use_run(dims=dims)
        image, _ = write_case(tmp_path / "data", "knee", 3)
        before = image.read_bytes()
        written = predict(tmp_path / "run", [image], tmp_path / "out", progress=False)
        assert [p.name for p in written] == ["knee_seg.nii.gz", "knee_unc.nii.gz"]
        assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["knee_seg.nii.gz", "knee_unc.nii.gz"]
        assert image.read_bytes() == before
        source = nib.load(image)
        for path, dtype in zip(written, (np.uint8, np.float32), strict=True):
            result = nib.load(path)
            assert result.shape == source.shape == SHAPE
            assert result.get_data_dtype() == dtype
            np.testing.assert_array_equal(result.affine, source.affine)
            for form in ("get_sform", "get_qform"):
                for mine, theirs in zip(
                    getattr(result, form)(coded=True), getattr(source, form)(coded=True), strict=True
                ):
                    np.testing.assert_array_equal(mine, theirs)
            np.testing.assert_array_equal(result.header.get_zooms(), source.header.get_zooms())
            assert result.header.get_xyzt_units() == source.header.get_xyzt_units()
        labels, uncertainty = (np.asarray(nib.load(p).dataobj) for p in written)
        assert set(np.unique(labels)) <= {0, 1, 2}
        assert uncertainty.min() > 0
        assert uncertainty.max() <= 1

    def test_folder_and_data_root(self, use_run, tmp_path):
        use_run()
        root = write_data(tmp_path / "data", 2)
        for i, source in enumerate((root, root / "images")):
            written = predict(tmp_path / "run", [source], tmp_path / f"out{i}", progress=False)
            assert [p.name.split("_seg")[0] for p in written[::2]] == ["case_0", "case_1"]

    def test_channels_by_name(self, use_run, tmp_path):
        use_run(channels=2)
        image, _ = write_case(tmp_path / "data", "a", 1)
        folder = tmp_path / "in"
        folder.mkdir()
        for channel in range(2):
            shutil.copy(image, folder / f"brain_{channel:04d}.nii.gz")
        written = predict(tmp_path / "run", [folder], tmp_path / "out", progress=False)
        assert written[0].name == "brain_seg.nii.gz"
        (folder / "brain_0001.nii.gz").unlink()
        with pytest.raises(UserError, match=r"brain .*expected 2 image channels, found 1"):
            predict(tmp_path / "run", [folder], tmp_path / "none", progress=False)
        assert not (tmp_path / "none").exists()

    def test_single_channel_suffix_is_dropped(self, tmp_path):
        image, _ = write_case(tmp_path / "data", "a_0000", 1)
        assert [case.name for case in collect_cases([image], 1)] == ["a"]

    def test_numbers_of_cases_are_no_channels(self, use_run, tmp_path):
        use_run()
        for i in (0, 1, 2):
            write_case(tmp_path / "data", f"amos_000{i}", i)
        folder = tmp_path / "data" / "images"
        written = predict(tmp_path / "run", [folder], tmp_path / "out", progress=False)
        assert [p.name for p in written[::2]] == [f"amos_000{i}_seg.nii.gz" for i in (0, 1, 2)]
        for i in (0, 2):
            assert collect_cases([folder / f"amos_000{i}.nii.gz"], 1)[0].name == f"amos_000{i}"

    def test_channels_have_no_gaps(self, use_run, tmp_path):
        use_run(channels=2)
        folder = tmp_path / "data" / "images"
        for i in (1, 2):
            write_case(tmp_path / "data", f"brain_000{i}", i)
        with pytest.raises(UserError, match="expected channels of brain from 0000 on, found 0001, 0002"):
            predict(tmp_path / "run", [folder], tmp_path / "none", progress=False)
        assert not (tmp_path / "none").exists()

    def test_a_file_that_holds_all_channels_is_a_case(self, use_run, tmp_path):
        use_run(channels=2)
        folder = tmp_path / "in"
        folder.mkdir()
        for i in (2, 3):
            values = np.random.default_rng(i).normal(size=(*SHAPE, 2)).astype(np.float32)
            nib.save(nib.Nifti1Image(values, AFFINE), folder / f"case_000{i}.nii.gz")
        for given in ([folder], [folder / "case_0003.nii.gz"]):
            written = predict(tmp_path / "run", given, tmp_path / "out", progress=False)
            assert written[-1].name == "case_0003_unc.nii.gz"
            assert len(written) == 4 - 2 * (given[0] != folder)

    def test_beside_a_named_file_while_folders_are_read(self, use_run, tmp_path):
        use_run()
        root = write_data(tmp_path / "data", 1)
        image, _ = write_case(tmp_path / "other", "b", 3)
        assert len(predict(tmp_path / "run", [root, image], image.parent, progress=False)) == 4

    def test_every_fault_in_one_table(self, use_run, tmp_path):
        use_run()
        good, _ = write_case(tmp_path / "data", "good", 1)
        truncated, _ = write_case(tmp_path / "data", "short", 2)
        truncated.write_bytes(truncated.read_bytes()[:900])
        array = np.zeros(SHAPE, np.float32)
        array[1, 2, 3] = np.nan
        holes = tmp_path / "holes.nii"
        nib.save(nib.Nifti1Image(array, AFFINE), holes)
        flat = tmp_path / "flat.nii"
        nib.save(nib.Nifti1Image(array[:, :, 0], AFFINE), flat)
        twin, _ = write_case(tmp_path / "other", "good", 1)
        with pytest.raises(UserError) as raised:
            predict(tmp_path / "run", [good, truncated, holes, flat, twin], tmp_path / "out", progress=False)
        text = str(raised.value)
        for expected in ("truncated", "NaN", "2D image", "would write the same files as"):
            assert expected in text
        for path in (truncated, holes, flat, twin):
            assert str(path) in text
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("out", ["data", "data/images"])
    @pytest.mark.parametrize("source", ["data", "data/images"])
    def test_never_writes_among_images_that_are_read(self, use_run, tmp_path, source, out):
        """The next run over that folder would take the results for images."""
        use_run()
        root = write_data(tmp_path / "data", 2)
        before = sorted(root.rglob("*"))
        if (source, out) == ("data/images", "data"):
            assert predict(tmp_path / "run", [tmp_path / source], tmp_path / out, progress=False)
            return
        with pytest.raises(UserError, match="the results would lie among the images"):
            predict(tmp_path / "run", [tmp_path / source], tmp_path / out, progress=False)
        assert sorted(root.rglob("*")) == before

    def test_a_file_may_have_its_results_beside_it(self, use_run, tmp_path):
        use_run()
        image, _ = write_case(tmp_path / "data", "a", 1)
        assert predict(tmp_path / "run", [image], image.parent, progress=False)[0].parent == image.parent

    def test_never_replaces_an_input(self, use_run, tmp_path):
        use_run()
        folder = tmp_path / "data" / "images"
        write_case(tmp_path / "data", "a", 1)
        trap, _ = write_case(tmp_path / "data", "a_seg", 1)
        before = trap.read_bytes()
        with pytest.raises(UserError, match="would replace an input"):
            predict(tmp_path / "run", [folder], folder, progress=False)
        assert trap.read_bytes() == before
        assert len(list(folder.iterdir())) == 2

    @pytest.mark.parametrize("name", ["missing.nii.gz", "notes.txt", "empty"])
    def test_inputs_that_are_no_images(self, use_run, tmp_path, name):
        use_run()
        (tmp_path / "notes.txt").write_text("x")
        (tmp_path / "empty").mkdir()
        with pytest.raises(UserError, match=name):
            predict(tmp_path / "run", [tmp_path / name], tmp_path / "out", progress=False)

    def test_out_is_a_file(self, use_run, tmp_path):
        use_run()
        image, _ = write_case(tmp_path / "data", "a", 1)
        target = tmp_path / "out"
        target.write_text("mine")
        with pytest.raises(UserError, match="expected a folder, found a file"):
            predict(Path("run"), [image], target, progress=False)
        assert target.read_text() == "mine"
