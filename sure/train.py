"""Training: from a data set to a run folder that can be evaluated, resumed and reported on.

Whatever is random in an epoch (order, patches, augmentation, dropout) is drawn from (seed, epoch) alone. A run that
was interrupted therefore continues from its last epoch to the weights an uninterrupted one would have reached; on
the CPU to the bit.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from monai.metrics import DiceMetric
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from sure.checkpoint import (
    Experiment,
    Run,
    checkpoint_path,
    load_weights,
    read_checkpoint,
    read_experiment,
    save_checkpoint,
    write_experiment,
)
from sure.config import TrainConfig, load_config, to_dict
from sure.data import (
    IGNORE,
    Case,
    Dataset,
    TrainingData,
    check_dataset,
    discover,
    format_faults,
    load_case,
    split_cases,
)
from sure.errors import UserError
from sure.files import write_text
from sure.inference import infer
from sure.models import build_model
from sure.objective import build_objective, frozen_statistics
from sure_kernels.doctor import versions

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def train(
    data: Path,
    out: Path,
    config: TrainConfig,
    *,
    resume: bool = False,
    skip_bad: bool = False,
    device: str = "auto",
    workers: int = 0,
    progress: bool = True,
) -> Path:
    """Train a network on the data set at `data` and return the run folder `out`.

    The run folder holds config.yaml, run.json (classes, split), environment.json, metrics.jsonl (a line an epoch),
    tensorboard/ and checkpoints/ (latest.pt after every epoch, best.pt by validation Dice, final.pt at the end).

    Args:
        data: data set in a known layout (see `sure.data.discover`).
        out: new or empty folder, or, with `resume`, one that an interrupted run left.
        config: what decides the weights.
        resume: continue from the last complete epoch, if there is one.
        skip_bad: train on the cases without faults instead of refusing.
        device: `auto` (a GPU where there is one), or what torch.device takes.
        workers: processes that prepare patches; 0 does it in this one.
        progress: show progress bars on stderr.

    Raises:
        UserError: faulty data (one table names every fault), a folder that is taken, a run that does not match,
            a loss that is not finite. Before the first step nothing is written.
    """
    place = choose_device(device)
    if workers < 0:
        raise UserError(f"workers: expected 0 or more, got {workers}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("WORLD_SIZE: `sure train` runs in one process, found several (torchrun?)")
    dataset, experiment, cases = _prepare(data, config, skip_bad=skip_bad, progress=progress)
    start = _check_run_folder(out, config, experiment, resume=resume)
    held_out = [c for c in cases if c.name in experiment.held_out]
    trainer = _Trainer(out, config, experiment, place)
    warm = None if config.warm_start is None or start else read_checkpoint(config.warm_start, place)
    if warm is not None and config.warm_start is not None:
        _check_warm_start(config.warm_start, experiment)
        load_weights(trainer.model, warm["model"], config.warm_start)
    samples = TrainingData([c for c in cases if c.name in experiment.train], config, ignore_label=dataset.ignore_label)

    if start:
        trainer.restore()
    else:
        write_experiment(out, config, experiment)
    write_text(out / "environment.json", json.dumps(_environment(place), indent=2) + "\n")
    _keep_metrics_before(out / "metrics.jsonl", trainer.epoch)
    with SummaryWriter(str(out / "tensorboard"), purge_step=trainer.epoch) as board:
        for epoch in tqdm(
            range(trainer.epoch, config.epochs),
            desc=f"training {out.name}",
            unit="epoch",
            initial=trainer.epoch,
            total=config.epochs,
            disable=not progress,
        ):
            record = trainer.run_epoch(epoch, samples, workers)
            last = epoch + 1 == config.epochs
            if held_out and config.validate_every and (last or (epoch + 1) % config.validate_every == 0):
                record |= trainer.validate(held_out, dataset.ignore_label)
            with (out / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(_strict(record)) + "\n")
            for key, value in record.items():
                if isinstance(value, float):
                    board.add_scalar(key, value, epoch)
            trainer.save(record)
    save_checkpoint(out, "final", trainer.weights())
    return out


def choose_device(device: str) -> torch.device:
    """The device that `auto` or a name stands for. Raises UserError where it is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        float(torch.zeros(1, device=place))
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device: {device!r} cannot be used: {str(error).strip().splitlines()[0]}") from error
    return place


def _prepare(
    data: Path, config: TrainConfig, *, skip_bad: bool, progress: bool
) -> tuple[Dataset, Experiment, list[Case]]:
    """Find, check and split the cases. Raises UserError with one table of all faults unless they may be skipped."""
    dataset = discover(data)
    num_classes, faults = check_dataset(dataset, progress=progress)
    if faults:
        table = format_faults(faults)
        if not skip_bad:
            raise UserError(f"{data}: {len(faults)} faults\n{table}\n--skip-bad trains on the cases without faults")
        bad = {fault.case for fault in faults}
        dataset = replace(dataset, cases=tuple(c for c in dataset.cases if c.name not in bad), problems=())
        tqdm.write(f"{data}: leaving out {len(bad)} cases with faults\n{table}", file=sys.stderr)
        if not dataset.cases:
            raise UserError(f"{data}: no case without faults is left")
        num_classes, _ = check_dataset(dataset)  # what the rejected cases held does not count
    if len(config.prior) not in (1, num_classes):
        raise UserError(f"prior: expected 1 or {num_classes} numbers, one a class, got {len(config.prior)}")
    cases = list(dataset.cases)
    chosen, held_out = split_cases(cases, config.folds, config.fold, config.seed)
    experiment = Experiment(
        str(data),
        dataset.layout,
        num_classes,
        int(load_case(cases[0], ignore_label=dataset.ignore_label).image.shape[0]),
        dataset.class_names or tuple(f"class {i}" if i else "background" for i in range(num_classes)),
        tuple(c.name for c in chosen),
        tuple(c.name for c in held_out),
        dataset.ignore_label,
    )
    return dataset, experiment, cases


def _check_run_folder(out: Path, config: TrainConfig, experiment: Experiment, *, resume: bool) -> bool:
    """Whether a checkpoint to continue from lies in `out`. Raises UserError where the folder is something else."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: expected a folder, found a file")
    taken = out.is_dir() and any(out.iterdir())
    if not taken:
        return False
    if not resume:
        raise UserError(f"{out}: is not empty; --resume continues the run in it, another --out begins a new one")
    if not (out / "run.json").is_file():
        # Killed between its first two files, or no run at all.
        left = sorted(p.name for p in out.iterdir() if p.name != "config.yaml" and not p.name.endswith(".tmp"))
        if left:
            raise UserError(f"{out}: not a run folder: it has no run.json, but {', '.join(left[:5])}")
        return False
    for torn in (out / "checkpoints").glob(".*.tmp"):  # of a process that was killed
        torn.unlink(missing_ok=True)
    before, now = to_dict(load_config(out / "config.yaml")), to_dict(config)
    changed = [f"{k} was {before[k]!r}, is {now[k]!r}" for k in now if before[k] != now[k]]
    stored = read_experiment(out)
    changed += [
        f"{k} of the data set changed"
        for k in ("num_classes", "in_channels", "train", "held_out")
        if getattr(stored, k) != getattr(experiment, k)
    ]
    if changed:
        raise UserError(f"{out}: cannot resume another run: {'; '.join(changed)}")
    return checkpoint_path(out, "latest").is_file()


@dataclass
class _Trainer:
    """The network, its optimiser and objective, and the epochs done."""

    out: Path
    config: TrainConfig
    experiment: Experiment
    device: torch.device

    def __post_init__(self) -> None:
        torch.manual_seed(self.config.seed)
        model = build_model(self.config, self.experiment.in_channels, self.experiment.num_classes)
        self.model = model.to(self.device)
        self.network: nn.Module = torch.compile(self.model) if self.config.compile else self.model  # type: ignore[assignment]
        self.objective = build_objective(self.config)
        self.optimizer = _optimizer(self.model, self.config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.config.amp == "fp16")
        self.epoch = 0
        self.best = -math.inf

    def run_epoch(self, epoch: int, samples: TrainingData, workers: int) -> dict[str, Any]:
        """One pass over the samples; mean loss, terms and other numbers worth keeping."""
        began = time.perf_counter()
        config = self.config
        samples.set_epoch(epoch)
        # One stream for the epoch's order and dropout, whatever came before it.
        torch.manual_seed(_mix(config.seed, epoch))
        loader = DataLoader(
            samples,
            batch_size=config.batch_size,
            shuffle=True,
            generator=torch.Generator().manual_seed(_mix(config.seed, epoch)),
            num_workers=workers,
            pin_memory=self.device.type == "cuda",
        )
        self.objective.set_epoch(epoch)
        rate = _learning_rate(config, epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        totals: dict[str, Tensor] = {}
        batches = len(loader)
        self.optimizer.zero_grad(set_to_none=True)
        for index, batch in enumerate(loader):
            image, label = (batch[k].to(self.device, non_blocking=True) for k in ("image", "label"))
            try:
                loss, terms = self.objective(self._logits(image), label, image, self._noised_logits)
            except ValueError as error:  # NaN logits are named by the loss itself
                raise self._diverged(f"{error} in epoch {epoch}, batch {index}") from error
            if not bool(torch.isfinite(loss)):
                raise self._diverged(f"loss is {float(loss.detach())} in epoch {epoch}, batch {index}")
            # The last group of an epoch may be smaller.
            group_size = min(config.accumulate, batches - index // config.accumulate * config.accumulate)
            self.scaler.scale(loss / group_size).backward()
            if (index + 1) % config.accumulate == 0 or index + 1 == batches:
                self._step()
            for key, value in {"loss": loss.detach(), **terms}.items():
                totals[key] = totals.get(key, torch.zeros((), device=self.device)) + value
        if not all(bool(torch.isfinite(p).all()) for p in self.model.parameters()):
            raise self._diverged(f"weights are no longer finite after epoch {epoch}")
        self.epoch = epoch + 1
        means = {key: float(value) / batches for key, value in totals.items()}
        return {"epoch": epoch, "lr": rate, "seconds": time.perf_counter() - began, **means}

    def _diverged(self, what: str) -> UserError:
        latest = checkpoint_path(self.out, "latest")
        kept = f"the last good checkpoint is {latest}" if latest.is_file() else "no checkpoint was written"
        return UserError(f"training diverged: {what}; {kept}. A lower --lr or --clip often helps.")

    def _logits(self, image: Tensor) -> Tensor:
        dtype = AMP_DTYPES.get(self.config.amp)
        with nullcontext() if dtype is None else torch.autocast(self.device.type, dtype):
            return self.network(image)

    def _noised_logits(self, image: Tensor) -> Tensor:
        with frozen_statistics(self.model) if self.config.noise_statistics == "frozen" else nullcontext():
            return self._logits(image)

    def _step(self) -> None:
        if self.config.clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def validate(self, cases: list[Case], ignore_label: int | None) -> dict[str, Any]:
        """Mean Dice of each foreground class over the held-out cases."""
        run = Run(
            self.out,
            self.config,
            self.model.eval(),
            self.experiment.num_classes,
            self.experiment.in_channels,
            self.experiment.class_names,
            self.experiment.held_out,
            self.epoch,
            "latest",
        )
        dice = DiceMetric(include_background=False, reduction="mean_batch", num_classes=self.experiment.num_classes)
        for case in cases:
            loaded = load_case(case, ignore_label=ignore_label)
            assert loaded.label is not None
            counted = loaded.label != IGNORE
            predicted = torch.where(counted[0], infer(run, loaded.image[None]).label, 0)
            dice(predicted[None, None], torch.where(counted, loaded.label, 0)[None])
        values = [float(v) for v in dice.aggregate()]  # type: ignore[union-attr]
        known = [v for v in values if not math.isnan(v)]
        names = self.experiment.class_names[1:]
        result = {f"dice {name}": value for name, value in zip(names, values, strict=True)}
        return {**result, "mean dice": sum(known) / len(known) if known else math.nan}

    def weights(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "epoch": self.epoch}

    def save(self, record: dict[str, Any]) -> None:
        """Write latest.pt, and best.pt where this epoch is."""
        score = record.get("mean dice", math.nan)
        if score > self.best:
            self.best = score
            save_checkpoint(self.out, "best", self.weights())
        save_checkpoint(
            self.out,
            "latest",
            {
                **self.weights(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "objective": self.objective.state_dict(),
                "best": self.best,
            },
        )

    def restore(self) -> None:
        """Continue from latest.pt."""
        path = checkpoint_path(self.out, "latest")
        state = read_checkpoint(path, self.device)
        load_weights(self.model, state["model"], path)
        try:
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            self.objective.load_state_dict(state["objective"])
            self.epoch, self.best = int(state["epoch"]), float(state["best"])
        except (KeyError, ValueError, RuntimeError) as error:
            raise UserError(f"{path}: cannot be resumed: {error}") from error


def _check_warm_start(checkpoint: Path, experiment: Experiment) -> None:
    """UserError where the weights come from a run on the same data that was trained on what is held out now."""
    folder = checkpoint.parent.parent
    if not (folder / "run.json").is_file():
        return
    source = read_experiment(folder)
    seen = sorted(set(source.train) & set(experiment.held_out))
    if source.data == experiment.data and seen:
        raise UserError(
            f"warm_start: {checkpoint} was trained on {len(seen)} cases that this fold holds out, {seen[0]} among them"
        )


def _optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    parameters = model.parameters()
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, config.lr, momentum=0.99, nesterov=True, weight_decay=config.weight_decay)
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, config.lr, weight_decay=config.weight_decay)


def _learning_rate(config: TrainConfig, epoch: int) -> float:
    """The rate of an epoch: a function of the epoch alone, so that there is no state to restore."""
    done = epoch / config.epochs
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * done))
    if config.schedule == "poly":
        return config.lr * (1 - done) ** 0.9
    return config.lr


def _mix(seed: int, epoch: int) -> int:
    """A seed for (seed, epoch) that no other pair of small numbers shares."""
    return (seed * 1_000_003 + epoch * 7_919 + 1) % (1 << 62)


def _environment(device: torch.device) -> dict[str, Any]:
    names = ("sure-kernels", "torch", "triton", "monai", "numpy", "nibabel", "scipy")
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {**versions(*names), "device": str(device), "gpu": gpu, "threads": torch.get_num_threads()}


def _strict(record: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


def _keep_metrics_before(path: Path, epoch: int) -> None:
    """Drop lines of epochs that will be run again, and a line cut short by a crash."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["epoch"] < epoch:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    write_text(path, "".join(kept))
