"""What a training run is made of: one flat dataclass, on the command line, in YAML and in every run folder."""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from sure.errors import UserError

LARGEST_PATCH = 2**30
_PRESETS = Path(__file__).parent / "presets"


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the weights a run ends with. Sizes are in voxels, times in epochs."""

    # Data
    spatial_dims: Literal[2, 3] = 3
    """3 trains on volumes, 2 on the slices along the last axis."""
    patch_size: tuple[int, ...] = (48, 48, 48)
    """Training patch and sliding window; smaller images are padded. One number stands for every axis."""
    patches_per_image: int = 1
    """Random patches taken from each image (each slice in 2D) per epoch."""
    folds: int = 5
    """Cases are split into this many folds (a permutation drawn from `seed`)."""
    fold: int = 0
    """The fold held out: never trained on, used for validation."""
    augment: bool = True
    """Random flips and intensity shifts."""

    # Network (MONAI)
    model: Literal["unet", "attention_unet", "segresnet", "dynunet"] = "unet"
    channels: tuple[int, ...] = (16, 32, 64)
    """Feature maps per resolution level."""
    norm: Literal["auto", "instance", "batch"] = "auto"
    """auto: instance; for attention_unet MONAI has batch alone, for segresnet its group norm."""
    dropout: float = 0.0
    checkpoint_activations: bool = False
    """Keep what enters a block instead of all that it computes, and compute it again for the gradient: less memory,
    more time, the same weights."""

    # Objective
    loss: Literal["sure", "edl", "dice_ce"] = "sure"
    """sure: evidential loss and supervised uncertainty; edl: evidential loss alone; dice_ce: MONAI's DiceCELoss."""
    kind: Literal["digamma", "log", "mse"] = "digamma"
    evidence: Literal["softplus", "relu", "exp"] = "softplus"
    prior: tuple[float, ...] = (1.0,)
    """Dirichlet prior: one number, or one per class, each at least 1e-3."""
    ace_weight: float = 10.0
    kl_weight: float = 1.0
    dice_weight: float = 10.0
    dice: Literal["adaptive_tversky", "soft"] = "adaptive_tversky"
    annealing_steps: int | None = None
    """Epochs over which the KL weight rises from 0 to kl_weight; None: a fifth of all, as published."""
    gradient_weight: float = 3.0
    """beta: weight of the gradient supervision on the boundary. Ours, for the correlation; see docs/supervision.md. The
    other forms are of the size of the uncertainty's spread and its square, and want about 50."""
    far_weight: float = 20.0
    """Ours. Weight of the mean uncertainty far from every boundary. Where copies are noised, the far term of their
    loss takes its place, weighted by noise_weight and the last of noise_weights."""
    good_model_step: int | None = None
    """Epoch from which uncertainty is supervised (its weight then rises from 0.01 to 1); None: 30 % of all, as
    published."""
    ranking: Literal["covariance", "correlation", "exact"] = "correlation"
    """Form of the gradient supervision: exact ranks all pairs of an image's boundary voxels."""
    margin: float | None = None
    """For the correlation: how strong a relation is asked for, up to 1; 0 asks for its sign alone. None: 0.3."""
    within_class: bool = False
    """Compare voxels only within a class (PriUS); for the exact ranking."""
    soft: Literal["off", "acdc", "isic"] = "off"
    """PriUS's soft thresholds, with the distances of that configuration, in place of boundary, near and far."""
    relation: Literal["decreasing", "increasing"] = "decreasing"
    boundary: float = 1.0
    """Voxels at most this far from a boundary are on it."""
    near: float = 4.0
    far: float = 4.0
    """Voxels farther than this from every boundary should be certain."""
    noise: Literal["off", "patches", "images"] = "off"
    """Noised copies of each batch that supervise how uncertainty responds to noise: patches around voxels where it does
    not rise (SURE; three more forward passes), or whole images (PriUS; two more)."""
    noise_weight: float = 1.0
    """gamma. Ours: the published value is not known."""
    noise_weights: tuple[float, ...] = (1.0, 1.0, 1.0)
    """Within it: of the rise with the level, of its fall with the distance, and far from every boundary. Ours."""
    noise_means: tuple[float, ...] = (0.0, 1.0)
    """Range of the noise's mean in patches, in standard deviations of the image."""
    noise_std: float = 0.3
    """Of the noise in patches; of whole images the largest, reached at 90 % of the epochs."""
    noise_patch: int = 3
    """Width of a patch: published 3 (ACDC) and 7 (REFUGE)."""
    noise_patches: int = 3
    """Patches for each class in an image."""
    noise_statistics: Literal["frozen", "updated"] = "frozen"
    """Whether noised images enter the running statistics of batch normalisation; updated: as published."""

    # Optimisation
    epochs: int = 100
    batch_size: int = 4
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    lr: float = 1e-3
    weight_decay: float = 0.0
    schedule: Literal["constant", "cosine", "poly"] = "cosine"
    accumulate: int = 1
    """Batches per optimiser step."""
    clip: float | None = 12.0
    """Largest gradient norm; None does not clip."""
    amp: Literal["off", "bf16", "fp16"] = "off"
    compile: bool = False
    """torch.compile the network."""
    seed: int = 0
    validate_every: int = 10
    """Epochs between validations on the held-out fold (0: never). Picks `best.pt`; `final.pt` does not depend on it."""
    warm_start: Path | None = None
    """Checkpoint whose weights training starts from."""

    def __post_init__(self) -> None:
        problems = list(_problems(self))
        if problems:
            raise UserError("configuration: " + "; ".join(problems))

    @property
    def patch(self) -> tuple[int, ...]:
        """`patch_size` with one entry per spatial axis."""
        return self.patch_size * self.spatial_dims if len(self.patch_size) == 1 else self.patch_size

    @property
    def kl_epochs(self) -> float:
        """`annealing_steps`, or what it stands for."""
        return 0.2 * self.epochs if self.annealing_steps is None else self.annealing_steps

    @property
    def correlation_margin(self) -> float:
        """`margin`, or what it stands for: 0 for the other forms."""
        if self.margin is None:
            return 0.3 if self.ranking == "correlation" else 0.0
        return self.margin

    @property
    def supervised_from(self) -> float:
        """`good_model_step`, or what it stands for."""
        return 0.3 * self.epochs if self.good_model_step is None else self.good_model_step


def _problems(c: TrainConfig) -> typing.Iterator[str]:
    empty = [f.name for f in dataclasses.fields(c) if getattr(c, f.name) == ()]
    if empty:
        yield f"{', '.join(empty)}: expected one number or more, got none"
        return
    if len(c.patch_size) not in (1, c.spatial_dims):
        yield f"patch_size: expected 1 or {c.spatial_dims} numbers, got {c.patch_size}"
    if min(c.patch_size) < 1:
        yield f"patch_size: expected positive numbers, got {c.patch_size}"
    if math.prod(c.patch) > LARGEST_PATCH:
        yield f"patch_size: expected at most 2^30 voxels in all, got {c.patch_size}"
    if c.folds < 2 or not 0 <= c.fold < c.folds:
        yield f"fold: expected 0 <= fold < folds and folds >= 2, got fold {c.fold} of {c.folds}"
    if len(c.channels) < 2 or min(c.channels) < 1:
        yield f"channels: expected at least two positive numbers, got {c.channels}"
    for name in ("epochs", "batch_size", "accumulate", "patches_per_image"):
        if getattr(c, name) < 1:
            yield f"{name}: expected at least 1, got {getattr(c, name)}"
    for field in dataclasses.fields(c):
        value = getattr(c, field.name)
        numbers = value if isinstance(value, tuple) else (value,)
        if any(isinstance(v, float) and not 0 <= v < math.inf for v in numbers):
            yield f"{field.name}: expected finite numbers of at least 0, got {value}"
    if c.lr == 0:
        yield f"lr: expected a positive number, got {c.lr}"
    if c.seed >= 2**63:
        yield f"seed: expected less than 2^63, got {c.seed}"
    if c.clip is not None and c.clip <= 0:
        yield f"clip: expected a positive number or none, got {c.clip}"
    for name in ("annealing_steps", "good_model_step", "validate_every", "seed"):
        if (getattr(c, name) or 0) < 0:
            yield f"{name}: expected 0 or more, got {getattr(c, name)}"
    if c.loss == "sure" and c.epochs >= 1 and c.supervised_from >= c.epochs:
        yield f"good_model_step: expected less than epochs, {c.epochs}, got {c.good_model_step} (none for 30 % of them)"
    if c.within_class and c.ranking != "exact":
        yield f"within_class: expected ranking exact with it, got {c.ranking}"
    if c.margin is not None and (c.margin > 1 or c.ranking != "correlation"):
        yield f"margin: expected at most 1, and ranking correlation with it, got {c.margin:g} with {c.ranking}"
    if len(c.noise_weights) != 3:
        yield f"noise_weights: expected 3 numbers, got {c.noise_weights}"
    if len(c.noise_means) != 2 or c.noise_means[0] > c.noise_means[1]:
        yield f"noise_means: expected 2 numbers in order, got {c.noise_means}"
    if c.noise_patch < 1 or c.noise_patch % 2 == 0 or c.noise_patch > min(c.patch_size):
        yield f"noise_patch: expected an odd number up to the patch size, got {c.noise_patch}"
    if c.noise_patches < 1:
        yield f"noise_patches: expected at least 1, got {c.noise_patches}"
    if c.soft != "off" and c.noise == "patches":
        yield "soft: expected noise off or images with soft thresholds, which weight all voxels, got patches"
    if not c.boundary <= c.near <= c.far:
        yield f"boundary, near, far: expected boundary <= near <= far, got {c.boundary:g}, {c.near:g}, {c.far:g}"
    step = 2 ** (len(c.channels) - 1)
    if any(size % step or size < 2 * step for size in c.patch_size):
        levels = f"{len(c.channels)} resolution levels"
        yield f"patch_size: expected multiples of {step} from {2 * step} on for {levels}, got {c.patch_size}"
    if c.model == "attention_unet" and c.norm == "instance":
        yield "norm: attention_unet has batch normalisation alone, got instance"
    if c.model == "dynunet" and len(c.channels) < 3:
        yield f"channels: dynunet has at least 3 resolution levels, got {c.channels}"
    if c.model == "segresnet":
        doubled = tuple(c.channels[0] * 2**i for i in range(len(c.channels)))
        if c.channels != doubled or c.channels[0] % 8:
            yield f"channels: segresnet expects multiples of 8 that double from level to level, got {c.channels}"
    if min(c.prior) < 1e-3:
        yield f"prior: expected entries of at least 1e-3, got {c.prior}"
    if not 0 <= c.dropout < 1:
        yield f"dropout: expected a number in [0, 1), got {c.dropout}"


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Plain values that YAML and JSON can hold."""
    plain = dataclasses.asdict(config)
    return {k: list(v) if isinstance(v, tuple) else str(v) if isinstance(v, Path) else v for k, v in plain.items()}


def changes(before: TrainConfig, now: TrainConfig) -> list[str]:
    """The settings that differ, each with both values."""
    old, new = to_dict(before), to_dict(now)
    return [f"{key} was {old[key]!r}, is {new[key]!r}" for key in new if old[key] != new[key]]


_NAMES = tuple(field.name for field in dataclasses.fields(TrainConfig))
_LAST_OF_OBJECTIVE = _NAMES.index("noise_statistics") + 1
OBJECTIVE = _NAMES[_NAMES.index("loss") : _LAST_OF_OBJECTIVE]
"""Settings of the objective."""
SUPERVISION = _NAMES[_NAMES.index("gradient_weight") : _LAST_OF_OBJECTIVE]
"""Those that the supervision of uncertainty alone reads."""


def unused_settings(config: TrainConfig, start: TrainConfig) -> str:
    """Settings of the supervision that were changed from `start` and have no effect, and why; empty where all have."""
    names: Sequence[str] = ()
    if config.loss != "sure":
        names, why = SUPERVISION, f"loss {config.loss}"
    elif config.noise == "off":
        names, why = [name for name in SUPERVISION if name.startswith("noise_")], "noise off"
    elif config.noise_weight > 0 and max(config.noise_weights) > 0:
        names, why = ("far_weight", "far"), f"noise {config.noise}, whose loss has a far term of its own"
    changed = [name for name in names if getattr(config, name) != getattr(start, name)]
    return f"{', '.join(changed)}: without effect for {why}" if changed else ""


def from_dict(values: dict[str, Any], *, source: str = "configuration") -> TrainConfig:
    """A config from plain values; unknown keys and wrong types raise UserError naming `source` and the key."""
    hints = typing.get_type_hints(TrainConfig)
    unknown = sorted(str(key) for key in set(values) - set(hints))
    if unknown:
        raise UserError(f"{source}: unknown keys {', '.join(unknown)}; known are {', '.join(hints)}")
    checked = {k: _coerce(v, hints[k], f"{source}: {k}") for k, v in values.items()}
    try:
        return TrainConfig(**checked)
    except UserError as error:
        raise UserError(str(error).replace("configuration", source, 1)) from error


def presets() -> list[str]:
    """Names of the settings that come with the package."""
    return sorted(p.name.removesuffix(".yaml") for p in _PRESETS.iterdir() if p.name.endswith(".yaml"))


def load_preset(name: str, base: TrainConfig | None = None) -> TrainConfig:
    """The settings of a preset, or with `base` its objective alone, times in proportion, the rest as there.

    Comments in a preset's file say which settings are published.
    """
    if name not in presets():
        raise UserError(f"preset: expected one of {', '.join(presets())}, got {name!r}")
    config = load_config(_PRESETS / f"{name}.yaml")
    if base is None:
        return config
    objective = {key: getattr(config, key) for key in OBJECTIVE}
    for key in ("annealing_steps", "good_model_step"):
        if objective[key] is not None:
            objective[key] = round(objective[key] * base.epochs / config.epochs)
    try:
        return dataclasses.replace(base, **objective)
    except UserError as error:
        raise UserError(f"preset {name}: {error}") from error


class _Loader(yaml.SafeLoader):
    """YAML as its standard has it: PyYAML would take the last of equal keys and drop the others, and 4e-3 for text."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge" and (key.tag, key.value) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is set twice", key.start_mark)
            if isinstance(key.value, str):
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def load_config(path: Path, base: TrainConfig | None = None) -> TrainConfig:
    """Read a YAML file of TrainConfig fields; fields left out are those of `base`, or the defaults.

    `-` in keys is taken for `_`, as the command line has them.
    """
    try:
        # A safe loader: it builds plain values alone.
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise UserError(f"{path}: cannot be read as YAML: nested too deeply") from error
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of settings, got {type(values).__name__}")
    spelt = {key.replace("-", "_") if isinstance(key, str) else key: key for key in values}
    if len(spelt) < len(values):
        twice = sorted(str(key) for key in set(values) - set(spelt.values()))
        raise UserError(f"{path}: {', '.join(twice)} is set twice, once with - and once with _")
    named = {name: values[key] for name, key in spelt.items()}
    return from_dict({**({} if base is None else to_dict(base)), **named}, source=str(path))


def _coerce(value: Any, hint: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if type(None) in args and value in (None, "none", "None"):  # YAML's own is null
            return None
        (inner,) = (a for a in args if a is not type(None))
        return _coerce(value, inner, where)
    if origin is Literal:
        if value is False and "off" in args:  # what YAML makes of a bare off
            return "off"
        if value not in args:
            raise UserError(f"{where}: expected one of {', '.join(map(str, args))}, got {value!r}")
        return value
    if origin is tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_coerce(item, args[0], where) for item in items)
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise UserError(f"{where}: expected a 64-bit number, got a larger one")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if not isinstance(value, hint) or (hint in (int, float) and isinstance(value, bool)):
        raise UserError(f"{where}: expected {hint.__name__}, got {value!r}")
    return value
