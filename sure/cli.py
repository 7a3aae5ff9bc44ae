"""The `sure` command. Every error the user can mend is one message on stderr and exit status 2."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from sure.config import TrainConfig, load_config, load_preset, unused_settings
from sure.errors import SharedError, UserError

# Heavy imports wait until a command needs them: `sure --help` answers at once.

DataRoot = Annotated[Path, tyro.conf.arg(metavar="DATA")]
RunFolder = Annotated[Path, tyro.conf.arg(metavar="RUN")]
Checkpoint = Literal["final", "best", "latest"]


def demo(out: Path = Path("demo"), progress: bool = True) -> None:
    """Phantoms, an EDL and a SURE network trained on them, and a report that compares both. Minutes on a CPU.

    Args:
        out: folder for phantoms, runs, evaluations, noise sweeps, metrics.json and report.html; an earlier demo is
            replaced.
        progress: show progress bars.
    """
    from sure.demo import demo as run

    print(run(out, progress=progress))


def phantom(
    out: tyro.conf.Positional[Path],
    cases: int = 24,
    shape: tuple[int, int, int] = (64, 64, 48),
    seed: int = 0,
) -> None:
    """Write cardiac-like phantoms with known truth and varying boundary contrast as a data set of NIfTI files.

    Args:
        out: folder to create.
        cases: number of volumes.
        shape: voxels along each axis.
        seed: other seeds give other hearts.
    """
    from sure.data import write_phantoms

    print(write_phantoms(out, cases=cases, shape=shape, seed=seed))


def _train_command(defaults: TrainConfig) -> Callable[..., None]:
    """`sure train` with the settings of --config as defaults of its flags."""

    def train(
        data: tyro.conf.Positional[DataRoot],
        /,
        out: Path,
        preset: str | None = None,
        config: Path | None = None,
        resume: bool = False,
        skip_bad: bool = False,
        device: str = "auto",
        workers: int = 0,
        fsdp: bool = False,
        cache: Path | None = None,
        progress: bool = True,
        settings: Annotated[TrainConfig, tyro.conf.arg(name="")] = defaults,
    ) -> None:
        """Train a network on a data set (Decathlon, nnU-Net raw, ACDC, or two folders of images and labels).

        Args:
            data: data set folder.
            out: run folder to create.
            preset: settings to start from: sure-acdc, sure-refuge, prius-acdc or prius-whs.
            config: YAML file of the settings below; goes before the preset, flags go before it.
            resume: continue an interrupted run in `out`.
            skip_bad: train on the cases without faults instead of refusing the data set.
            device: auto, cpu, cuda, cuda:1, ...
            workers: processes that prepare patches.
            fsdp: under torchrun, each process keeps a share of the weights, not all of them.
            cache: folder to keep uncompressed volumes in, whose patches are read as needed; without, all are in memory.
            progress: show progress bars.
            settings: what decides the weights.
        """
        from sure.train import train as run

        note = unused_settings(settings, TrainConfig() if preset is None else load_preset(preset))
        if note and _rank() == 0:
            print(f"sure: {note}", file=sys.stderr)
        folder = run(
            data,
            out,
            settings,
            resume=resume,
            skip_bad=skip_bad,
            device=device,
            workers=workers,
            fsdp=fsdp,
            cache=cache,
            progress=progress,
        )
        if _rank() == 0:
            print(folder)

    return train


def evaluate(
    run: tyro.conf.Positional[RunFolder],
    data: tyro.conf.Positional[DataRoot],
    /,
    out: Path,
    cases: Literal["held-out", "all"] = "held-out",
    checkpoint: Checkpoint = "final",
    seed: int = 0,
    pictures: tuple[str, ...] = ("3",),
    device: str = "auto",
    progress: bool = True,
) -> None:
    """Score a run on cases it was not trained on: metrics.json, metrics.csv and pictures.

    Args:
        run: run folder.
        data: data set folder.
        out: folder to write; an earlier evaluation is replaced.
        cases: held-out leaves out what the run was trained on.
        checkpoint: which weights.
        seed: of the noise that shows how uncertainty answers to it.
        pictures: how many cases to draw, from the worst to the best, or their names: a report puts cases side by side
            that all its evaluations have drawn.
        device: auto, cpu, cuda, cuda:1, ...
        progress: show progress bars.
    """
    from sure.evaluate import evaluate as score
    from sure.train import choose_device

    report = score(
        run,
        data,
        out,
        cases=cases,
        checkpoint=checkpoint,
        seed=seed,
        pictures=int(pictures[0]) if len(pictures) == 1 and _is_number(pictures[0]) else pictures,
        device=choose_device(device),
        progress=progress,
    )
    for name, values in report["summary"].items():
        mean = values["mean"]
        print(f"{name:32s} {'-' if mean is None else format(mean, '.4f'):>10s}  ({values['n']} cases)")
    print(out)


def robustness(
    run: tyro.conf.Positional[RunFolder],
    data: tyro.conf.Positional[DataRoot],
    /,
    out: Path,
    corruptions: tuple[str, ...] = (),
    levels: tuple[float, ...] = (),
    seed: int = 0,
    cases: Literal["held-out", "all"] = "held-out",
    checkpoint: Checkpoint = "final",
    device: str = "auto",
    progress: bool = True,
) -> None:
    """Score a run on images that grow worse (noise, blur, MRI artefacts): robustness.json and robustness.csv.

    Args:
        run: run folder.
        data: data set folder.
        out: folder to write; an earlier sweep is replaced.
        corruptions: gaussian_mean, gaussian_std, rician, blur, low_resolution, bias_field, contrast, ghosts, spikes,
            gibbs; all of them by default.
        levels: growing severities of one corruption, in place of its own.
        seed: of what is random in the corruptions.
        cases: held-out leaves out what the run was trained on.
        checkpoint: which weights.
        device: auto, cpu, cuda, cuda:1, ...
        progress: show progress bars.
    """
    from sure.corruptions import CORRUPTIONS
    from sure.robustness import robustness as sweep
    from sure.train import choose_device

    report = sweep(
        run,
        data,
        out,
        corruptions=corruptions or tuple(CORRUPTIONS),
        levels=levels or None,
        seed=seed,
        cases=cases,
        checkpoint=checkpoint,
        device=choose_device(device),
        progress=progress,
    )
    columns = ("dice", "ece", "ueo", "uncertainty_boundary", "detection")
    print(f"{'':24s}" + "".join(f"{name:>22s}" for name in columns))
    conditions = [("clean", report["clean"] | {"detection_auroc": None})]
    for corruption in report["corruptions"]:
        conditions += [(f"{corruption['name']} {level['level']:g}", level) for level in corruption["levels"]]
    for name, condition in conditions:
        means = [condition["summary"][key]["mean"] for key in columns[:-1]]
        cells = ["-" if v is None else f"{v:.4f}" for v in (*means, condition["detection_auroc"])]
        print(f"{name:24s}" + "".join(f"{cell:>22s}" for cell in cells))
    print(out)


def calibrate(
    run: tyro.conf.Positional[RunFolder],
    data: tyro.conf.Positional[DataRoot],
    /,
    out: Path | None = None,
    alpha: float = 0.1,
    checkpoint: Checkpoint = "final",
    device: str = "auto",
    progress: bool = True,
) -> None:
    """Find the uncertainty above which a run should abstain, for a wanted error among the other voxels.

    Args:
        run: run folder.
        data: data set folder; the cases that the run held out are used.
        out: file to write, by default calibration.json in the run folder.
        alpha: largest expected share of wrong voxels among those of a case that are answered.
        checkpoint: which weights.
        device: auto, cpu, cuda, cuda:1, ...
        progress: show progress bars.
    """
    from sure.calibrate import calibrate as fit
    from sure.train import choose_device

    report = fit(run, data, out, alpha=alpha, checkpoint=checkpoint, device=choose_device(device), progress=progress)
    columns = ("threshold", "cases", "error_of_all", "error", "coverage", "bound")
    print(f"{'':16s}" + "".join(f"{name:>14s}" for name in columns))
    for name, values in {"overall": report["overall"], **report["classes"]}.items():
        cells = ["-" if values[key] is None else f"{values[key]:.4g}" for key in columns]
        print(f"{name:16s}" + "".join(f"{cell:>14s}" for cell in cells))
    print(run / "calibration.json" if out is None else out)


def _compare_command(defaults: TrainConfig) -> Callable[..., None]:
    """`sure compare` with the settings of --config as defaults of its flags."""

    def compare(
        data: tyro.conf.Positional[DataRoot],
        /,
        out: Path,
        arms: tuple[str, ...] = ("edl", "sure"),
        run_folds: tuple[int, ...] | None = None,
        preset: str | None = None,
        config: Path | None = None,
        device: str = "auto",
        workers: int = 0,
        progress: bool = True,
        settings: Annotated[TrainConfig, tyro.conf.arg(name="")] = defaults,
    ) -> None:
        """Train, evaluate and sweep several losses on the same folds; one table of paired differences.

        Args:
            data: data set folder.
            out: folder for runs, evaluations, sweeps and comparison.json, .csv, .md and .png; what is there is used.
            arms: losses (edl, sure, dice_ce), presets, of which the objective is taken, or YAML files of settings; the
                first is what the others are compared with.
            run_folds: which folds; all of them unless given.
            preset: settings that all arms start from.
            config: YAML file of the settings below; goes before the preset, flags go before it.
            device: auto, cpu, cuda, cuda:1, ...
            workers: processes that prepare patches.
            progress: show progress bars.
            settings: what all arms share.
        """
        from sure.compare import compare as run
        from sure.compare import markdown

        options: dict[str, Any] = {"folds": run_folds, "device": device, "workers": workers, "progress": progress}
        print(markdown(run(data, out, arms, settings, **options)))
        print(out)

    return compare


def predict(
    run: tyro.conf.Positional[RunFolder],
    images: tyro.conf.Positional[tuple[Path, ...]],
    /,
    out: Path,
    checkpoint: Checkpoint = "final",
    calibration: Path | None = None,
    abstain: Literal["overall", "class"] = "overall",
    quantise_uncertainty: Literal["off", "uint8", "uint16"] = "off",
    device: str = "auto",
    progress: bool = True,
) -> None:
    """Write CASE_seg.nii.gz and CASE_unc.nii.gz with the geometry of each image.

    Args:
        run: run folder.
        images: NIfTI files, folders of them, or data set folders.
        out: folder for the results.
        checkpoint: which weights.
        calibration: file of `sure calibrate`; CASE_abstain.nii.gz is then 1 where the run abstains.
        abstain: by one threshold for all voxels, or by those of the predicted classes.
        quantise_uncertainty: store uncertainty in one byte or two instead of four.
        device: auto, cpu, cuda, cuda:1, ...
        progress: show progress bars.
    """
    from sure.predict import predict as run_on
    from sure.train import choose_device

    if not images:
        raise UserError("images: expected at least one file or folder")
    written = run_on(
        run,
        images,
        out,
        checkpoint=checkpoint,
        calibration=calibration,
        abstain=abstain,
        quantise_uncertainty=quantise_uncertainty,
        device=choose_device(device),
        progress=progress,
    )
    for path in written:
        print(path)


def report(
    folders: tyro.conf.Positional[tuple[Path, ...]],
    /,
    out: Path = Path("report.html"),
    title: str = "Segmentation with supervised uncertainty",
) -> None:
    """One self-contained HTML page that puts evaluations side by side.

    Args:
        folders: written by `sure evaluate`, the first is what the others are compared with; and by `sure robustness`
            for the same runs, whose curves are then shown.
        out: file to write.
        title: heading of the page.
    """
    from zipfile import BadZipFile

    from jinja2 import UndefinedError

    from sure.files import check_writable
    from sure.report import write_report

    if out.is_file() and not out.read_bytes()[:15].lower().startswith(b"<!doctype html"):
        raise UserError(f"{out}: is something else than an earlier page; choose another file")
    check_writable(out)
    # What a damaged or edited evaluation may lead to, wherever it is read.
    damage = (LookupError, TypeError, AttributeError, ValueError, EOFError, RecursionError, UndefinedError, BadZipFile)
    try:
        print(write_report(folders, out, title))
    except damage as error:
        named, what = ", ".join(map(str, folders)), " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{named}: not whole evaluations ({what[:120]}); sure evaluate writes them anew") from error


def doctor() -> int:
    """Versions, devices, backends, and every op run once against its reference."""
    from sure_kernels import doctor as run

    return run()


COMMANDS: dict[str, Callable[..., Any]] = {
    "demo": demo,
    "phantom": phantom,
    "train": _train_command(TrainConfig()),
    "evaluate": evaluate,
    "robustness": robustness,
    "calibrate": calibrate,
    "compare": _compare_command(TrainConfig()),
    "predict": predict,
    "report": report,
    "doctor": doctor,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # file names that are no UTF-8 are printed as they are
    try:
        return int(_dispatch(args) or 0)
    except UserError as error:
        if _rank() == 0 or not isinstance(error, SharedError):
            print(f"sure: {f'process {_rank()}: ' if _rank() else ''}{error}", file=sys.stderr, flush=True)
        return 2
    except BrokenPipeError:
        # The reader (head, less) has gone: nothing is left to say, nor a place to say it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (MemoryError, RuntimeError) as error:
        told = str(error)
        if not isinstance(error, MemoryError) and "out of memory" not in told and "can't allocate memory" not in told:
            raise
        print(f"sure: out of memory: {' '.join(told.split())[:200]}", file=sys.stderr)
        return 2
    except OSError as error:
        where = f"{error.filename}: " if error.filename is not None else ""
        print(f"sure: {where}{error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sure: interrupted; `sure train` continues with --resume", file=sys.stderr)
        return 130


def _dispatch(args: list[str]) -> Any:
    if not args or args[0] in ("-h", "--help") or args[0] not in COMMANDS:
        return _usage(args)
    name, rest = args[0], args[1:]
    for before, arg in zip(args, rest, strict=False):
        flag, equals, value = arg.partition("=") if arg.startswith("--") else (before, "", arg)
        if not value.strip() and (equals or not arg.startswith("--")):
            raise UserError(f"expected a value after {flag!r}, got a blank one (a variable that is not set?)")
    if name != "train" and _several():
        raise SharedError(f"`sure {name}` runs in one process, found WORLD_SIZE={os.environ['WORLD_SIZE']} (torchrun?)")
    with_settings = {"train": _train_command, "compare": _compare_command}
    command = with_settings[name](_settings(rest)) if name in with_settings else COMMANDS[name]
    return _parsed(command, name, rest)()


def _parsed(command: Callable[..., Any], name: str, args: list[str]) -> Callable[[], Any]:
    """`command` with the arguments that `args` give. Raises UserError, not tyro's box, where they do not fit."""

    @functools.wraps(command)
    def bound(*positional: Any, **flags: Any) -> Callable[[], Any]:
        return functools.partial(command, *positional, **flags)

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(bound, prog=f"sure {name}", args=args)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        # A title, a rule, what is wrong, a rule, help.
        lines = [line.strip(" \u2502\u256d\u256e\u2570\u256f") for line in said.getvalue().splitlines()]
        body = itertools.dropwhile(_is_rule, lines[1:])
        what = " ".join(" ".join(itertools.takewhile(lambda line: not _is_rule(line), body)).split())
        raise UserError(f"{what}; `sure {name} --help` lists the arguments") from None


def _is_number(text: str) -> bool:
    """Whether a number, as it is usually written: 006 is a name."""
    return text.lstrip("-").isdecimal() and text == str(int(text))


def _is_rule(line: str) -> bool:
    return not line.strip("-\u2500")


def _several() -> bool:
    """Whether torchrun has started more processes than this one."""
    return os.environ.get("WORLD_SIZE", "1") not in ("", "1")


def _rank() -> int:
    """Of this process among those of torchrun."""
    return int(os.environ.get("RANK", "0")) if _several() else 0


def _usage(args: list[str]) -> int:
    lines = [f"  {name:10s} {(f.__doc__ or '').strip().splitlines()[0]}" for name, f in COMMANDS.items()]
    text = "usage: sure COMMAND ...   (sure COMMAND --help tells more)\n\n" + "\n".join(lines)
    if args and args[0] not in ("-h", "--help"):
        raise UserError(f"expected one of {', '.join(COMMANDS)}, got {args[0]!r}")
    print(text)
    return 0 if args else 2


def _settings(args: list[str]) -> TrainConfig:
    """The defaults that flags change: those of --config over those of --preset, where they are given."""
    preset, config = (_value(args, name) for name in ("--preset", "--config"))
    base = TrainConfig() if preset is None else load_preset(preset)
    return base if config is None else load_config(Path(config), base)


def _value(args: list[str], name: str) -> str | None:
    """What follows the flag `name`."""
    for i, arg in enumerate(args):
        if arg == name and i + 1 < len(args):
            return args[i + 1]
        if arg.startswith(f"{name}="):
            return arg.split("=", 1)[1]
    return None
