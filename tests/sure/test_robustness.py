"""Severity sweeps: corruptions against independent formulas, files, determinism, and the same scores as evaluate's."""

from __future__ import annotations

import csv
import itertools
import json
import math

import numpy as np
import pytest
import torch
from monai.transforms import GaussianSmooth
from scipy import ndimage, stats
from scipy.interpolate import interpn
from sklearn.metrics import roc_auc_score
from tiny_run import make_run, write_data

import sure.evaluate
import sure.robustness
from sure.corruptions import CORRUPTIONS, seed_of
from sure.data import Case, load_case
from sure.errors import UserError
from sure.evaluate import evaluate
from sure.inference import infer
from sure.robustness import robustness

CHOSEN = ("gaussian_mean", "blur")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), 4)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(autouse=True)
def loaded(monkeypatch, run):
    for module in (sure.evaluate, sure.robustness):
        monkeypatch.setattr(module, "load_run", lambda path, **_: run)


@pytest.fixture(scope="module")
def swept(data, run, tmp_path_factory):
    out = tmp_path_factory.mktemp("robustness") / "rob"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sure.robustness, "load_run", lambda path, **_: run)
        report = robustness(run.path, data, out, corruptions=CHOSEN, cases="all", progress=False)
    return out, report


@pytest.fixture(scope="module")
def image():
    values = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(20, 16, 12)), 1.5)
    return torch.from_numpy((values - values.mean()) / values.std()).float()[None]


def difference(worse: torch.Tensor, image: torch.Tensor) -> float:
    """What no change of brightness and contrast explains: 1 - |correlation|."""
    return 1 - abs(float(np.corrcoef(worse.flatten(), image.flatten())[0, 1]))


class TestCorruptions:
    @pytest.mark.parametrize("name", CORRUPTIONS)
    def test_grow_and_repeat(self, image, name):
        corruption = CORRUPTIONS[name]
        before = image.clone()
        worse = [corruption(image, level, 3) for level in corruption.levels]
        assert torch.equal(image, before)
        for one, level in zip(worse, corruption.levels, strict=True):
            assert one.shape == image.shape
            assert one.dtype == torch.float32
            assert torch.equal(one, corruption(image, level, 3))
        if name == "gaussian_mean":  # levels share their noise field
            grown = [float((w - image).mean()) for w in worse]
        else:
            grown = [difference(w, image) for w in worse]
        assert grown[0] > 1e-4
        assert all(a < b for a, b in itertools.pairwise(grown)), grown

    @pytest.mark.parametrize("name", CORRUPTIONS)
    def test_shapes(self, name):
        corruption = CORRUPTIONS[name]
        for shape in ((1, 9, 8), (2, 9, 8, 7), (1, 5, 4, 1), (1, 9, 8, 2)):
            image = torch.randn(shape, generator=torch.Generator().manual_seed(0))
            for one, seed in itertools.product((image, torch.zeros(shape)), range(4)):
                worse = corruption(one, corruption.levels[2], seed)
                assert worse.shape == shape
                assert torch.isfinite(worse).all()

    @pytest.mark.parametrize("name", [n for n, c in CORRUPTIONS.items() if c.as_acquired])
    def test_acquired_images_are_normalised_again(self, image, name):
        corruption = CORRUPTIONS[name]
        worse = corruption(torch.cat([image, image.flip(1)]), corruption.levels[-1], 1).double()
        assert worse.mean((1, 2, 3)).numpy() == pytest.approx(np.zeros(2), abs=1e-5)
        assert worse.std((1, 2, 3), correction=0).numpy() == pytest.approx(np.ones(2), abs=1e-5)

    def test_published_noise(self, image):
        large = image.repeat(1, 4, 4, 4)
        one, two = (CORRUPTIONS["gaussian_mean"](large, mean, 5) for mean in (0.1, 0.9))
        noise = (one - large).double()
        assert float(noise.mean()) == pytest.approx(0.1, abs=0.3 * 4 / math.sqrt(noise.numel()))
        assert float(noise.std()) == pytest.approx(0.3, rel=0.01)
        assert (two - one).numpy() == pytest.approx(np.full(large.shape, 0.8), abs=1e-5)

    def test_blur(self, image):
        """MONAI's filter, away from the border; a constant stays one up to the border."""
        lifted = image - image.amin()
        blurred, other = CORRUPTIONS["blur"].apply(lifted, 1.0, 0), GaussianSmooth(1.0, approx="sampled")(lifted)
        inner = (0, *[slice(4, -4)] * 3)
        assert blurred[inner].numpy() == pytest.approx(other[inner].numpy(), abs=2e-3)
        assert CORRUPTIONS["blur"].apply(torch.ones(2, 6, 5, 4), 2.0, 0).numpy() == pytest.approx(1, abs=1e-6)

    def test_low_resolution_averages(self, image):
        coarse = CORRUPTIONS["low_resolution"].apply(image, 4.0, 0)[0].double().numpy()
        blocks = image[0].double().numpy().reshape(5, 4, 4, 4, 3, 4).mean((1, 3, 5))
        # linear interpolation between the blocks' centres, which lie half way between the two middle voxels
        at = [np.clip((np.arange(n) + 0.5) / 4 - 0.5, 0, n // 4 - 1) for n in image.shape[1:]]
        expected = interpn(
            [np.arange(n // 4) for n in image.shape[1:]], blocks, np.stack(np.meshgrid(*at, indexing="ij"), -1)
        )
        assert coarse == pytest.approx(expected, abs=1e-5)

    def test_contrast_and_bias_field(self, image):
        unit = (image - image.amin()) / (image.amax() - image.amin())
        gamma = stats.zscore(unit.double().numpy() ** 2.0, axis=None)
        assert CORRUPTIONS["contrast"](image, 2.0, 0).numpy() == pytest.approx(gamma, abs=1e-4)
        lifted = image - image.amin() + 1
        logs = [torch.log(CORRUPTIONS["bias_field"].apply(lifted, level, 3) / lifted) for level in (0.1, 0.4)]
        assert logs[1].numpy() == pytest.approx(4 * logs[0].numpy(), abs=1e-4)  # the same field, four times as strong
        axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in image.shape[1:]), indexing="ij")
        powers = [p for p in itertools.product(range(4), repeat=3) if sum(p) <= 3]
        terms = np.stack([np.prod([a**k for a, k in zip(axes, p, strict=True)], 0).ravel() for p in powers], 1)
        rest = np.linalg.lstsq(terms, logs[1].double().numpy().ravel(), rcond=None)[1]
        assert float(rest[0]) < 1e-6  # a polynomial of degree 3

    def test_rician_noise(self, image):
        level, lifted = 0.8, image - image.amin()
        # MONAI draws once more, whether to act at all
        rng = np.random.RandomState(7)
        rng.rand()
        real, imaginary = (rng.normal(0, level, image.shape).astype(np.float32) for _ in range(2))
        expected = stats.zscore(np.hypot(lifted.numpy() + real, imaginary), axis=None)
        assert CORRUPTIONS["rician"](image, level, 7).numpy() == pytest.approx(expected, abs=1e-4)

    def test_ghosts_are_a_modulation_of_k_space(self, image):
        level = 0.6
        found = CORRUPTIONS["ghosts"](image, level, 2)
        matches = []
        for axis in range(3):
            n = image.shape[axis + 1]
            weight = 1 + level * np.cos(2 * np.pi * np.arange(n) * round(n / 4) / n)
            shape = [n if a == axis else 1 for a in range(3)]
            spectrum = np.fft.fftn((image - image.amin())[0].double().numpy()) * weight.reshape(shape)
            expected = stats.zscore(np.fft.ifftn(spectrum).real, axis=None)
            matches.append(np.abs(found[0].numpy() - expected).max() < 1e-4)
        assert sum(matches) == 1

    def test_spike_is_a_wave_of_that_amplitude(self, image):
        corruption = CORRUPTIONS["spikes"]
        wave = (corruption.apply(image, 1.5, 4) - image)[0].double().numpy()
        spectrum = np.abs(np.fft.fftn(wave)) / wave.size
        assert np.count_nonzero(spectrum > 0.05) == 2  # a frequency and its mirror image
        assert 2 * spectrum.max() == pytest.approx(1.5, abs=0.1)

    def test_seeds(self):
        seeds = {seed_of(s, case, name) for s in (0, 1) for case in ("a", "b") for name in ("blur", "rician")}
        assert len(seeds) == 8
        assert all(0 <= s < 2**32 for s in seeds)
        assert seed_of(0, "a", "blur") == seed_of(0, "a", "blur")


def test_files(swept):
    out, report = swept
    assert sorted(p.name for p in out.iterdir()) == ["robustness.csv", "robustness.json"]
    stored = json.loads((out / "robustness.json").read_text(), parse_constant=lambda n: pytest.fail(n))
    assert stored == report
    assert stored["kind"] == "sure robustness"
    assert [c["name"] for c in stored["corruptions"]] == list(CHOSEN)
    metrics = list(stored["clean"]["cases"][0])
    for corruption in stored["corruptions"]:
        assert [level["level"] for level in corruption["levels"]] == list(CORRUPTIONS[corruption["name"]].levels)
        for level in corruption["levels"]:
            assert all(list(row) == metrics for row in level["cases"])
            assert list(level["summary"]) == metrics[1:]
            for row in level["cases"]:
                missing = {key for key, value in row.items() if value is None}
                assert missing == level["undefined"][row["name"]].keys()
    with (out / "robustness.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * (1 + 5 + 5)
    assert rows[0]["corruption"] == "clean"
    assert rows[0]["level"] == ""
    assert float(rows[-1]["dice"]) == stored["corruptions"][1]["levels"][-1]["cases"][-1]["dice"]


def test_clean_rows_are_those_of_evaluate(data, run, swept, tmp_path):
    evaluated = evaluate(run.path, data, tmp_path / "eval", cases="all", pictures=0, progress=False)
    assert evaluated["cases"] == swept[1]["clean"]["cases"]
    assert evaluated["summary"] == swept[1]["clean"]["summary"]


def test_levels_against_scipy_and_sklearn(data, run, swept):
    """UCC_d, UR_d, the noise response and the detection of a level, from the maps anew."""
    report = swept[1]
    case = load_case(Case("case_1", (data / "images/case_1.nii.gz",), data / "labels/case_1.nii.gz"))
    truth = case.label[0].numpy()
    edges = np.zeros(truth.shape, bool)
    for k in (1, 2):
        inside = (truth == k).astype(np.uint8)
        edges |= ndimage.maximum_filter(inside, 3) != ndimage.minimum_filter(inside, 3)
    distance = ndimage.distance_transform_edt(~edges)
    near = distance <= 4
    seed = seed_of(0, "case_1", "gaussian_mean")
    images = [case.image, *(CORRUPTIONS["gaussian_mean"](case.image, m, seed) for m in (0.1, 0.3, 0.5))]
    u = [infer(run, x[None]).uncertainty[0].double().numpy() for x in images]
    row = report["corruptions"][0]["levels"][2]["cases"][1]
    assert row["name"] == "case_1"
    rise = (infer(run, images[3][None]).uncertainty - infer(run, images[0][None]).uncertainty)[0].numpy()[near]
    assert row["ucc_d"] == pytest.approx(stats.spearmanr(rise, distance[near]).statistic, abs=1e-6)
    pairs = np.sign(np.subtract.outer(rise, rise)) * np.sign(np.subtract.outer(distance[near], distance[near]))
    assert row["ur_d"] == pytest.approx((pairs < 0).sum() / (pairs != 0).sum(), abs=1e-9)
    assert row["noise_share"] == pytest.approx((u[3] > u[2])[near].mean())
    ranks = stats.rankdata(np.stack([m[near] for m in u]), axis=0)
    per_voxel = [stats.pearsonr(column, np.arange(4)).statistic for column in ranks.T]
    assert row["noise_correlation"] == pytest.approx(np.mean(per_voxel), abs=1e-6)
    first = report["corruptions"][0]["levels"][0]["undefined"]["case_1"]
    assert first["noise_correlation"] == "fewer than three levels"
    response = report["noise_response"]["gaussian_mean"]
    assert response["levels"] == [0, 0.1, 0.3, 0.5, 0.7, 0.9]
    assert len(response["share"]) == 5

    level = report["corruptions"][0]["levels"][4]
    clean, worse = (
        [row["uncertainty_boundary_predicted"] for row in rows] for rows in (report["clean"]["cases"], level["cases"])
    )
    assert level["detection_auroc"] == pytest.approx(roc_auc_score([0] * 4 + [1] * 4, [*clean, *worse]))
    assert level["detection_volumes"] == [4, 4]


def test_results_do_not_depend_on_company(data, run, swept, tmp_path):
    alone = robustness(
        run.path, data, tmp_path / "rob", corruptions=["gaussian_mean"], levels=[0.3], cases="all", progress=False
    )
    together = swept[1]["corruptions"][0]["levels"][1]["cases"]
    for one, other in zip(alone["corruptions"][0]["levels"][0]["cases"], together, strict=True):
        # those two look back on the levels before
        assert {k: v for k, v in one.items() if not k.startswith("noise_")} == {
            k: v for k, v in other.items() if not k.startswith("noise_")
        }
    other_seed = robustness(
        run.path, data, tmp_path / "rob", corruptions=["gaussian_mean"], levels=[0.3], seed=1, progress=False
    )
    assert other_seed["corruptions"][0]["levels"][0]["cases"][0] != together[0]
    assert [p.name for p in tmp_path.iterdir()] == ["rob"]


def test_bad_arguments(data, run, tmp_path):
    out = tmp_path / "rob"
    with pytest.raises(UserError, match=r"corruptions: expected different names among .*, got fog"):
        robustness(run.path, data, out, corruptions=["fog"], progress=False)
    with pytest.raises(UserError, match="levels: expected one corruption with levels of your own"):
        robustness(run.path, data, out, levels=[0.1], progress=False)
    for levels in ([0.3, 0.1], [0.0], [0.5, 1.0], [math.nan], []):
        with pytest.raises(UserError, match="levels: expected growing numbers above 0 and below 1 for gibbs"):
            robustness(run.path, data, out, corruptions=["gibbs"], levels=levels, progress=False)
    with pytest.raises(UserError, match=r"levels: 100000 of bias_field is more than float32 holds \(case_0\)"):
        robustness(run.path, data, out, corruptions=["bias_field"], levels=[1e5], progress=False)
    assert not out.exists()
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something else than an earlier robustness"):
        robustness(run.path, data, out, corruptions=["blur"], progress=False)
    assert [p.name for p in out.iterdir()] == ["notes.txt"]


def test_detection_of_volumes_without_a_boundary(monkeypatch, run, tmp_path):
    """A run that predicts background alone has no boundary to measure on: undefined, and said so."""
    root = write_data(tmp_path / "data", 1)

    def nothing(run, image):
        result = infer(run, image)
        certain = torch.zeros_like(result.probability)
        certain[0] = 1
        return result._replace(probability=certain, label=torch.zeros_like(result.label))

    monkeypatch.setattr(sure.robustness, "infer", nothing)
    report = robustness(run.path, root, tmp_path / "rob", corruptions=["blur"], levels=[1.0], progress=False)
    level = report["corruptions"][0]["levels"][0]
    assert level["detection_auroc"] is None
    assert level["detection_volumes"] == [0, 0]
    reason = level["undefined"]["case_0"]["uncertainty_boundary_predicted"]
    assert reason == "the prediction has no boundary"


def test_2d_run_on_volumes(data, tmp_path, monkeypatch):
    flat = make_run(tmp_path / "run", dims=2)
    monkeypatch.setattr(sure.robustness, "load_run", lambda path, **_: flat)
    report = robustness(flat.path, data, tmp_path / "rob", corruptions=["ghosts"], levels=[0.4], progress=False)
    assert report["run"]["spatial_dims"] == 2
    assert len(report["corruptions"][0]["levels"][0]["cases"]) == 2
