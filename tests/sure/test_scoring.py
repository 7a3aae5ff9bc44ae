"""Scores of one case: distances against MONAI's own metrics, and cases where there is little or nothing to score."""

from __future__ import annotations

import math
import warnings

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance
from sklearn.metrics import log_loss, roc_auc_score
from tiny_run import AFFINE, CLASSES, make_run

from sure.corruptions import CORRUPTIONS, seed_of
from sure.data import IGNORE, EvaluationCase
from sure.evaluate import noise_maps, noise_response
from sure.inference import Inference, infer
from sure.results import summarise
from sure.scoring import BOUNDARY, REACH, CaseScorer, _distances, joined, pooled, risk_coverage
from sure_kernels.metrics import calibration_error_detection

SHAPE = (9, 10, 8)
ONE_PASS = ("error_rate", "ece", "ace", "brier", "nll", "ueo", "auroc", "auprc", "aurc")
RANKS = ("ucc_g", "ur_g", "ucc_g_official", "ur_g_official")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


def blocks(shift: int = 0) -> torch.Tensor:
    """Labels (1, *SHAPE) of two boxes, moved along the first axis."""
    label = torch.zeros(1, *SHAPE, dtype=torch.int16)
    label[0, 1 + shift : 5 + shift, 2:8, 2:6] = 1
    label[0, 2 + shift : 4 + shift, 3:6, 3:5] = 2
    return label


def case_of(label: torch.Tensor) -> EvaluationCase:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(label.shape, generator=generator)
    return EvaluationCase("a", image, label, AFFINE, nib.Nifti1Header())


def said(label: torch.Tensor, *, sure: float | None = None) -> Inference:
    """What a run would say that predicts `label` (1, *spatial) with some confidence, or with `sure` of it."""
    generator = torch.Generator().manual_seed(2)
    shape = label.shape[1:]
    confidence = 0.5 + 0.5 * torch.rand(shape, generator=generator) if sure is None else torch.full(shape, sure)
    one_hot = torch.nn.functional.one_hot(label[0].long(), len(CLASSES)).movedim(-1, 0)
    probability = torch.where(one_hot == 1, confidence, (1 - confidence) / (len(CLASSES) - 1))
    return Inference(probability, 1.5 * (1 - confidence)[None], label[0].to(torch.uint8))


def test_distances_are_those_of_monai(run):
    case, result = case_of(blocks()), said(blocks(2))
    values = CaseScorer(run, case).score(case.image, result).values
    for k, name in enumerate(CLASSES[1:], 1):
        mine, theirs = (result.label == k)[None, None], (case.label == k)[None]
        with warnings.catch_warnings():  # MONAI warns about an argument of its own
            warnings.simplefilter("ignore", FutureWarning)
            options = {"include_background": True, "spacing": list(case.spacing)}
            hd95 = compute_hausdorff_distance(mine, theirs, percentile=95, **options)
            assd = compute_average_surface_distance(mine, theirs, symmetric=True, **options)
        assert values[f"hd95/{name}"] == pytest.approx(float(hd95), rel=1e-6)
        assert values[f"assd/{name}"] == pytest.approx(float(assd), rel=1e-6)
        assert values[f"assd/{name}"] > 0
    assert values["assd"] == pytest.approx(np.mean([values[f"assd/{name}"] for name in CLASSES[1:]]))


def test_one_pass_metrics(run):
    case, result = case_of(blocks()), said(blocks(1))
    scored = CaseScorer(run, case).score(case.image, result)
    truth, wrong = case.label[0].numpy().ravel(), (result.label != case.label[0]).numpy().ravel()
    p, u = result.probability.flatten(1).T.double().numpy(), result.uncertainty.numpy().ravel()
    assert scored.values["nll"] == pytest.approx(log_loss(truth, p), rel=1e-5)
    assert scored.values["auroc"] == pytest.approx(roc_auc_score(wrong, u), abs=1e-3)
    assert scored.values["error_rate/core"] == pytest.approx(
        np.mean((result.label.numpy().ravel() == 2) != (truth == 2))
    )


def test_pooled_over_cases(run):
    """As of one volume that all cases make up."""
    cases = [(case_of(blocks(i)), said(blocks(1 - i))) for i in (0, 1)]
    sums = [CaseScorer(run, case).score(case.image, result).histograms for case, result in cases]
    together, values = pooled(joined(sums), CLASSES)
    expected = calibration_error_detection(
        torch.cat([result.probability for _, result in cases], 1)[None],
        torch.cat([case.label.long() for case, _ in cases], 1),
        torch.cat([result.uncertainty for _, result in cases], 1)[None],
    )
    assert float(together.voxels) == 2 * math.prod(SHAPE)
    assert values["ece/shell"] == pytest.approx(float(expected.expected_calibration_error_per_class[0, 1]))
    assert values["aurc"] == pytest.approx(float(expected.area_under_risk_coverage.value[0]))
    assert values["ueo/core"] == pytest.approx(float(expected.uncertainty_error_overlap_per_class[0, 2]))
    assert set(values) == {key for name in ONE_PASS for key in (name, *(f"{name}/{c}" for c in CLASSES))}


def check_reasons(scored) -> None:
    """A reason for every metric that is NaN and for no other."""
    assert scored.undefined.keys() == {key for key, value in scored.values.items() if math.isnan(value)}
    assert all(scored.undefined.values())
    assert not any(math.isinf(value) for value in scored.values.values())


def test_perfect_prediction(run):
    case = case_of(blocks())
    scored = CaseScorer(run, case).score(case.image, said(blocks(), sure=1.0))
    check_reasons(scored)
    for key in ("dice", "dice/shell", "dice/core"):
        assert scored.values[key] == 1
    for key in ("hd95", "assd", "hd95/core", "error_rate", "ece", "brier", "nll", "aurc"):
        assert scored.values[key] == 0, key
    assert scored.values["ace"] == pytest.approx(0, abs=1e-6)  # from a histogram
    for key in ("ueo", "auroc", "auprc"):
        assert scored.undefined[key] == "nothing that counts is wrong"


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_distances_of_a_flat_volume_are_those_of_the_image(axis):
    generator = torch.Generator().manual_seed(0)
    mine, theirs = (torch.rand((2, 12, 11), generator=generator) < 0.3).unbind()
    spacing = [2.0, 0.5]
    expected = _distances(mine, theirs, spacing)
    spacing.insert(axis, 9.0)
    assert _distances(mine.unsqueeze(axis), theirs.unsqueeze(axis), spacing) == expected


def test_all_wrong(run):
    case = case_of(blocks())
    scored = CaseScorer(run, case).score(case.image, said((blocks() + 1) % 3, sure=1.0))
    check_reasons(scored)
    assert scored.values["dice"] == 0
    assert scored.values["error_rate"] == scored.values["ece"] == scored.values["aurc"] == 1
    assert scored.values["brier"] == 2
    assert scored.values["auprc"] == 1
    assert scored.undefined["auroc"] == "all that counts is wrong"
    assert scored.undefined["nll"] == "infinite: a true class has probability 0"


def test_class_absent(run):
    only_shell = blocks().clamp(max=1)
    for truth, label, reason in (
        (only_shell, only_shell, "neither prediction nor truth has the class"),
        (only_shell, blocks(), "the truth lacks the class"),
        (blocks(), only_shell, "the prediction lacks the class"),
    ):
        case = case_of(truth)
        scored = CaseScorer(run, case).score(case.image, said(label))
        check_reasons(scored)
        assert scored.undefined["hd95/core"] == scored.undefined["assd/core"] == reason
        assert scored.values["hd95"] == scored.values["hd95/shell"]
        if reason.startswith("neither"):
            assert scored.values["dice"] == scored.values["dice/shell"] == 1
            assert scored.undefined["dice/core"] == reason
        else:
            assert scored.values["dice/core"] == 0
            assert scored.values["dice"] == pytest.approx(scored.values["dice/shell"] / 2)
        if not bool((truth == 2).any()):
            assert scored.undefined["nll/core"] == "the class does not occur where voxels count"


def test_everything_ignored(run):
    case = case_of(torch.full_like(blocks(), IGNORE))
    scorer, result = CaseScorer(run, case), said(blocks())
    scored = scorer.score(case.image, result)
    check_reasons(scored)
    assert scored.values.keys() == scored.undefined.keys()
    for key in ONE_PASS:
        assert scored.undefined[key] == "nothing counts"
    maps = [result.uncertainty, result.uncertainty / 2, result.uncertainty / 3]
    values, undefined = scorer.response(maps, (0, 1, 2))
    assert all(math.isnan(v) for v in values.values())
    assert set(undefined.values()) == {"nothing counts"}


def test_constant_uncertainty(run):
    case = case_of(blocks())
    scorer, result = CaseScorer(run, case), said(blocks(1), sure=0.8)
    scored = scorer.score(case.image, result)
    check_reasons(scored)
    assert scored.values["auroc"] == 0.5
    assert scored.values["auprc"] == pytest.approx(scored.values["error_rate"], abs=2e-3)
    assert scored.values["aurc"] == pytest.approx(scored.values["error_rate"])
    assert scored.undefined["ucc_g"] == "one of the quantities is constant"
    assert scored.undefined["ur_g"] == "every pair is tied"
    for key in ("uncertainty_boundary", "uncertainty_boundary_predicted"):
        assert scored.values[key] == pytest.approx(0.3, rel=1e-6)
    values, undefined = scorer.response([result.uncertainty] * 3, (0, 1, 2))
    assert values["noise_share"] == 0
    assert undefined["noise_correlation"] == undefined["ucc_d"] == "one of the quantities is constant"


def test_one_voxel(run):
    label = torch.ones(1, 1, 1, 1, dtype=torch.int16)
    case = case_of(label)
    scored = CaseScorer(run, case).score(case.image, said(label, sure=0.9))
    check_reasons(scored)
    assert scored.values["dice/shell"] == 1
    assert scored.values["hd95/shell"] == scored.values["assd/shell"] == 0
    assert scored.values["error_rate"] == 0
    assert scored.values["ece"] == pytest.approx(0.1, abs=1e-6)
    for key in RANKS:
        assert scored.undefined[key] in ("nothing counts", "fewer than two points count")


def test_noise_response_of_an_evaluation(run):
    """UCC_d takes the rise to the weaker noise, the share goes from it to the stronger."""
    case = case_of(blocks())
    scorer = CaseScorer(run, case)
    clean = infer(run, case.image[None]).uncertainty
    values, undefined = noise_response(scorer, noise_maps(run, case, clean, 3))
    assert not undefined
    weak, strong = (
        infer(run, CORRUPTIONS["gaussian_mean"](case.image, m, seed_of(3, "a", "gaussian_mean"))[None]).uncertainty
        for m in (0.1, 0.9)
    )
    near = (scorer.distance <= 4)[0]
    assert values["noise_share"] == pytest.approx(float((strong > weak)[near].double().mean()))
    again, _ = scorer.response([clean, weak], (0.0, 0.1))
    assert values["ucc_d"] == again["ucc_d"]
    assert values["ur_d_official"] == again["ur_d_official"]
    assert values["ucc_d"] != scorer.response([clean, strong], (0.0, 0.9))[0]["ucc_d"]


def test_boundary_is_where_it_is_said(run):
    case = case_of(blocks())
    scorer = CaseScorer(run, case)
    gradient, uncertainty = scorer.score(case.image, said(blocks(1))).boundary
    assert len(gradient) == len(uncertainty) == int((scorer.distance <= BOUNDARY).sum())


def test_risk_coverage_from_sorted_voxels(run):
    torch.manual_seed(0)
    cases = [case_of(blocks(shift)) for shift in (0, 2)]
    results = [infer(run, case.image[None]) for case in cases]
    scores = [CaseScorer(run, case).score(case.image, result) for case, result in zip(cases, results, strict=True)]
    curve = risk_coverage(joined([s.histograms for s in scores]))
    uncertainty = np.concatenate([r.uncertainty.numpy().ravel() for r in results])
    wrong = np.concatenate([(r.label != c.label[0]).numpy().ravel() for r, c in zip(results, cases, strict=True)])
    risk = np.cumsum(wrong[np.argsort(uncertainty)]) / np.arange(1, wrong.size + 1)
    assert curve["coverage"][-1] == 1
    assert 50 < len(curve["risk"]) <= 100
    for coverage, value in zip(curve["coverage"], curve["risk"], strict=True):
        assert value == pytest.approx(risk[round(coverage * wrong.size) - 1], abs=1e-12)
    empty = [type(s.histograms)(*(t * 0 for t in s.histograms)) for s in scores]
    assert risk_coverage(joined(empty)) == {"coverage": [], "risk": []}


def test_profile_by_distance(run):
    case = case_of(blocks())
    case.label[:, :, 0] = IGNORE
    scorer = CaseScorer(run, case)
    maps = [torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    voxels, *sums = scorer.profile(maps)
    distance = scorer.distance[0, 0].numpy()
    valid = scorer.valid[0].numpy()
    assert len(voxels) == REACH + 2
    for k in range(REACH + 2):
        inside = valid & (distance > k - 1) & ((distance <= k) | (k > REACH))
        assert voxels[k] == inside.sum()
        for m, total in zip(maps, sums, strict=True):
            assert float(total[k]) == pytest.approx(m[0].double().numpy()[inside].sum())
    assert voxels.sum() == valid.sum()


def test_summary():
    rows = [{"name": str(i), "x": float(v), "y": math.nan if i else 1.0} for i, v in enumerate(range(40))]
    summary = summarise(rows)
    assert summary["x"]["mean"] == 19.5
    assert summary["x"]["n"] == 40
    assert summary["x"]["std"] == pytest.approx(np.std(range(40), ddof=1))
    low, high = summary["x"]["ci"]
    reach = 1.96 * summary["x"]["std"] / math.sqrt(40)  # of a normal mean
    assert low == pytest.approx(19.5 - reach, abs=0.4)
    assert high == pytest.approx(19.5 + reach, abs=0.4)
    assert summary["y"]["n"] == 1
    assert math.isnan(summary["y"]["std"])
    assert all(math.isnan(v) for v in summary["y"]["ci"])
    assert summarise(rows, seed=1)["x"]["ci"] != summary["x"]["ci"]
