"""The metrics of one case: whatever image it is scored on, by `evaluate` or in a sweep of `robustness`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.metrics import compute_dice
from monai.metrics.utils import get_mask_edges, get_surface_distance
from torch import Tensor

import sure_kernels as sk
from sure.checkpoint import Run
from sure.data import IGNORE, EvaluationCase
from sure.inference import Inference, as_batch, as_volume
from sure_kernels import metrics
from sure_kernels.metrics import SegmentationHistograms, SegmentationScores, Undefined
from sure_kernels.metrics.one_pass import scores_of

BOUNDARY = 1.0
"""Voxels at most this far from a boundary are on it."""
NEAR = 4.0
"""Voxels at most this far from a boundary answer to noise."""
FAR = 4.0
"""Voxels farther than this from every boundary should be certain."""
REACH = 10
"""Voxels from a boundary up to which the profile of uncertainty tells distances apart."""
NUM_BINS = 10
"""Of reliability curves and calibration errors."""

ONE_PASS = {
    "error_rate": "error_rate",
    "ece": "expected_calibration_error",
    "ace": "adaptive_calibration_error",
    "brier": "brier_score",
    "nll": "negative_log_likelihood",
    "ueo": "uncertainty_error_overlap",
    "auroc": "error_detection_auroc",
    "auprc": "error_detection_auprc",
    "aurc": "area_under_risk_coverage",
}
"""Metrics from histograms of the voxels, and their names in `sure_kernels.metrics`; per class too, with background."""
DISTANCE_METRICS = ("hd95", "assd")

Reasons = dict[str, str]
Values = dict[str, float]
Measured = Iterator[tuple[str, float, str]]
"""Metric, value (NaN where undefined), and why."""


class Score(NamedTuple):
    """What one image of a case scores."""

    values: Values
    """By metric, "METRIC/CLASS" for one class; NaN where undefined."""
    undefined: Reasons
    """Why, of each metric that is NaN."""
    histograms: SegmentationHistograms
    """Sums over the voxels, without the axis N: of several cases they add up, see `joined`."""
    boundary: tuple[Tensor, Tensor]
    """Image gradient and uncertainty (n,) of the voxels on the true boundary."""


class CaseScorer:
    """What follows from a case's truth, computed once; `score` and `response` then take any images of the case.

    A 2D run is scored with the boundaries and gradients of the slices that it sees. Ignored voxels count as
    background in Dice, HD95 and ASSD, and nowhere else.
    """

    def __init__(self, run: Run, case: EvaluationCase) -> None:
        """`case` must have a label."""
        assert case.label is not None
        self.names, self.spacing = run.class_names, case.spacing
        self._run_dims, self._dims = run.config.spatial_dims, case.image.ndim - 1
        self.valid = case.label != IGNORE  # (1, *spatial), as is the truth
        self.truth = torch.where(self.valid, case.label, 0)
        self.distance = self._distance(case.label, max(BOUNDARY, NEAR, FAR, REACH))  # (1, 1, *spatial)
        self.boundary = (self.distance <= BOUNDARY) & self.valid
        self.near = (self.distance <= NEAR) & self.valid
        self.far = (self.distance > FAR) & self.valid

    def score(self, image: Tensor, result: Inference) -> Score:
        """All metrics that need one image alone.

        Args:
            image: (M, *spatial), what the run was shown; its gradients are those of UCC and UR.
            result: what the run made of it.
        """
        uncertainty = result.uncertainty[None]
        gradient = sk.gradient_magnitude(as_batch(image[None], self._run_dims))
        gradient = as_volume(gradient, self._dims)[None]
        sums = metrics.segmentation_histograms(
            result.probability[None], self.truth, uncertainty, num_bins=NUM_BINS, mask=self.valid
        )
        sums = SegmentationHistograms(*(t[0] for t in sums))
        values, undefined = {}, {}
        for key, value, reason in (
            *self._overlap(result.label),
            *_one_pass(*scores_of(sums, NUM_BINS), self.names),
            *_ranks("g", uncertainty, gradient, self.boundary),
            *self._regions(result),
        ):
            values[key] = value
            if reason:
                undefined[key] = reason
        return Score(values, undefined, sums, (gradient[self.boundary], uncertainty[self.boundary]))

    def response(self, maps: Sequence[Tensor], levels: Sequence[float], noised: int = -1) -> tuple[Values, Reasons]:
        """How uncertainty answers to corruption: UCC_d, UR_d, and the noise response.

        Args:
            maps: uncertainty (1, *spatial) of the clean image first, then at growing severity.
            levels: the severity of each map.
            noised: the map whose difference from the clean one is set against the distance to the boundary.
        """
        rise = (maps[noised] - maps[0])[None]
        found, why = metrics.noise_response(
            [m[None] for m in maps], levels, distance=self.distance, near=NEAR, mask=self.valid, return_reason=True
        )
        values, undefined = {}, {}
        for key, value, reason in (
            *_ranks("d", rise, self.distance, self.near),
            ("noise_share", *_told(found.share[0, -1], why.share[0, -1])),
            ("noise_correlation", *_told(found.correlation[0], why.correlation[0])),
        ):
            values[key] = value
            if reason:
                undefined[key] = reason
        return values, undefined

    def profile(self, maps: Sequence[Tensor]) -> Tensor:
        """Uncertainty by distance from the boundary, as sums that add up over cases.

        Args:
            maps: uncertainty (1, *spatial) under different conditions.

        Returns:
            float64 (1 + len(maps), REACH + 2): the number of voxels, then the sum of each map over them, at distances
            0, up to 1, ..., up to REACH voxels, and farther.
        """
        bins = self.distance[self.valid[None]].ceil().clamp(max=REACH + 1).long()
        ones = torch.ones(len(bins), dtype=torch.float64)
        weights = [ones, *(m[self.valid].double() for m in maps)]
        return torch.stack([torch.bincount(bins, w, minlength=REACH + 2) for w in weights])

    def _distance(self, labels: Tensor, limit: float) -> Tensor:
        """(1, *spatial) labels to (1, 1, *spatial) distances in voxels, +inf beyond `limit`."""
        slices = as_batch(labels[None], self._run_dims)[:, 0]
        distance = sk.boundary_distance(slices, max_distance=limit, ignore_index=IGNORE)
        return as_volume(distance, self._dims)[None]

    def _overlap(self, label: Tensor) -> Measured:
        """Dice of each foreground class and the distances of its surfaces in mm, each with its mean over classes."""
        label = torch.where(self.valid, label[None], 0)
        found: dict[str, list[tuple[float, str]]] = {"dice": [], **{key: [] for key in DISTANCE_METRICS}}
        for k in range(1, len(self.names)):
            mine, theirs = label[0] == k, self.truth[0] == k
            there = bool(mine.any()), bool(theirs.any())
            found["dice"].append(
                (dice(mine, theirs), "" if any(there) else "neither prediction nor truth has the class")
            )
            if all(there):
                for key, value in zip(DISTANCE_METRICS, _distances(mine, theirs, self.spacing), strict=True):
                    found[key].append((value, ""))
            else:
                lacking = ("neither prediction nor truth has the class", "the prediction lacks the class")
                reason = "the truth lacks the class" if there[0] else lacking[there[1]]
                for key in DISTANCE_METRICS:
                    found[key].append((math.nan, reason))
        for key, by_class in found.items():
            defined = [value for value, reason in by_class if not reason]
            yield (key, float(np.mean(defined)), "") if defined else (key, math.nan, "undefined for every class")
            for name, (value, reason) in zip(self.names[1:], by_class, strict=True):
                yield f"{key}/{name}", value, reason

    def _regions(self, result: Inference) -> Measured:
        """Mean uncertainty on the true boundary, on the predicted one, and far from the true one."""
        predicted = torch.where(self.valid, result.label[None], IGNORE)
        on_predicted = (self._distance(predicted, BOUNDARY) <= BOUNDARY) & self.valid
        for key, region, reason in (
            ("uncertainty_boundary", self.boundary, "the truth has no boundary"),
            ("uncertainty_boundary_predicted", on_predicted, "the prediction has no boundary"),
            ("uncertainty_far", self.far, f"no voxel is farther than {FAR:g} from every boundary"),
        ):
            inside = result.uncertainty[region[0]].double()
            yield key, float(inside.mean()), "" if inside.numel() else reason


def dice(mine: Tensor, theirs: Tensor) -> float:
    """Of two masks (*spatial); NaN where both are empty."""
    if not bool(mine.any() or theirs.any()):
        return math.nan
    return float(compute_dice(mine[None, None], theirs[None, None], ignore_empty=False))


def joined(sums: Sequence[SegmentationHistograms]) -> SegmentationHistograms:
    """Those of all voxels of several cases together."""
    return SegmentationHistograms(*(sum(parts[1:], parts[0]) for parts in zip(*sums, strict=True)))


def pooled(total: SegmentationHistograms, names: Sequence[str]) -> tuple[SegmentationScores, Values]:
    """The scores that follow from histograms, and their metrics by name."""
    scores, reasons = scores_of(total, NUM_BINS)
    return scores, {key: value for key, value, _ in _one_pass(scores, reasons, names)}


def risk_coverage(total: SegmentationHistograms, points: int = 100) -> dict[str, list[float]]:
    """Share of wrong voxels among the most certain ones, against their share of all.

    At most `points` shares, as close to evenly spaced as the bins of the histograms allow, the last one 1; none where
    no voxel counts.
    """
    right, wrong = total.errors[-1].double().cumsum(-1)
    kept = right + wrong
    if not kept[-1]:
        return {"coverage": [], "risk": []}
    coverage = kept / kept[-1]
    wanted = torch.arange(1, points + 1, dtype=torch.float64) / points
    at = torch.searchsorted(coverage, wanted).clamp(max=len(coverage) - 1).unique()
    return {"coverage": coverage[at].tolist(), "risk": (wrong / kept)[at].tolist()}


def _one_pass(scores: SegmentationScores, reasons: SegmentationScores, names: Sequence[str]) -> Measured:
    for key, attribute in ONE_PASS.items():
        yield key, *_told(_value(scores, attribute), getattr(reasons, attribute))
        per_class = f"{attribute}_per_class"
        values, why = _value(scores, per_class), getattr(reasons, per_class)
        for k, name in enumerate(names):
            yield f"{key}/{name}", *_told(values[k], why[k])


def _value(scores: SegmentationScores, attribute: str) -> Tensor:
    """Without the bound that values from histograms have."""
    result: Any = getattr(scores, attribute)
    return result if isinstance(result, Tensor) else result.value


def _told(value: Tensor, reason: Tensor) -> tuple[float, str]:
    """A metric of `sure_kernels` and why it is NaN; an infinite likelihood is no number that JSON holds."""
    if math.isinf(float(value)):
        return math.nan, "infinite: a true class has probability 0"
    return float(value), Undefined(int(reason)).text if int(reason) else ""


def _ranks(suffix: str, x: Tensor, y: Tensor, mask: Tensor) -> Measured:
    """UCC and UR, and as the published programs compute them."""
    x, y = x[mask], y[mask]  # sets of points: gathered once for all four
    for name, metric in (("ucc", metrics.uncertainty_correlation), ("ur", metrics.uncertainty_ratio)):
        yield f"{name}_{suffix}", *_told(*metric(x, y, return_reason=True))
        yield f"{name}_{suffix}_official", *_told(*metric(x, y, compat="official", return_reason=True))


def _distances(mine: Tensor, theirs: Tensor, spacing: Sequence[float]) -> tuple[float, float]:
    """HD95 and ASSD in mm of two masks (*spatial), neither empty, from one search each way.

    A volume one voxel deep is the image that it is: across it every voxel would be a surface.
    """
    flat = [axis for axis, n in enumerate(mine.shape) if n == 1][: mine.ndim - 2]
    mine, theirs = (mask.squeeze(flat) for mask in (mine, theirs)) if flat else (mine, theirs)
    spacing = [step for axis, step in enumerate(spacing) if axis not in flat]
    edges = get_mask_edges(mine, theirs)
    ways = [
        torch.as_tensor(get_surface_distance(a, b, spacing=list(spacing))).double() for a, b in (edges, edges[::-1])
    ]
    hd95 = max(float(np.percentile(way.numpy(), 95)) for way in ways)
    return hd95, float(torch.cat(ways).mean())
