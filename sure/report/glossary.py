"""What each metric is called, which way is better, and what it says."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Metric(NamedTuple):
    """One row of a report's table."""

    label: str
    better: Literal["higher", "lower", ""]
    digits: int
    """Decimals to print."""
    text: str
    group: str
    """What it is about: rows of a group stand together."""
    headline: bool = False
    """Whether it stands in the table at the head of the page."""


_OVERLAP, _CALIBRATION, _ERRORS = "Segmentation", "Calibration", "Does uncertainty find the errors?"
_IMAGE, _NOISE, _WHERE = (
    "Does uncertainty follow the image?",
    "Does uncertainty answer to noise?",
    "Where uncertainty is",
)
_PUBLISHED = "{} as the published programs compute it, with their treatment of ties."

METRICS: dict[str, Metric] = {
    "dice": Metric(
        "Dice", "higher", 3, "Overlap of prediction and truth, mean over the foreground classes.", _OVERLAP, True
    ),
    "hd95": Metric(
        "HD95 (mm)",
        "lower",
        2,
        "95th percentile of the distance between the surfaces of prediction and truth, the larger of the two "
        "directions; mean over the foreground classes.",
        _OVERLAP,
        True,
    ),
    "assd": Metric(
        "ASSD (mm)",
        "lower",
        2,
        "Average distance between the surfaces of prediction and truth, over the points of both; mean over the "
        "foreground classes.",
        _OVERLAP,
    ),
    "error_rate": Metric("Error rate", "lower", 4, "Share of voxels with a wrong label.", _OVERLAP),
    "ece": Metric(
        "ECE",
        "lower",
        4,
        "Expected calibration error of the most probable class: how far confidence is from accuracy, |confidence − "
        "accuracy| averaged over 10 ranges of confidence.",
        _CALIBRATION,
        True,
    ),
    "ace": Metric(
        "ACE",
        "lower",
        4,
        "Adaptive calibration error: as ECE, with 10 ranges that hold equally many voxels.",
        _CALIBRATION,
    ),
    "brier": Metric(
        "Brier score", "lower", 4, "Squared error of the probabilities, summed over the classes.", _CALIBRATION
    ),
    "nll": Metric(
        "NLL (nats)",
        "lower",
        4,
        "Negative log likelihood: −ln of the probability that the true class was given.",
        _CALIBRATION,
        True,
    ),
    "ueo": Metric(
        "UEO",
        "higher",
        3,
        "Uncertainty-error overlap: Dice of the uncertain and the wrong voxels, at the best of 99 thresholds.",
        _ERRORS,
        True,
    ),
    "auroc": Metric(
        "Error detection AUROC",
        "higher",
        3,
        "Chance that a wrong voxel is more uncertain than a right one; 0.5 where uncertainty says nothing.",
        _ERRORS,
    ),
    "auprc": Metric(
        "Error detection AUPRC",
        "higher",
        3,
        "Area under precision and recall when uncertainty is used to find wrong voxels; the error rate where it says "
        "nothing.",
        _ERRORS,
    ),
    "aurc": Metric(
        "AURC",
        "lower",
        5,
        "Area under the risk-coverage curve: the error rate among the most certain voxels, averaged over all shares of "
        "voxels kept.",
        _ERRORS,
        True,
    ),
    "ucc_g": Metric(
        "Gradient correlation (UCC)",
        "lower",
        3,
        "Spearman correlation of uncertainty and image gradient on the true boundary: −1 where sharper edges are "
        "always the more certain.",
        _IMAGE,
        True,
    ),
    "ur_g": Metric(
        "Gradient ratio (UR)",
        "higher",
        3,
        "Share of pairs of boundary voxels in which the one with the stronger gradient is the more certain.",
        _IMAGE,
        True,
    ),
    "ucc_g_official": Metric(
        "Gradient correlation (UCC), published form", "lower", 3, _PUBLISHED.format("UCC"), _IMAGE
    ),
    "ur_g_official": Metric("Gradient ratio (UR), published form", "higher", 3, _PUBLISHED.format("UR"), _IMAGE),
    "ucc_d": Metric(
        "Noise-distance correlation (UCC)",
        "lower",
        3,
        "Spearman correlation of the rise of uncertainty under noise and the distance from the boundary, up to 4 "
        "voxels: −1 where it rises the more the nearer the boundary is.",
        _NOISE,
        True,
    ),
    "ur_d": Metric(
        "Noise-distance ratio (UR)",
        "higher",
        3,
        "Share of pairs of voxels, up to 4 voxels from the boundary, in which uncertainty rises more under noise at "
        "the nearer one.",
        _NOISE,
        True,
    ),
    "ucc_d_official": Metric(
        "Noise-distance correlation (UCC), published form", "lower", 3, _PUBLISHED.format("UCC"), _NOISE
    ),
    "ur_d_official": Metric("Noise-distance ratio (UR), published form", "higher", 3, _PUBLISHED.format("UR"), _NOISE),
    "noise_share": Metric(
        "Voxels more uncertain under noise",
        "higher",
        3,
        "Share of voxels up to 4 voxels from the boundary whose uncertainty rises from the weaker noise to the "
        "stronger.",
        _NOISE,
        True,
    ),
    "noise_correlation": Metric(
        "Noise correlation",
        "higher",
        3,
        "Spearman correlation of noise level and uncertainty at a voxel, averaged over the voxels up to 4 voxels from "
        "the boundary.",
        _NOISE,
    ),
    "uncertainty_boundary": Metric(
        "Uncertainty on boundaries", "", 3, "Mean uncertainty up to 1 voxel from a true boundary.", _WHERE
    ),
    "uncertainty_boundary_predicted": Metric(
        "Uncertainty on predicted boundaries",
        "",
        3,
        "Mean uncertainty up to 1 voxel from a predicted boundary.",
        _WHERE,
    ),
    "uncertainty_far": Metric(
        "Uncertainty far from boundaries",
        "lower",
        4,
        "Mean uncertainty farther than 4 voxels from every true boundary.",
        _WHERE,
        True,
    ),
}
UNKNOWN = "Other"
"""Group of metrics without an entry: an evaluation of another version may hold some."""


def describe(key: str) -> Metric:
    """The metric called `key`; "dice/liver" is Dice of the class liver. One without an entry has its key as label."""
    name, _, of = key.partition("/")
    metric = METRICS.get(name) or Metric(name, "", 4, "Not described in this version of the report.", UNKNOWN)
    return metric._replace(label=f"{metric.label}, {of}") if of else metric
