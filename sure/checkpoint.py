"""Run folders: what a run was told, what it has learned, and how both are written so that a crash cannot tear them."""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import nn

from sure.config import TrainConfig, load_config, to_dict
from sure.data import IGNORE
from sure.errors import UserError
from sure.files import atomic, read_json, write_text
from sure.models import build_model

# Image channels that a run may claim: what a damaged file says is not built.
MOST_CHANNELS = 1024
CHECKPOINTS = ("final", "best", "latest")
Name = Literal["final", "best", "latest"]


@dataclass(frozen=True)
class Experiment:
    """What a run knows of its data: fixed before the first step, kept in run.json."""

    data: str
    layout: str
    num_classes: int
    in_channels: int
    class_names: tuple[str, ...]
    train: tuple[str, ...]
    held_out: tuple[str, ...]
    ignore_label: int | None
    files: str | None = None
    """`sure.data.files_digest` of all cases; None in runs of older versions."""


@dataclass
class Run:
    """A trained network, ready for inference."""

    path: Path
    config: TrainConfig
    model: nn.Module
    num_classes: int
    in_channels: int
    class_names: tuple[str, ...]
    held_out: tuple[str, ...]
    epoch: int
    checkpoint: str
    train: tuple[str, ...] = ()


def checkpoint_path(run: Path, name: str) -> Path:
    return run / "checkpoints" / f"{name}.pt"


def save_checkpoint(run: Path, name: str, state: dict[str, Any]) -> None:
    """Write checkpoints/NAME.pt, whole or not at all. `state` holds tensors and plain values only."""
    path = checkpoint_path(run, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary:
        try:
            with temporary.open("wb") as file:
                torch.save(state, file)
        except RuntimeError as error:  # what torch makes of a write that fails
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise


def read_checkpoint(path: Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """A checkpoint's tensors and plain values; nothing in the file is executed.

    Raises UserError for a file that is missing, is torn, or holds other objects.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles that are then refused
            state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises many kinds for what is not a checkpoint
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path}: not a checkpoint that can be loaded safely: {reason[:200]}") from error
    if not isinstance(state, dict) or "model" not in state:
        raise UserError(f"{path}: expected a checkpoint with the key 'model', found {type(state).__name__}")
    return state


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of a network's weights and buffers, by name."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\0".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write_experiment(run: Path, config: TrainConfig, experiment: Experiment) -> None:
    """config.yaml and run.json of a new run."""
    write_text(run / "config.yaml", yaml.safe_dump(to_dict(config), sort_keys=False))
    write_text(run / "run.json", json.dumps(asdict(experiment), indent=2) + "\n")


def read_experiment(run: Path) -> Experiment:
    """run.json of a run folder. Raises UserError where it is missing or damaged."""
    path = run / "run.json"
    if run.is_file():
        raise UserError(f"{run}: expected a run folder, found a file")
    try:
        values = read_json(path)
        for key in ("class_names", "train", "held_out"):
            if not isinstance(values[key], list) or not all(isinstance(name, str) for name in values[key]):
                raise ValueError(f"{key}: expected a list of names, found {str(values[key])[:80]}")
            values[key] = tuple(values[key])
        for key, least, most in (("num_classes", 2, IGNORE), ("in_channels", 1, MOST_CHANNELS)):
            number = values[key]
            if not isinstance(number, int) or isinstance(number, bool) or not least <= number <= most:
                raise ValueError(f"{key}: expected a whole number from {least} to {most}, found {str(number)[:80]}")
        if len(values["class_names"]) != values["num_classes"]:
            found = len(values["class_names"])
            raise ValueError(f"class_names: expected {values['num_classes']}, one a class, found {found}")
        if len(set(values["class_names"])) < values["num_classes"]:
            raise ValueError(f"class_names: expected different names, found {', '.join(values['class_names'])[:80]}")
        return Experiment(**values)
    except FileNotFoundError as error:
        raise UserError(f"{run}: not a run folder: it has no run.json") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: not the description of a run: {error}") from error


def load_run(run: Path, *, checkpoint: str = "final", device: str | torch.device = "cpu") -> Run:
    """Load a run's network for inference, in eval mode on `device`.

    Raises UserError for a folder that is no run, a checkpoint that does not exist (yet) or does not fit.
    """
    if checkpoint not in CHECKPOINTS:
        raise UserError(f"checkpoint: expected one of {', '.join(CHECKPOINTS)}, got {checkpoint!r}")
    experiment = read_experiment(run)
    config = load_config(run / "config.yaml")
    path = checkpoint_path(run, checkpoint)
    if not path.is_file():
        found = ", ".join(n for n in CHECKPOINTS if checkpoint_path(run, n).is_file()) or "none"
        raise UserError(f"{run}: has no {checkpoint} checkpoint (found: {found}); has its training finished?")
    state = read_checkpoint(path, device)
    try:
        model = build_model(config, experiment.in_channels, experiment.num_classes)
    except UserError as error:
        raise UserError(f"{run / 'config.yaml'}: {error}") from error
    load_weights(model, state["model"], path)
    epoch = state.get("epoch")
    if not isinstance(epoch, int):
        raise UserError(f"{path}: expected the number of epochs under 'epoch', found {epoch!r}")
    return Run(
        run,
        config,
        model.to(device).eval(),
        experiment.num_classes,
        experiment.in_channels,
        experiment.class_names,
        experiment.held_out,
        epoch,
        checkpoint,
        experiment.train,
    )


def load_weights(model: nn.Module, weights: dict[str, Any], source: Path) -> None:
    """Copy `weights` into `model`. Raises UserError naming `source` where they do not fit."""
    own = model.state_dict()
    for name, value in weights.items() if isinstance(weights, dict) else ():
        if isinstance(value, torch.Tensor) and value.is_complex() and name in own:
            raise UserError(f"{source}: weights do not fit the network: {name} is complex, expected {own[name].dtype}")
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = str(error).strip().splitlines()
        raise UserError(f"{source}: weights do not fit the network: {' '.join(reason)[:300]}") from error
