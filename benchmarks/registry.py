"""What is measured: one case per op, with what a user would run instead, and the sizes it is measured at.

A new op needs a `Case` in CASES; a new rival a function in its `peers`, which imports what it needs, so that a package
that is not installed becomes a row that says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

import sure_kernels as sk
from benchmarks import fused
from sure_kernels.registry import OPS

Arguments = tuple[tuple[Tensor, ...], dict[str, Any]]
Function = Callable[..., Any]
Peer = Callable[[], Function]


class Setting(NamedTuple):
    """A size: `sweep` is the line of the plot that it belongs to."""

    sweep: str
    batch: int
    classes: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def _cube(sweep: str, n: int, *, batch: int = 1, classes: int = 4, dtype: torch.dtype = torch.float32) -> Setting:
    return Setting(sweep, batch, classes, (n, n, n), dtype)


SETTINGS = (
    *(_cube("volume", n) for n in (32, 48, 64, 96, 128, 192, 256, 384, 512)),
    _cube("patches", 48, batch=4),
    *(_cube("classes", 96, classes=k) for k in (2, 8, 16)),
    *(_cube("dtype", 128, dtype=d) for d in (torch.bfloat16, torch.float16)),
    _cube("dtype", 512, dtype=torch.bfloat16),
)
QUICK = (_cube("volume", 32), _cube("volume", 64))
# Compiling takes longer than measuring: these forms are measured where the comparison is looked for.
TEXTBOOK, COMPILED_TEXTBOOK = "textbook", "textbook, torch.compile"
# On GPUs, whether kernels by hand earn their keep; on a CPU it is what the backend `compiled` is.
FUSED = "closed form, torch.compile"
OURS = "sure_kernels"
# Ours where there is neither compiler nor GPU.
EAGER = "sure_kernels, without compiler"
# What the README quotes, of a CPU and of a GPU.
HEADLINE = _cube("volume", 128)
GPU_HEADLINES = (_cube("dtype", 512, dtype=torch.bfloat16), HEADLINE)
COMPILED_AT = (*(_cube("volume", n) for n in (32, 64, 128)), *GPU_HEADLINES)


@dataclass(frozen=True)
class Case:
    """An op and its rivals.

    Attributes:
        op: public name.
        example: (generator, setting) -> arguments on the CPU; the first one gets the gradient, where there is one.
        ours: the public function.
        peers: name -> function that imports and returns what to call with the same arguments.
        traffic: bytes that forward and backward have to read and write, from the arguments.
        differentiable: whether there is a backward to measure.
        sweeps: sweeps of SETTINGS that make sense for it.
        most: name of a form -> voxels beyond which it is not run: its memory or time grows out of hand.
        most_on_cpu: the same where it is no GPU that runs it.
        dispatched: the op that chooses the backend, where it is another one.
    """

    op: str
    example: Callable[[torch.Generator, Setting], Arguments]
    ours: Function
    peers: Mapping[str, Peer]
    traffic: Callable[[tuple[Tensor, ...]], int]
    differentiable: bool = True
    sweeps: tuple[str, ...] = ("volume", "patches", "classes", "dtype")
    most: Mapping[str, int] = field(default_factory=dict)
    most_on_cpu: Mapping[str, int] = field(default_factory=dict)
    dispatched: str | None = None


def _example(op: str, **more: Any) -> Callable[[torch.Generator, Setting], Arguments]:
    """The registry's example, repeated along the batch."""
    spec = next(spec for spec in OPS if spec.name == op)

    def make(g: torch.Generator, s: Setting) -> Arguments:
        args, kwargs = spec.example(g, s.classes, s.shape, s.dtype)
        repeated = tuple(a.repeat(s.batch, *(1,) * (a.ndim - 1)) for a in args)
        return repeated, kwargs | more

    return make


def _supervised(g: torch.Generator, s: Setting) -> Arguments:
    """With the band computed once, as a training loop with a cache would: it has a row of its own."""
    args, kwargs = _example("supervised_evidential_loss")(g, s)
    return args, kwargs | {"band": sk.boundary_band(args[1])}


def _size(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _loss_traffic(args: tuple[Tensor, ...]) -> int:
    """Logits twice and their gradient once; labels once, their codes once out and once in; the rest twice."""
    logits, target, *rest = args
    return 3 * _size(logits) + _size(target) + 2 * target.numel() + 2 * sum(map(_size, rest))


def _textbook(op: str) -> Peer:
    return lambda: getattr(sk.reference, op)


def _compiled_textbook(op: str) -> Peer:
    def load() -> Function:
        torch._dynamo.reset()
        return torch.compile(getattr(sk.reference, op))

    return load


def _eager(op: str) -> Peer:
    def call(*args: Any, **kwargs: Any) -> Any:
        with sk.backend("eager"):
            return getattr(sk, op)(*args, **kwargs)

    return lambda: call


def _forms(op: str) -> dict[str, Peer]:
    forms = {EAGER: _eager(op), TEXTBOOK: _textbook(op), COMPILED_TEXTBOOK: _compiled_textbook(op)}
    return {**forms, FUSED: getattr(fused, op)} if hasattr(fused, op) else forms


def _monai(name: str, **options: Any) -> Peer:
    def load() -> Function:
        from monai import losses

        loss = getattr(losses, name)(to_onehot_y=True, softmax=True, **options)
        return lambda logits, target, *_, **__: loss(logits, target[:, None])

    return load


def _exacta() -> Function:
    from exacta.losses import DiceCELoss

    loss = DiceCELoss()
    return lambda logits, target, *_, **__: loss(logits, target)


def _cross_entropy() -> Function:
    return lambda logits, target, *_, **__: torch.nn.functional.cross_entropy(logits, target)


def _kornia() -> Function:
    from kornia.filters import spatial_gradient3d

    return lambda image: spatial_gradient3d(image, mode="diff").square().sum(2).sqrt()


# Rivals that run on the CPU fetch what is on a GPU, and put maps back: their rows say what a user would wait for.


def _scipy_distance() -> Function:
    from scipy import ndimage

    from sure_kernels.ops.boundary_distance.reference import boundary_voxels

    def call(target: Tensor, **_: Any) -> Tensor:
        boundary = boundary_voxels(target, ignore_index=-100)
        maps = [torch.from_numpy(ndimage.distance_transform_edt(~b.numpy())) for b in boundary.cpu()]
        return torch.stack(maps).to(target.device)

    return call


def _edt() -> Function:
    import edt
    import numpy as np

    from sure_kernels.ops.boundary_distance.reference import boundary_voxels

    def call(target: Tensor, **_: Any) -> Tensor:
        boundary = boundary_voxels(target, ignore_index=-100)
        maps = [edt.edt(np.ascontiguousarray(~b.numpy()), parallel=torch.get_num_threads()) for b in boundary.cpu()]
        return torch.stack([torch.from_numpy(m) for m in maps]).to(target.device)

    return call


def _spearman() -> Function:
    from scipy import stats

    return lambda x, y: torch.tensor(
        [stats.spearmanr(a.numpy(), b.numpy()).statistic for a, b in zip(x.cpu(), y.cpu(), strict=True)]
    )


def _torchmetrics_calibration() -> Function:
    from torchmetrics.functional.classification import multiclass_calibration_error

    def call(probability: Tensor, target: Tensor) -> Tensor:
        return multiclass_calibration_error(probability, target, num_classes=probability.shape[1], n_bins=15)

    return call


def _sklearn_auroc() -> Function:
    from sklearn.metrics import roc_auc_score

    return lambda u, error: torch.tensor(roc_auc_score(error.flatten().cpu().numpy(), u.flatten().cpu().numpy()))


def _noised(g: torch.Generator, s: Setting) -> Arguments:
    clean, noisy = (torch.rand((s.batch, 1, *s.shape), generator=g) for _ in range(2))
    distance = sk.boundary_distance(_example("boundary_distance")(g, s)[0][0], max_distance=4.0)
    return (noisy, clean, distance), {}


def _noise_loss(namespace: Any) -> Function:
    """The noise losses at every voxel, without the pairs of L_d; L_mu's gradient is the noisy map's."""
    return lambda noisy, clean, distance: namespace.noise_uncertainty_loss(
        clean, [noisy], [1.0], distance, weights=(1.0, 0.0, 1.0)
    )


def _errors(g: torch.Generator, s: Setting) -> Arguments:
    u = torch.rand((s.batch, 1, *s.shape), generator=g)
    return (u, torch.rand(u.shape, generator=g) < 0.2 * u), {}


def _points(g: torch.Generator, s: Setting) -> Arguments:
    n = s.shape[0] * s.shape[1] * s.shape[2]
    x = torch.rand((1, n), generator=g)
    return (x, x + torch.rand((1, n), generator=g)), {}


def _probabilities(g: torch.Generator, s: Setting) -> Arguments:
    logits = torch.randn((s.batch, s.classes, *s.shape), generator=g)
    return (logits.softmax(1), torch.randint(0, s.classes, (s.batch, *s.shape), generator=g)), {}


# A textbook loss holds some twelve times its logits; a whole pairwise ranking n^2 pairs.
_TEXTBOOK_LIMIT = {TEXTBOOK: 192**3}
_PAIRS_LIMIT = {TEXTBOOK: 4096}
# Sorting takes half a minute at this size, and 47 times the points' memory.
_SORTED_LIMIT = {OURS: 256**3}

CASES = (
    Case(
        "gradient_magnitude",
        _example("gradient_magnitude"),
        sk.gradient_magnitude,
        {**_forms("gradient_magnitude"), "kornia spatial_gradient3d": lambda: _kornia()},
        lambda args: 5 * _size(args[0]),
        sweeps=("volume", "patches"),
        most_on_cpu=_TEXTBOOK_LIMIT,
    ),
    Case(
        "dirichlet_uncertainty",
        _example("dirichlet_uncertainty", measures=("vacuity", "entropy", "mutual_information")),
        sk.dirichlet_uncertainty,
        _forms("dirichlet_uncertainty"),
        lambda args: 3 * _size(args[0]) + 6 * 4 * args[0].numel() // args[0].shape[1],
        most_on_cpu=_TEXTBOOK_LIMIT,
    ),
    Case(
        "evidential_loss",
        _example("evidential_loss"),
        sk.evidential_loss,
        {
            **_forms("evidential_loss"),
            "MONAI DiceCELoss": _monai("DiceCELoss"),
            "MONAI GeneralizedDiceLoss": _monai("GeneralizedDiceLoss"),
            "exacta DiceCELoss": lambda: _exacta(),
            "torch cross_entropy": lambda: _cross_entropy(),
        },
        _loss_traffic,
        most_on_cpu=_TEXTBOOK_LIMIT,
    ),
    Case(
        "supervised_evidential_loss",
        _supervised,
        sk.supervised_evidential_loss,
        _forms("supervised_evidential_loss"),
        _loss_traffic,
        most_on_cpu=_TEXTBOOK_LIMIT,
    ),
    Case(
        "boundary_distance",
        _example("boundary_distance"),
        sk.boundary_distance,
        {"SciPy distance_transform_edt": lambda: _scipy_distance(), "edt": lambda: _edt()},
        lambda args: _size(args[0]) + 4 * args[0].numel(),
        differentiable=False,
        sweeps=("volume", "patches"),
    ),
    Case(
        "pairwise_ranking_loss",
        _points,
        sk.pairwise_ranking_loss,
        {TEXTBOOK: _textbook("pairwise_ranking_loss")},
        lambda args: 3 * _size(args[0]) + _size(args[1]),
        sweeps=("volume",),
        most=_PAIRS_LIMIT,
        most_on_cpu=_SORTED_LIMIT,
    ),
    Case(
        "noise_uncertainty_loss",
        _noised,
        _noise_loss(sk),
        {TEXTBOOK: lambda: _noise_loss(sk.reference)},
        lambda args: 5 * _size(args[0]) + 2 * _size(args[2]),
        sweeps=("volume", "patches"),
        most_on_cpu=_TEXTBOOK_LIMIT,
    ),
    Case(
        "metrics.error_detection_auroc",
        _errors,
        sk.metrics.error_detection_auroc,
        {"scikit-learn roc_auc_score": lambda: _sklearn_auroc()},
        lambda args: _size(args[0]) + _size(args[1]),
        differentiable=False,
        sweeps=("volume",),
        dispatched="segmentation_histograms",
    ),
    Case(
        "metrics.uncertainty_correlation",
        _points,
        sk.metrics.uncertainty_correlation,
        {"SciPy spearmanr": lambda: _spearman()},
        lambda args: _size(args[0]) + _size(args[1]),
        differentiable=False,
        sweeps=("volume",),
        most_on_cpu=_SORTED_LIMIT,
    ),
    Case(
        "metrics.expected_calibration_error",
        _probabilities,
        sk.metrics.expected_calibration_error,
        {"torchmetrics multiclass_calibration_error": lambda: _torchmetrics_calibration()},
        lambda args: _size(args[0]) + _size(args[1]),
        differentiable=False,
        sweeps=("volume", "classes"),
        dispatched="segmentation_histograms",
    ),
)


def case_of(op: str) -> Case:
    return next(case for case in CASES if case.op == op)


def forms_of(case: Case, on_gpu: bool = False) -> dict[str, Peer]:
    """Every form of a case, ours first."""
    forms = {OURS: lambda: case.ours, **case.peers}
    return {form: load for form, load in forms.items() if on_gpu or form != FUSED}


def headlines_of(machine: Mapping[str, Any]) -> tuple[Setting, ...]:
    """What the README quotes of a machine, as `results.machine` describes it."""
    return GPU_HEADLINES if machine["gpu"] else (HEADLINE,)
