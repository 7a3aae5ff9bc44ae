"""The losses inside plain PyTorch, a MONAI bundle and nnU-Net: each example is run."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import sure_kernels as sk
from sure.config import TrainConfig
from sure.data import write_phantoms
from sure.integrations.deep_supervision import SUPERVISION, DeepSupervision
from sure.objective import build_objective

ROOT = Path(__file__).parents[2]


def run(*command: str, **options) -> str:
    """What the command says; its end must be good."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | options.pop("env", {})
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment, **options)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def needed(*modules: str) -> pytest.MarkDecorator:
    missing = [m for m in modules if importlib.util.find_spec(m) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def test_plain_pytorch():
    lines = run(sys.executable, str(ROOT / "examples" / "plain_pytorch.py")).splitlines()
    losses = [float(line.split()[-1]) for line in lines if line.startswith("epoch")]
    assert len(losses) == 10
    assert losses[2] < losses[0]  # before supervision sets in
    assert losses[9] < losses[4]


@needed("fire", "ignite")
def test_monai_bundle(tmp_path):
    data = write_phantoms(tmp_path / "data", cases=5, shape=(20, 18, 16))
    shutil.copytree(ROOT / "bundle", tmp_path / "bundle")
    said = run(
        *(sys.executable, "-m", "monai.bundle", "run", "--bundle_root", "bundle"),
        *("--config_file", "bundle/configs/train.yaml", "--dataset_dir", str(data), "--epochs", "2"),
        *("--patch_size", "[16,16,16]", "--batch_size", "2", "--num_held_out", "1"),
        cwd=tmp_path,
    )
    assert "Epoch: 2/2, Iter: 2/2 -- loss" in said
    assert "mean_dice" in said
    for name in ("best", "final"):
        weights = torch.load(tmp_path / "runs" / "bundle" / f"{name}.pt", weights_only=True)
        assert all(bool(torch.isfinite(v).all()) for v in weights.values())


def test_bundle_metadata():
    metadata = json.loads((ROOT / "bundle" / "configs" / "metadata.json").read_text())
    assert {"version", "monai_version", "task", "network_data_format"} <= metadata.keys()


@needed("nnunetv2")
@pytest.mark.slow
def test_nnunet(tmp_path):
    """Planned, preprocessed and trained on the phantoms by nnU-Net's own commands, with voxels to ignore."""
    import nibabel as nib
    import numpy as np

    data = write_phantoms(tmp_path / "phantoms", cases=6, shape=(32, 32, 32))
    raw = tmp_path / "raw" / "Dataset001_Phantoms"
    for folder in ("imagesTr", "labelsTr"):
        (raw / folder).mkdir(parents=True)
    described = json.loads((data / "dataset.json").read_text())
    names = [Path(case["image"]).name.removesuffix(".nii.gz") for case in described["training"]]
    for name in names:
        shutil.copy(data / "imagesTr" / f"{name}.nii.gz", raw / "imagesTr" / f"{name}_0000.nii.gz")
        label = nib.load(data / "labelsTr" / f"{name}.nii.gz")
        values = np.asarray(label.dataobj).astype(np.uint8)
        values[0] = 4
        nib.save(nib.Nifti1Image(values, label.affine), raw / "labelsTr" / f"{name}.nii.gz")
    labels = {"background": 0, "right": 1, "wall": 2, "left": 3, "ignore": 4}
    described = {"channel_names": {"0": "MRI"}, "labels": labels, "numTraining": len(names), "file_ending": ".nii.gz"}
    (raw / "dataset.json").write_text(json.dumps(described))
    folders = {"raw": "raw", "preprocessed": "pre", "results": "results"}
    environment = {f"nnUNet_{key}": str(tmp_path / value) for key, value in folders.items()}
    environment |= {"nnUNet_extTrainer": str(ROOT / "sure" / "integrations"), "nnUNet_n_proc_DA": "1"}
    entry = "import sys; from nnunetv2.{} import {} as f; sys.exit(f())"
    plan = entry.format("experiment_planning.plan_and_preprocess_entrypoints", "plan_and_preprocess_entry")
    options = {"env": environment, "cwd": tmp_path}
    run(sys.executable, "-c", plan, "-d", "1", "-c", "3d_fullres", "-np", "1", "-npfp", "1", **options)
    train = entry.format("run.run_training", "run_training_entry")
    arguments = ("1", "3d_fullres", "0", "-tr", "nnUNetTrainerSURE_trial", "-device", "cpu")
    said = run(sys.executable, "-c", train, *arguments, **options)
    assert said.count("train_loss") == 2
    assert "nan" not in said.lower()
    assert list((tmp_path / "results").rglob("checkpoint_final.pth"))


class TestDeepSupervision:
    def outputs(self):
        g = torch.Generator().manual_seed(0)
        sizes = (8, 4, 2)
        logits = [torch.randn((2, 3, n, n, n), generator=g, requires_grad=True) for n in sizes]
        labels = [torch.randint(0, 4, (2, 1, n, n, n), generator=g).float() for n in sizes]
        return logits, labels, torch.randn((2, 1, 8, 8, 8), generator=g)

    def test_sum_of_resolutions(self):
        """Supervised at the finest, evidential at the next, the coarsest left out; label 3 is ignored."""
        logits, labels, image = self.outputs()
        options = {"ignore_index": 3, "include_background": False, "far": 1.0, "near": 1.0, "gradient_weight": 50.0}
        loss = DeepSupervision([0.6, 0.4, 0.0], **options)
        loss.set_epoch(80)
        with loss.seeing(image):
            value = loss(logits, labels)
        value.backward()
        alone = [sk.SURELoss(**options), sk.SURELoss(**{**options, "gradient_weight": 0.0, "far_weight": 0.0})]
        for part in alone:
            part.set_epoch(80)
        expected = 0.6 * alone[0](logits[0], labels[0].long(), image=image) + 0.4 * alone[1](
            logits[1], labels[1].long()
        )
        torch.testing.assert_close(value, expected)
        assert logits[2].grad is None
        for z, y in zip(logits[:2], labels, strict=False):
            assert bool((z.grad[(y == 3).expand_as(z)] == 0).all())
            assert bool((z.grad != 0).any())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.int16, torch.uint8])
    def test_one_output(self, dtype):
        logits, labels, image = self.outputs()
        loss = DeepSupervision([1.0, 0.5], ignore_index=3)
        expected = sk.SURELoss(ignore_index=3)(logits[0], labels[0].long(), image=image)
        with loss.seeing(image):
            torch.testing.assert_close(loss(logits[0], labels[0].to(dtype)), expected)

    def test_weights_of_any_kind(self):
        expected = DeepSupervision([0.5, 0.5]).weights
        for given in (np.array([0.5, 0.5]), torch.tensor([0.5, 0.5]), (w for w in (0.5, 0.5))):
            assert DeepSupervision(given).weights == expected
        logits, labels, _ = self.outputs()
        assert DeepSupervision([0.0, 1.0], ignore_index=3)(logits[:2], labels[:2]).item() > 0

    def test_without_supervision_no_image_is_needed(self):
        logits, labels, _ = self.outputs()
        loss = DeepSupervision([1.0], ignore_index=3, gradient_weight=0.0, far_weight=0.0)
        loss.set_epoch(90)
        assert float(loss(logits[0], labels[0])) > 0

    def test_supervision_is_that_of_sure_train(self):
        """nnU-Net's trainer takes it from here; the bundle's configuration has it in numbers."""
        loss = build_objective(TrainConfig()).loss
        alike = sk.SURELoss(**SUPERVISION)
        for name in ("supervision", "margin", "boundary", "near", "far"):
            assert alike.supervision_options[name] == loss.supervision_options[name], name
        assert (alike.gradient_weight, alike.far_weight) == (loss.gradient_weight, loss.far_weight)
        bundled = yaml.safe_load((ROOT / "bundle" / "configs" / "train.yaml").read_text())["loss"]
        assert {name: bundled[name] for name in SUPERVISION} == SUPERVISION

    def test_mistakes_are_named(self):
        logits, labels, image = self.outputs()
        loss = DeepSupervision([1, 1, 1])
        with pytest.raises(ValueError, match="output, target: expected as many of each, up to 3, got 3 and 2"):
            loss(logits, labels[:2])
        with pytest.raises(ValueError, match="return_terms: expected False"):
            DeepSupervision([1.0], return_terms=True)
        loss = DeepSupervision([1.0])
        with pytest.raises(TypeError, match="image: expected calls within"):
            loss(logits[0], labels[0].clamp(max=2))
        for wrong in (0.5, float("nan")):
            labels[0][0, 0, 0, 0, 0] = wrong
            message = f"target: expected whole numbers, got {wrong} and the like in 1 voxels"
            with loss.seeing(image), pytest.raises(ValueError, match=message):
                loss(logits[0], labels[0])

    @pytest.mark.parametrize(
        ("weights", "error"),
        [
            *((wrong, TypeError) for wrong in (1.0, "a", ["a"])),
            *((wrong, ValueError) for wrong in ([], [-1.0], [0.0], [float("nan")])),
        ],
    )
    def test_weights_are_checked(self, weights, error):
        with pytest.raises(error, match="weights: expected"):
            DeepSupervision(weights)
