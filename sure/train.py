"""Training: from a data set to a run folder that can be evaluated, resumed and reported on.

Whatever is random in an epoch (order, patches, augmentation, dropout) is drawn from (seed, epoch) alone. A run that
was interrupted therefore continues from its last epoch to the weights an uninterrupted one would have reached; on
the CPU to the bit.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, RandomSampler, Sampler
from torch.utils.data._utils.signal_handling import _error_if_any_worker_fails
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
from sure.config import TrainConfig, changes, load_config
from sure.data import (
    IGNORE,
    Case,
    Dataset,
    TrainingData,
    check_dataset,
    discover,
    files_digest,
    format_faults,
    load_case,
    spacings_differ,
    split_cases,
)
from sure.distributed import (
    Processes,
    data_parallel,
    joined,
    local_part,
    local_rank,
    rank_and_size,
    shard,
    sharded_like,
    whole,
)
from sure.errors import SharedError, UserError
from sure.files import check_writable, resolved, write_text
from sure.inference import infer
from sure.models import build_model, checkpoint_activations
from sure.objective import build_objective, frozen_statistics
from sure.scoring import dice
from sure_kernels.doctor import versions
from sure_kernels.kernel_lib.special import evidence

COLLAPSED = 1e-3
"""Evidence of all classes, as a share of the prior's, under which there is none: the vacuity is 1 - 1e-3."""
_RANK_STRIDE = 1 << 40
"""Between the seeds of the processes: beyond those of epochs and small seeds."""

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
    fsdp: bool = False,
    cache: Path | None = None,
    progress: bool = True,
) -> Path:
    """Train a network on the data set at `data` and return the run folder `out`.

    Under torchrun every process calls it with the same arguments; they share each batch, and the first one writes
    (docs/scale.md). The run folder holds config.yaml, run.json (classes, split), environment.json, metrics.jsonl (a
    line an epoch), tensorboard/ and checkpoints/ (latest.pt after every epoch, best.pt by validation Dice, final.pt at
    the end).

    Args:
        data: data set in a known layout (see `sure.data.discover`).
        out: new or empty folder, or, with `resume`, one that an interrupted run left.
        config: what decides the weights.
        resume: continue from the last complete epoch, if there is one.
        skip_bad: train on the cases without faults instead of refusing.
        device: `auto` (a GPU where there is one), or what torch.device takes; of several processes each takes its own.
        workers: processes that prepare patches; 0 does it in this one.
        fsdp: of several processes each keeps a share of the weights and of the optimiser's state (FSDP2), not all.
        cache: folder for uncompressed volumes, from which patches are read in place of memory (`TrainingData`).
        progress: show progress bars on stderr.

    Raises:
        UserError: faulty data (one table names every fault), a folder that is taken, a run that does not match,
            a loss that is not finite. Before the first step nothing is written.
    """
    place = choose_device(_own(device))
    if workers < 0:
        raise UserError(f"workers: expected 0 or more, got {workers}")
    with joined(place) as processes:
        _check_processes(config, processes, fsdp)
        dataset, experiment, cases, start = processes.agree(
            lambda: _begin(data, out, config, resume, skip_bad, progress)
        )
        trainer = _Trainer(out, config, experiment, place, processes, fsdp)
        if config.warm_start is not None and not start:
            _check_warm_start(config.warm_start, experiment)
            trainer.load(read_checkpoint(config.warm_start, place)["model"], config.warm_start)
        chosen = [c for c in cases if c.name in experiment.train]
        read = partial(TrainingData, chosen, config, ignore_label=dataset.ignore_label, cache=cache)
        if cache is not None:
            processes.agree(lambda: read().names)  # the first one fills it
        samples = read()
        held_out = [c for c in cases if c.name in experiment.held_out]
        if start:
            trainer.restore()
        _run(trainer, samples, held_out, start, workers, progress)
    return out


def _begin(
    data: Path, out: Path, config: TrainConfig, resume: bool, skip_bad: bool, progress: bool
) -> tuple[Dataset, Experiment, list[Case], bool]:
    """Data set, experiment and cases, checked; and whether there is a checkpoint to continue from."""
    dataset, experiment, cases = _prepare(data, config, skip_bad=skip_bad, progress=progress)
    return dataset, experiment, cases, _check_run_folder(out, config, experiment, resume=resume)


def _run(
    trainer: _Trainer, samples: TrainingData, held_out: list[Case], start: bool, workers: int, progress: bool
) -> None:
    """All epochs that are left. The first process writes the run folder."""
    out, config, first = trainer.out, trainer.config, trainer.processes.first
    if first:
        if not start:
            write_experiment(out, config, trainer.experiment)
        environment = _environment(trainer.device) | {"processes": trainer.processes.size}
        write_text(out / "environment.json", json.dumps(environment, indent=2) + "\n")
        _keep_metrics_before(out / "metrics.jsonl", trainer.epoch)
    with SummaryWriter(str(out / "tensorboard"), purge_step=trainer.epoch) if first else nullcontext() as board:
        for epoch in tqdm(
            range(trainer.epoch, config.epochs),
            desc=f"training {out.name}",
            unit="epoch",
            initial=trainer.epoch,
            total=config.epochs,
            disable=not progress or not first,
        ):
            with _one_line_worker_errors():
                record = trainer.run_epoch(epoch, samples, workers)
            last = epoch + 1 == config.epochs
            if held_out and config.validate_every and (last or (epoch + 1) % config.validate_every == 0):
                record |= trainer.validate(held_out)
            if board is not None:
                with (out / "metrics.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps(_strict(record)) + "\n")
                with _interrupts_wait():
                    for key, value in record.items():
                        if isinstance(value, float):
                            board.add_scalar(key, value, epoch)
            trainer.save(record)
    weights = trainer.weights()
    if first:
        save_checkpoint(out, "final", weights)


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Ctrl-C is answered afterwards: in the middle of a queue's `put`, the writer's thread might never wake again."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[tuple[int, FrameType | None]] = []
    before = signal.signal(signal.SIGINT, lambda *received: caught.append(received))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if caught and callable(before):
        before(*caught[0])


def _own(device: str) -> str:
    """The GPU of this process, where several share the work and none is named."""
    several = rank_and_size()[1] > 1
    return f"cuda:{local_rank()}" if several and device in ("auto", "cuda") and torch.cuda.is_available() else device


def _check_processes(config: TrainConfig, processes: Processes, fsdp: bool) -> None:
    if config.batch_size % processes.size:
        raise SharedError(f"batch_size: expected a multiple of the {processes.size} processes, got {config.batch_size}")
    if fsdp and processes.size == 1:
        raise UserError("fsdp: expected several processes, which torchrun starts, found one")
    if fsdp and config.amp == "fp16":
        raise SharedError("amp: expected off or bf16 with fsdp, got fp16")


@contextmanager
def _one_line_worker_errors() -> Iterator[None]:
    """Errors in the processes that prepare patches, without the traceback that crosses over with them."""
    try:
        yield
    except UserError as error:
        # What a worker raised comes with its traceback, the message last.
        line = str(error).strip().splitlines()[-1]
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(line.removeprefix(f"{UserError.__module__}.{UserError.__name__}: ")) from error
    except (RuntimeError, ConnectionError, EOFError) as error:
        # The pipe from a process that dies may break before torch is told of the death.
        broken = not isinstance(error, RuntimeError | BrokenPipeError)  # that would be of stdout or stderr
        death = _death_of_a_worker() if broken else error
        if "DataLoader worker" not in str(death):
            raise
        reason = str(death).strip().splitlines()[0]
        raise UserError(
            f"workers: a process that prepares patches has died ({reason}), often for want of memory; --resume "
            "continues from the last complete epoch, fewer --workers need less"
        ) from error


def _death_of_a_worker(patience: float = 5.0) -> RuntimeError | None:
    """What torch raises for a process of a DataLoader that has died, by the time its signal comes."""
    end = time.monotonic() + patience
    try:
        while time.monotonic() < end:
            _error_if_any_worker_fails()
            time.sleep(0.05)
    except RuntimeError as death:
        return death
    return None


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
    num_classes, faults = check_dataset(dataset, spatial_dims=config.spatial_dims, progress=progress)
    if faults:
        table = format_faults(faults)
        if not skip_bad:
            raise UserError(f"{data}: {len(faults)} faults\n{table}\n--skip-bad trains on the cases without faults")
        bad = {fault.case for fault in faults}
        dataset = replace(dataset, cases=tuple(c for c in dataset.cases if c.name not in bad), problems=())
        tqdm.write(f"{data}: leaving out {len(bad)} cases with faults\n{table}", file=sys.stderr)
        if not dataset.cases:
            raise UserError(f"{data}: no case without faults is left")
        num_classes, faults = check_dataset(dataset)  # what the rejected cases held does not count
        if faults:
            raise UserError(f"{data}: without these cases {len(faults)} faults are left\n{format_faults(faults)}")
    if progress and (note := spacings_differ(dataset)):
        tqdm.write(f"{data}: {note}; nothing is resampled, and the losses count in voxels", file=sys.stderr)
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
        files_digest(cases),
    )
    return dataset, experiment, cases


def _check_run_folder(out: Path, config: TrainConfig, experiment: Experiment, *, resume: bool) -> bool:
    """Whether a checkpoint to continue from lies in `out`. Raises UserError where the folder is something else."""
    if out.is_file():
        raise UserError(f"{out}: expected a folder, found a file")
    check_writable(out)
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
    changed = changes(load_config(out / "config.yaml"), config)
    stored = read_experiment(out)
    changed += [
        f"{k} of the data set changed"
        for k in ("num_classes", "in_channels", "train", "held_out", "files")
        if getattr(stored, k) not in (getattr(experiment, k), None)
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
    processes: Processes
    fsdp: bool

    def __post_init__(self) -> None:
        torch.manual_seed(self.config.seed)
        model = build_model(self.config, self.experiment.in_channels, self.experiment.num_classes)
        self.model = model.to(self.device)
        if self.config.checkpoint_activations:
            checkpoint_activations(self.model)
        self.network: nn.Module = self.model
        if self.fsdp:
            shard(self.model, self.processes.group)
        elif self.processes.group is not None:
            self.network = data_parallel(self.model)
        if self.config.compile:
            self.network = torch.compile(self.network)  # type: ignore[assignment]
        self.objective = build_objective(self.config, self.processes.group)
        self.optimizer = _optimizer(self.model, self.config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.config.amp == "fp16")
        self.epoch = 0
        self.best = -math.inf

    def run_epoch(self, epoch: int, samples: TrainingData, workers: int) -> dict[str, Any]:
        """One pass over the samples; mean loss, terms and other numbers worth keeping."""
        began = time.perf_counter()
        config, size = self.config, self.processes.size
        samples.set_epoch(epoch)
        # One stream for the epoch's order and dropout, whatever came before it; the processes share the order alone.
        torch.manual_seed(_mix(config.seed, epoch) + _RANK_STRIDE * self.processes.rank)
        generator = torch.Generator().manual_seed(_mix(config.seed, epoch))
        loader = DataLoader(
            samples,
            batch_size=config.batch_size // size,
            sampler=_Shard(RandomSampler(samples, generator=generator), self.processes),
            generator=generator,
            num_workers=workers,
            pin_memory=self.device.type == "cuda",
        )
        self.objective.set_epoch(epoch)
        rate = _learning_rate(config, epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        totals: dict[str, Tensor] = {}
        batches, padding = len(loader), -len(samples) % size
        self.optimizer.zero_grad(set_to_none=True)
        for index, batch in enumerate(loader):
            image, label = (batch[k].to(self.device, non_blocking=True) for k in ("image", "label"))
            last = index + 1 == batches
            padded = padding if last else 0
            if padded and self.processes.rank >= size - padded:
                label[-1] = IGNORE  # an item that another process has: it counts nowhere
            step = (index + 1) % config.accumulate == 0 or last
            names = [samples.names[i] for i in batch["case"].tolist()]
            with self._synchronised(step):
                logits = self._logits(image)
                self._check_logits(logits, names, epoch, index)
                counted = size * len(image) / (size * len(image) - padded)
                loss, terms = self.objective(logits, label, image, self._noised_logits, images_ratio=counted)
                if not bool(torch.isfinite(loss)):
                    raise self._diverged(f"loss is {float(loss.detach())}", names, epoch, index)
                # The last group of an epoch may be smaller.
                group_size = min(config.accumulate, batches - index // config.accumulate * config.accumulate)
                self.scaler.scale(loss / group_size).backward()
            if step:
                self._step()
            for key, value in {"loss": loss.detach(), **terms}.items():
                totals[key] = totals.get(key, torch.zeros((), device=self.device)) + value
        finite = all(bool(torch.isfinite(local_part(p)).all()) for p in self.model.parameters())
        if not all(self.processes.gather(finite)):
            raise self._stopped(f"weights are no longer finite after epoch {epoch}")
        self.epoch = epoch + 1
        means = {key: float(value) / batches for key, value in totals.items()}
        return {"epoch": epoch, "lr": rate, "seconds": time.perf_counter() - began, **means}

    def _synchronised(self, step: bool) -> AbstractContextManager[None]:
        """Gradients are exchanged in the last batch of a step alone."""
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(step)
        if isinstance(self.network, DistributedDataParallel) and not step:
            return self.network.no_sync()
        return nullcontext()

    def _check_logits(self, logits: Tensor, names: Sequence[str], epoch: int, index: int) -> None:
        """Stop at logits that are not finite, and at evidence that has collapsed: from neither does training recover.

        All processes stop together, as none may wait for the others' sums.
        """
        low, high = torch.aminmax(logits.detach())
        sound = torch.isfinite(low) & torch.isfinite(high)
        # One exchange for both: is any unsound, and what is the largest logit of all.
        found = torch.stack(((~sound).float(), torch.where(sound, high, 0.0).float()))
        if self.processes.group is not None:
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self.processes.group)
        unsound, peak = found.tolist()
        if unsound:
            finite = torch.isfinite(logits.detach()).flatten(1).all(1).tolist()
            raise self._diverged(
                "logits are NaN or infinite", [n for n, ok in zip(names, finite, strict=True) if not ok], epoch, index
            )
        if self.config.loss != "dice_ce":
            most = float(evidence(torch.tensor(peak), self.config.evidence)) * self.experiment.num_classes
            prior = self.config.prior
            if most < COLLAPSED * sum(prior) * (self.experiment.num_classes if len(prior) == 1 else 1):
                raise self._diverged("evidence has collapsed: no voxel has any left", names, epoch, index)

    def _diverged(self, what: str, names: Sequence[str], epoch: int, index: int) -> UserError:
        """Names the cases that this process and the others hold responsible."""
        cases = sorted({name for mine in self.processes.gather(list(names)) for name in mine})
        shown = ", ".join(cases[:8]) + (", ..." if len(cases) > 8 else "")
        return self._stopped(f"{what} in epoch {epoch}, batch {index} ({shown})")

    def _stopped(self, what: str) -> UserError:
        latest = checkpoint_path(self.out, "latest")
        kept = f"the last good checkpoint is {latest}" if latest.is_file() else "no checkpoint was written"
        return SharedError(f"training diverged: {what}; {kept}. A lower --lr or --clip often helps.")

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

    def validate(self, cases: list[Case]) -> dict[str, Any]:
        """Mean Dice of each foreground class over the held-out cases, which the processes divide among them."""
        model = self.model
        if self.fsdp:  # whose layers would wait for the others in every window
            model = build_model(self.config, self.experiment.in_channels, self.experiment.num_classes).to(self.device)
            model.load_state_dict(whole(self.model.state_dict()))
        run = Run(
            self.out,
            self.config,
            model.eval(),
            self.experiment.num_classes,
            self.experiment.in_channels,
            self.experiment.class_names,
            self.experiment.held_out,
            self.epoch,
            "latest",
        )
        scores = []
        for case in cases[self.processes.rank :: self.processes.size]:
            loaded = load_case(case, ignore_label=self.experiment.ignore_label)
            assert loaded.label is not None
            counted = loaded.label != IGNORE
            predicted = torch.where(counted[0], infer(run, loaded.image[None]).label, 0)
            truth = torch.where(counted, loaded.label, 0)[0]
            scores.append([dice(predicted == k, truth == k) for k in range(1, self.experiment.num_classes)])
        per_case = torch.tensor([row for part in self.processes.gather(scores) for row in part])
        values = per_case.nanmean(0).tolist()
        known = [v for v in values if not math.isnan(v)]
        names = self.experiment.class_names[1:]
        result = {f"dice {name}": value for name, value in zip(names, values, strict=True)}
        return {**result, "mean dice": sum(known) / len(known) if known else math.nan}

    def weights(self) -> dict[str, Any]:
        """What final.pt and best.pt hold. All processes call it: with FSDP each brings its share."""
        return {"model": whole(self.model.state_dict()), "epoch": self.epoch}

    def save(self, record: dict[str, Any]) -> None:
        """Write latest.pt, and best.pt where this epoch is."""
        score = record.get("mean dice", math.nan)
        weights, optimizer = self.weights(), whole(self.optimizer.state_dict())
        is_best = score > self.best
        if is_best:
            self.best = score
        if not self.processes.first:
            return
        if is_best:
            save_checkpoint(self.out, "best", weights)
        save_checkpoint(
            self.out,
            "latest",
            {
                **weights,
                "optimizer": optimizer,
                "scaler": self.scaler.state_dict(),
                "objective": self.objective.state_dict(),
                "best": self.best,
            },
        )

    def load(self, weights: dict[str, Any], source: Path) -> None:
        """Take `weights`. Raises UserError naming `source` where they do not fit."""
        load_weights(self.model, sharded_like(weights, self.model.state_dict()), source)

    def restore(self) -> None:
        """Continue from latest.pt."""
        path = checkpoint_path(self.out, "latest")
        state = read_checkpoint(path, self.device)
        self.load(state["model"], path)
        try:
            optimizer = state["optimizer"]
            if self.fsdp:
                parameters = dict(enumerate(self.model.parameters()))
                moments = {
                    i: {k: sharded_like(v, parameters[i]) for k, v in s.items()} for i, s in optimizer["state"].items()
                }
                optimizer = {**optimizer, "state": moments}
            self.optimizer.load_state_dict(optimizer)
            self.scaler.load_state_dict(state["scaler"])
            self.objective.load_state_dict(state["objective"])
            self.epoch, self.best = int(state["epoch"]), float(state["best"])
        except (KeyError, ValueError, RuntimeError) as error:
            raise UserError(f"{path}: cannot be resumed: {error}") from error


class _Shard(Sampler[int]):
    """Every `size`-th item of an order, from `rank` on.

    As with torch's DistributedSampler, what does not divide evenly is filled up from the beginning: by at most one item
    in each process, its last.
    """

    def __init__(self, order: Sampler[int], processes: Processes) -> None:
        self._order, self._processes = order, processes

    def __len__(self) -> int:
        return -(-len(self._order) // self._processes.size)  # type: ignore[arg-type]  # a RandomSampler

    def __iter__(self) -> Iterator[int]:
        order, size = list(self._order), self._processes.size
        filled = order + (order * size)[: -len(order) % size]
        return iter(filled[self._processes.rank :: size])


def _check_warm_start(checkpoint: Path, experiment: Experiment) -> None:
    """UserError where the weights come from a run on the same data that was trained on what is held out now."""
    folder = checkpoint.parent.parent
    if not (folder / "run.json").is_file():
        return
    source = read_experiment(folder)
    seen = sorted(set(source.train) & set(experiment.held_out))
    same = resolved(Path(source.data)) == resolved(Path(experiment.data)) or source.files == experiment.files
    if same and seen:
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
