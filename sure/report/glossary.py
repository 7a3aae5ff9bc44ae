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


METRICS: dict[str, Metric] = {
    "dice": Metric("Dice", "higher", 3, "Overlap of prediction and truth, mean over the foreground classes."),
    "hd95": Metric(
        "HD95 (mm)",
        "lower",
        2,
        "95th percentile of the distance between the surfaces, the larger of the two directions; mean over "
        "the foreground classes.",
    ),
    "error_rate": Metric("Error rate", "lower", 4, "Share of voxels with a wrong label."),
    "ece": Metric(
        "ECE",
        "lower",
        4,
        "Expected calibration error of the most probable class, 10 bins: |confidence − accuracy|.",
    ),
    "brier": Metric("Brier score", "lower", 4, "Squared error of the probabilities, summed over the classes."),
    "ueo": Metric(
        "UEO",
        "higher",
        3,
        "Uncertainty-error overlap: Dice of uncertain and wrong voxels, at the best of 99 thresholds.",
    ),
    "ucc_g": Metric(
        "Gradient correlation (UCC)",
        "lower",
        3,
        "Spearman correlation of uncertainty and image gradient on the boundary: −1 where sharp edges are "
        "always the more certain.",
    ),
    "ur_g": Metric(
        "Gradient ratio (UR)",
        "higher",
        3,
        "Share of pairs of boundary voxels in which the one with the stronger gradient is the more certain.",
    ),
    "uncertainty_boundary": Metric(
        "Uncertainty on boundaries", "", 3, "Mean uncertainty within 1 voxel of a boundary."
    ),
    "uncertainty_far": Metric(
        "Uncertainty far from boundaries", "lower", 4, "Mean uncertainty farther than 4 voxels from every boundary."
    ),
}


def describe(key: str) -> Metric:
    """The metric called `key`; "dice/liver" is Dice of the class liver."""
    name, _, of = key.partition("/")
    metric = METRICS[name]
    return metric._replace(label=f"{metric.label}, {of}") if of else metric
