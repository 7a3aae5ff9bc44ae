"""The pictures of an evaluation, on Matplotlib's object API: overlays, and charts of calibration and uncertainty."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from sure.report.slices import Stack, arrays_of, oriented, stack_of
from sure_kernels.metrics import Reliability

# Okabe and Ito's colours, safe for every common colour blindness: of classes 1, 2, ... and of runs
CLASS_COLOURS = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#D55E00", "#0072B2")
RUN_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK, MUTED, GRID = "#1f2933", "#5f6b7a", "#d9dee5"
UNCERTAINTY_MAP = "magma"
_MARKERS = "os^Dv"

_DPI = 110
_CHART_DPI = 144
_FONT: dict[str, Any] = {"fontsize": 9, "color": INK}


@dataclass(frozen=True)
class Plane:
    """One slice, every array (height, width) with the first row at the bottom, sizes in mm."""

    image: NDArray[np.float32]
    truth: NDArray[np.uint8]
    prediction: NDArray[np.uint8]
    uncertainty: NDArray[np.float32]
    size: tuple[float, float]
    """Width and height in mm."""


@dataclass(frozen=True)
class BoundaryPoints:
    """Boundary voxels, (n,) each, and the Spearman correlation to write beside them (NaN: undefined)."""

    gradient: NDArray[np.floating]
    uncertainty: NDArray[np.floating]
    correlation: float

    def thinned(self, limit: int = 50_000) -> BoundaryPoints:
        """At most `limit` of the points, evenly spread: enough for a picture."""
        step = -(-len(self.gradient) // limit) or 1
        return BoundaryPoints(self.gradient[::step], self.uncertainty[::step], self.correlation)


def planes(
    image: NDArray,
    truth: NDArray,
    prediction: NDArray,
    uncertainty: NDArray,
    affine: NDArray[np.float64],
) -> tuple[Plane, ...]:
    """The three orthogonal slices through the centre of the true foreground; of a 2D image, the image.

    All arrays are (*spatial); volumes are turned to the axes of `affine` (4, 4) nearest to right, anterior,
    superior first. A volume without foreground is cut through its middle.
    """
    arrays = [np.asarray(a) for a in (image, truth, prediction, uncertainty)]
    if arrays[0].ndim == 2:
        return (_plane([a.T for a in arrays], np.linalg.norm(affine[:3, :3], axis=0)[:2]),)
    arrays, spacing = oriented(arrays, affine)
    inside = np.argwhere(arrays[1] > 0)
    centre = inside.mean(0) if len(inside) else (np.array(arrays[1].shape) - 1) / 2
    cuts = []
    for axis, index in reversed(list(enumerate(np.rint(centre).astype(int)))):
        cuts.append(_plane([a.take(index, axis).T for a in arrays], np.delete(spacing, axis)))
    return tuple(cuts)


def _plane(arrays: Sequence[NDArray], spacing: NDArray[np.float64]) -> Plane:
    image, truth, prediction, uncertainty = arrays
    height, width = image.shape
    return Plane(
        image.astype(np.float32),
        truth.astype(np.uint8),
        prediction.astype(np.uint8),
        uncertainty.astype(np.float32),
        (float(width * spacing[0]), float(height * spacing[1])),
    )


def uncertainty_top(cuts: Iterable[Plane]) -> float:
    """Upper end of a scale of uncertainty for these planes: most networks use a small part of 0 to 1."""
    highest = max((float(np.percentile(plane.uncertainty, 99.9)) for plane in cuts), default=1.0)
    return float(np.clip(np.ceil(20 * highest) / 20, 0.05, 1))


def overlay(runs: Mapping[str, Sequence[Plane]], class_names: Sequence[str], top: float | None = None) -> Figure:
    """One case: image and truth, then for every run its prediction and its uncertainty; a row per plane.

    Args:
        runs: what each run, by name, made of the same planes (one name may be empty).
        class_names: background first.
        top: end of the scale of uncertainty; None takes `uncertainty_top`.
    """
    top = uncertainty_top(plane for cuts in runs.values() for plane in cuts) if top is None else top
    first = next(iter(runs.values()))
    titles = ["image", "truth"]
    for name in runs:
        titles += [f"{name} prediction".strip(), f"{name} uncertainty".strip()]
    widest = max(plane.size[0] for plane in first)
    heights = [plane.size[1] / widest for plane in first]
    column = 1.9
    figure = Figure(figsize=(column * len(titles) + 0.5, column * sum(heights) + 0.75), dpi=_DPI, layout="constrained")
    axes = figure.subplots(len(first), len(titles), squeeze=False, height_ratios=heights)
    for row, plane in enumerate(first):
        _show_image(axes[row, 0], plane)
        _show_image(axes[row, 1], plane)
        _show_labels(axes[row, 1], plane.truth, plane, len(class_names))
        for r, cuts in enumerate(runs.values()):
            mine, (left, right) = cuts[row], axes[row, 2 + 2 * r : 4 + 2 * r]
            _show_image(left, plane)
            _show_labels(left, mine.prediction, plane, len(class_names))
            _outline(left, plane, "white")
            right.imshow(
                mine.uncertainty, cmap=UNCERTAINTY_MAP, vmin=0, vmax=top, origin="lower", extent=_extent(plane)
            )
            _outline(right, plane, "white")
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, **_FONT)
    for axis in axes.flat:
        axis.set_axis_off()
    heat = ScalarMappable(Normalize(0, top), UNCERTAINTY_MAP)
    bar = figure.colorbar(heat, ax=axes[:, -1].tolist(), shrink=0.9, aspect=25, pad=0.02, panchor=False)
    bar.ax.tick_params(labelsize=8, colors=MUTED, length=2)
    bar.ax.spines["outline"].set_visible(False)
    handles = [
        Patch(color=CLASS_COLOURS[(k - 1) % len(CLASS_COLOURS)], label=name) for k, name in enumerate(class_names) if k
    ]
    handles.append(Patch(facecolor="none", edgecolor=MUTED, label="white outline: truth"))
    figure.legend(handles=handles, loc="outside lower left", ncols=4, frameon=False, fontsize=8.5, labelcolor=INK)
    return figure


def _extent(plane: Plane) -> tuple[float, float, float, float]:
    return (0, plane.size[0], 0, plane.size[1])


def _show_image(axis: Axes, plane: Plane) -> None:
    low, high = np.percentile(plane.image, (0.5, 99.5))
    axis.imshow(plane.image, cmap="gray", vmin=low, vmax=high, origin="lower", extent=_extent(plane))


def _show_labels(axis: Axes, labels: NDArray[np.uint8], plane: Plane, num_classes: int) -> None:
    colours = ListedColormap([CLASS_COLOURS[k % len(CLASS_COLOURS)] for k in range(max(num_classes - 1, 1))])
    axis.imshow(
        np.ma.masked_equal(labels, 0),
        cmap=colours,
        vmin=1,
        vmax=max(num_classes - 1, 2),
        alpha=0.6,
        origin="lower",
        extent=_extent(plane),
        interpolation="nearest",
    )


def _outline(axis: Axes, plane: Plane, colour: str) -> None:
    """The true boundaries of every class."""
    height, width = plane.truth.shape
    if min(height, width) < 2:
        return
    x = (np.arange(width) + 0.5) * plane.size[0] / width
    y = (np.arange(height) + 0.5) * plane.size[1] / height
    for k in np.unique(plane.truth[plane.truth > 0]):
        inside = plane.truth == k
        if not inside.all():
            axis.contour(x, y, inside, levels=[0.5], colors=colour, linewidths=0.7, alpha=0.9)


def reliability(curves: Mapping[str, tuple[Reliability, float]]) -> Figure:
    """Accuracy against confidence of the top label, below it the share of voxels in each bin.

    Args:
        curves: by run name, the curve (tensors of length num_bins) and its ECE.
    """
    figure = Figure(figsize=(4.0, 3.9), dpi=_CHART_DPI, layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=(3.4, 1), sharex=True)
    top.plot([0, 1], [0, 1], color=MUTED, lw=1, ls="--", zorder=1)
    for i, (name, (curve, ece)) in enumerate(curves.items()):
        confidence, accuracy, voxels = (t.cpu().numpy() for t in curve)
        filled = voxels > 0
        style = _line(i)
        label = f"{name}: ECE {ece:.4f}" if name else f"ECE {ece:.4f}"
        top.plot(confidence[filled], accuracy[filled], marker=_MARKERS[i % len(_MARKERS)], ms=4.5, label=label, **style)
        edges = np.linspace(0, 1, len(voxels) + 1)
        bottom.stairs(voxels / max(voxels.sum(), 1), edges, fill=len(curves) == 1, **style)
    top.set(xlim=(0, 1), ylim=(0, 1.02))
    top.set_ylabel("accuracy", **_FONT)
    top.legend(loc="upper left", frameon=False, fontsize=8.5, labelcolor=INK)
    if any(curve.voxels.any() for curve, _ in curves.values()):
        bottom.set_yscale("log")
    bottom.set_xlabel("confidence of the most probable class", **_FONT)
    bottom.set_ylabel("voxels", **_FONT)
    _plain(top, bottom)
    return figure


def risk_coverage(curves: Mapping[str, tuple[Sequence[float], Sequence[float], float]]) -> Figure:
    """Error rate among the most certain voxels against their share.

    Args:
        curves: by run name, coverage, risk and AURC.
    """
    figure, axis = _chart()
    for i, (name, (coverage, risk, aurc)) in enumerate(curves.items()):
        text = "undefined" if np.isnan(aurc) else f"{aurc:.5f}"
        axis.plot(coverage, risk, label=f"{name}: AURC {text}", **_line(i))
    axis.set(xlim=(0, 1))
    axis.set_ylim(bottom=0)
    axis.set_xlabel("share of voxels kept, the most certain first", **_FONT)
    axis.set_ylabel("error rate among them", **_FONT)
    _legend(axis)
    return figure


@dataclass(frozen=True)
class Profile:
    """Mean uncertainty by distance from the nearest boundary."""

    labels: Sequence[str]
    """What to write below each of the D distances."""
    noise: Sequence[float]
    """The L means of the noise, 0 first: the image as it is."""
    uncertainty: NDArray[np.float64]
    """(L, D), NaN where there is no voxel."""


def distance_plot(profiles: Mapping[str, Profile]) -> Figure:
    """Uncertainty of the images as they are against the distance from the nearest boundary, a line for each run."""
    figure, axis = _chart()
    for i, (name, profile) in enumerate(profiles.items()):
        style = {"marker": _MARKERS[i % len(_MARKERS)], "ms": 4.5, **_line(i)}
        axis.plot(profile.labels, profile.uncertainty[0], label=name, **style)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("distance from the true boundary, voxels", **_FONT)
    axis.set_ylabel("mean uncertainty", **_FONT)
    _legend(axis)
    return figure


def noise_plot(profiles: Mapping[str, Profile]) -> Figure:
    """The rise of uncertainty under noise against the distance; the runs' colours, the stronger noise the bolder."""
    figure, axis = _chart()
    axis.axhline(0, color=MUTED, lw=1)
    for i, (name, profile) in enumerate(profiles.items()):
        for step, mean in enumerate(profile.noise[1:], 1):
            rise = profile.uncertainty[step] - profile.uncertainty[0]
            style = _line(i) | {"lw": 0.6 + 2 * step / len(profile.noise[1:])}
            marker = _MARKERS[i % len(_MARKERS)]
            axis.plot(profile.labels, rise, marker=marker, ms=4, label=f"{name}, noise {mean:g}", **style)
    axis.set_xlabel("distance from the true boundary, voxels", **_FONT)
    axis.set_ylabel("rise of mean uncertainty", **_FONT)
    _legend(axis)
    return figure


@dataclass(frozen=True)
class Severity:
    """A metric of one run over the severity of a corruption: mean over cases and its interval, (L,) each."""

    levels: Sequence[float]
    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


def severity_plot(curves: Mapping[str, Severity], title: str, parameter: str, colours: Mapping[str, int]) -> Figure:
    """One metric against severity: a line for each run, its 95 % interval shaded.

    Args:
        curves: by run name.
        title: the metric.
        parameter: what severity is measured by.
        colours: index of each run's colour.
    """
    figure, axis = _chart(3.4, 2.6)
    for name, curve in curves.items():
        style, marker = _line(colours[name]), _MARKERS[colours[name] % len(_MARKERS)]
        axis.plot(curve.levels, curve.mean, label=name, marker=marker, ms=4, **style)
        axis.fill_between(curve.levels, curve.low, curve.high, color=style["color"], alpha=0.15, lw=0)
    axis.set_title(title, fontsize=10, color=INK, loc="left")
    axis.set_xlabel(parameter, **_FONT)
    _legend(axis)
    return figure


def _chart(width: float = 4.0, height: float = 3.3) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), dpi=_CHART_DPI, layout="constrained")
    axis = figure.subplots()
    _plain(axis)
    return figure, axis


def _line(run: int) -> dict[str, Any]:
    """Colour and dashes of a run: told apart without colour as well."""
    return {"color": RUN_COLOURS[run % len(RUN_COLOURS)], "lw": 1.6, "ls": ("-", "--")[run % 2]}


def _legend(axis: Axes) -> None:
    axis.legend(frameon=False, fontsize=8.5, labelcolor=INK, handlelength=3)


def gradient_plots(points: Mapping[str, BoundaryPoints], limits: tuple[float, float] | None = None) -> Figure:
    """Per run, the density of boundary voxels over gradient and uncertainty, with the median per tenth of them.

    All panels share their axes.

    Args:
        points: by run name.
        limits: largest gradient and uncertainty shown; None takes those of `gradient_limits`.
    """
    figure = Figure(figsize=(4.1 * len(points) + 0.4, 3.9), dpi=_CHART_DPI, layout="constrained")
    panels = figure.subplots(1, len(points), squeeze=False, sharex=True, sharey=True)[0]
    right, top = limits or gradient_limits(points.values())
    for axis, (name, run) in zip(panels, points.items(), strict=True):
        _density(axis, run, right, top)
        text = "undefined" if np.isnan(run.correlation) else f"{run.correlation:+.3f}".replace("-", "−")
        axis.set_title(f"{name}: Spearman {text}".removeprefix(": "), fontsize=10, color=INK, loc="left")
        axis.set_xlabel("gradient magnitude of the image", **_FONT)
        axis.set(xlim=(0, right), ylim=(0, top))
    panels[0].set_ylabel("uncertainty", **_FONT)
    _plain(*panels)
    return figure


def gradient_limits(points: Iterable[BoundaryPoints]) -> tuple[float, float]:
    """Largest gradient and uncertainty to show: a few sharp edges or odd voxels must not squeeze the rest."""
    filled = [p for p in points if len(p.gradient)]
    right = max((float(np.percentile(p.gradient, 99.5)) for p in filled), default=0.0) or 1.0
    top = max((float(np.percentile(p.uncertainty, 99.8)) for p in filled), default=0.0) * 1.05 or 1.0
    return right, top


def _density(axis: Axes, run: BoundaryPoints, right: float, top: float) -> None:
    gradient, uncertainty = run.gradient, run.uncertainty
    shown = (gradient <= right) & (uncertainty <= top)
    if not shown.any():
        return
    axis.hexbin(
        gradient[shown],
        uncertainty[shown],
        gridsize=36,
        extent=(0, right, 0, top),
        bins="log",
        mincnt=1,
        cmap="viridis",
        linewidths=0.1,
    )
    tenths = np.array_split(np.argsort(gradient, kind="stable"), min(10, len(gradient)))
    middle = [(np.median(gradient[t]), np.median(uncertainty[t])) for t in tenths]
    axis.plot(*zip(*middle, strict=True), color="white", lw=4, marker="o", ms=6)
    axis.plot(*zip(*middle, strict=True), color="#D55E00", lw=2, marker="o", ms=4, label="median")
    axis.legend(loc="upper right", framealpha=0.85, edgecolor="none", fontsize=8.5, labelcolor=INK)


def colours_of(name: str) -> str:
    """The 256 colours of a map as one string of RRGGBB."""
    return (255 * colormaps[name](np.arange(256))[:, :3]).round().astype(np.uint8).tobytes().hex()


def _plain(*axes: Axes) -> None:
    for axis in axes:
        axis.grid(color=GRID, lw=0.6)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=8, colors=MUTED, length=2)
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(GRID)


def png(figure: Figure) -> bytes:
    """The figure as a PNG file, the same bytes for the same figure."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def save_planes(path: Path, cuts: Sequence[Plane], slices: Stack | None = None) -> None:
    """Store planes without loss of what a picture shows (npz; uncertainty and image as float16), and slices."""
    arrays: dict[str, Any] = {} if slices is None else arrays_of(slices)
    for i, plane in enumerate(cuts):
        low, high = np.percentile(plane.image, (0.5, 99.5))
        # normalised to what is shown: float16 would overflow on raw intensities
        image = (np.clip(plane.image, low, high) - low) / max(high - low, 1e-12)
        arrays[f"image{i}"] = image.astype(np.float16)
        arrays[f"uncertainty{i}"] = plane.uncertainty.astype(np.float16)
        arrays[f"truth{i}"], arrays[f"prediction{i}"] = plane.truth, plane.prediction
        arrays[f"size{i}"] = np.array(plane.size)
    save_arrays(path, **arrays)


def save_arrays(path: Path, **arrays: np.ndarray) -> None:
    """An .npz file, in one write: on a full disk NumPy's zip file would complain again when it is collected."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]  # its stub takes a flag by keyword as well
    path.write_bytes(buffer.getvalue())


def load_planes(path: Path) -> tuple[Plane, ...]:
    """What `save_planes` stored."""
    with np.load(path, allow_pickle=False) as stored:
        count = sum(name.startswith("size") for name in stored)
        return tuple(
            Plane(
                stored[f"image{i}"].astype(np.float32),
                stored[f"truth{i}"],
                stored[f"prediction{i}"],
                stored[f"uncertainty{i}"].astype(np.float32),
                (float(stored[f"size{i}"][0]), float(stored[f"size{i}"][1])),
            )
            for i in range(count)
        )


def load_slices(path: Path) -> Stack | None:
    """The slices that `save_planes` stored; None where there are none."""
    with np.load(path, allow_pickle=False) as stored:
        return stack_of(stored)


@dataclass(frozen=True)
class Arm:
    """One arm of a comparison: per fold the relation and the error detection, and curves over the noise by metric."""

    relation: Sequence[float]
    detection: Sequence[float]
    curves: Mapping[str, Sequence[float]]


def comparison(arms: Mapping[str, Arm], levels: Sequence[str]) -> Figure:
    """Relation against error detection on clean images, and a panel per metric over the levels of noise.

    Args:
        arms: by name, the one that others are compared with first.
        levels: names of the conditions, the clean one first.
    """
    metrics = list(next(iter(arms.values())).curves)
    figure = Figure(figsize=(3.6 * (1 + len(metrics)), 3.6), dpi=_DPI, layout="constrained")
    trade, *panels = figure.subplots(1, 1 + len(metrics))
    for i, (name, arm) in enumerate(arms.items()):
        style = {"color": RUN_COLOURS[i % len(RUN_COLOURS)], "marker": _MARKERS[i % len(_MARKERS)]}
        trade.scatter(arm.relation, arm.detection, s=14, alpha=0.5, **style)
        trade.scatter([np.nanmean(arm.relation)], [np.nanmean(arm.detection)], s=60, label=name, **style)
        for panel, metric in zip(panels, metrics, strict=True):
            panel.plot(range(len(levels)), arm.curves[metric], ms=4.5, lw=1.6, ls=("-", "--")[i % 2], **style)
    trade.set_xlabel("correlation of uncertainty and image gradient", **_FONT)
    trade.set_ylabel("uncertainty-error overlap", **_FONT)
    for panel, metric in zip(panels, metrics, strict=True):
        panel.set_title(metric, loc="left", fontsize=10, color=INK)
        panel.set_xticks(range(len(levels)), levels)
        panel.set_xlabel("mean of the noise", **_FONT)
    figure.legend(loc="outside lower center", ncols=len(arms), frameon=False, fontsize=8.5, labelcolor=INK)
    _plain(trade, *panels)
    return figure
