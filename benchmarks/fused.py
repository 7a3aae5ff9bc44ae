"""The closed forms of this library under torch.compile, over whole volumes: what its kernels for GPUs have to beat.

One compiled function a sweep, forward and backward, inside an autograd Function that keeps no more than the library's
own. Options are those of the benchmarked cases, the defaults. On a CPU the backend `compiled` is the same, in slabs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from sure_kernels.kernel_lib.launch import axis_scales, centre_tap
from sure_kernels.ops.dirichlet import closed_form as dirichlet
from sure_kernels.ops.evidential import closed_form as evidential
from sure_kernels.ops.evidential.closed_form import Formula, Piece, Supervised, Weights, constants_of
from sure_kernels.ops.gradient_magnitude.closed_form import Filters, magnitude_of
from sure_kernels.ops.supervised import closed_form as supervised
from sure_kernels.ops.supervised.closed_form import Supervision

_WEIGHTS = Weights(1.0, 1.0, 1.0, "adaptive_tversky", True)
_SUPERVISION = Supervision(1.0, 1.0, "covariance", "decreasing", 0.0)
_IGNORED = -100
# All of a sweep in one kernel, as the library has it: what is used twice is kept in registers.
_OPTIONS = {"max_fusion_size": 4096, "realize_acc_reads_threshold": 12}


class Sweeps(NamedTuple):
    """forward(logits, *rest) -> (results, what to keep); backward(logits, *rest, *kept, upstream, out) writes dL/dz to
    `out`, one map (N, *spatial) a class."""

    forward: Callable[..., tuple[Sequence[Tensor], Sequence[Tensor]]]
    backward: Callable[..., None]


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sweeps: Sweeps, logits: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        results, kept = sweeps.forward(logits, *rest)
        ctx.save_for_backward(logits, *rest, *kept)
        ctx.sweep, ctx.others = sweeps.backward, len(rest)
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        logits = ctx.saved_tensors[0]
        out = torch.empty_like(logits, memory_format=torch.contiguous_format)
        ctx.sweep(*ctx.saved_tensors, list(upstream), list(out.unbind(1)))
        return None, out, *(None,) * ctx.others


def _compiled(make: Callable[..., Sweeps], backend: str) -> Callable[..., Sweeps]:
    """make(...), its functions compiled once for equal arguments."""
    torch._dynamo.reset()
    options = _OPTIONS if backend == "inductor" else None
    compiled = functools.partial(torch.compile, backend=backend, options=options, fullgraph=True, dynamic=False)

    @functools.cache
    def sweeps(*args: Any) -> Sweeps:
        made = make(*args)
        return Sweeps(compiled(made.forward), compiled(made.backward))

    return sweeps


def _classes(logits: Tensor) -> list[Tensor]:
    """Logits (N, K, *spatial) of each class, flat, in float32."""
    return [z.flatten().float() for z in logits.unbind(1)]


def _piece(logits: Tensor, target: Tensor) -> Piece:
    label = target.flatten()
    return Piece(_classes(logits), label, (label != _IGNORED).float(), all_count=False)


def _write(slopes: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    for dz, to in zip(slopes, out, strict=True):
        to.copy_(dz.view_as(to))


def _formula(k: int) -> Formula:
    return Formula("digamma", "softplus", (1.0,) * k, (), False)


def _evidential(k: int) -> Sweeps:
    formula = _formula(k)
    constants = constants_of(formula)

    def forward(logits, target):
        columns = evidential.sums_of(_piece(logits, target), None, formula, constants)
        found = evidential.finalise(torch.stack([x.double() for x in columns]), formula, _WEIGHTS)
        return [found.loss.float()], [found.coefficients.float()]

    def backward(logits, target, coefficients, upstream, out):
        rows = coefficients * upstream[0]
        _write(evidential.gradient_of(_piece(logits, target), None, rows, None, formula, constants), out)

    return Sweeps(forward, backward)


def _magnitude(image: Tensor) -> Tensor:
    """The Sobel magnitude of an image (M, *spatial), flat."""
    dims = image.ndim - 1
    x = pad(image[None].float(), (1, 1) * dims, "replicate")[0]
    steps = x[0].stride()
    g = magnitude_of(
        [c.flatten() for c in x],
        Filters(steps, axis_scales("sobel", (1.0,) * dims)[3 - dims :], centre_tap("sobel")),
        "l2",
        0.0,
    )
    # What the filters drop at either end is padding, like the garbage that they leave in it.
    whole = pad(g, (sum(steps), sum(steps))).view(x.shape[1:])
    return whole[(slice(1, -1),) * dims].flatten()


def _supervised(k: int) -> Sweeps:
    formula = _formula(k)
    constants = constants_of(formula)

    def images(logits, target, image, band):
        for i in range(len(logits)):
            piece = _piece(logits[i : i + 1], target[i])
            yield piece, Supervised(_magnitude(image[i]), band[i].flatten() * piece.valid.to(band.dtype))

    def forward(logits, target, image, band):
        rows = []
        for piece, more in images(logits, target, image, band):
            columns = evidential.sums_of(piece, more, formula, constants)
            rows.append(torch.stack([x.double() for x in columns]))
        sums = torch.stack(rows)
        base = evidential.finalise(sums.sum(0), formula, _WEIGHTS)
        extra = supervised.finalise(sums, _SUPERVISION, None)
        coefficients = torch.cat((base.coefficients.expand(len(sums), -1), extra.coefficients), 1)
        return [(base.loss + extra.loss).float()], [coefficients.float(), extra.means.float()]

    def backward(logits, target, image, band, coefficients, means, upstream, out):
        rows = coefficients * upstream[0]
        for i, (piece, more) in enumerate(images(logits, target, image, band)):
            slopes = evidential.gradient_of(piece, more, rows[i], means[i], formula, constants)
            _write(slopes, [to[i] for to in out])

    return Sweeps(forward, backward)


def _dirichlet(k: int, measures: tuple[str, ...]) -> Sweeps:
    options = (measures, "softplus", (1.0,) * k)

    def forward(logits):
        found = dirichlet.measures_of(_classes(logits), *options, False)
        return [torch.stack(maps, 1).view(len(logits), len(maps), *logits.shape[2:]) for maps in found], []

    def backward(logits, upstream, out):
        flat = [[x.flatten() for x in up.unbind(1)] for up in upstream]
        _write(dirichlet.gradient_of(_classes(logits), flat, *options, False), out)

    return Sweeps(forward, backward)


def evidential_loss(backend: str = "inductor") -> Callable[..., Tensor]:
    sweeps = _compiled(_evidential, backend)

    def call(logits: Tensor, target: Tensor) -> Tensor:
        return _Function.apply(sweeps(logits.shape[1]), logits, target)[0]

    return call


def supervised_evidential_loss(backend: str = "inductor") -> Callable[..., Tensor]:
    sweeps = _compiled(_supervised, backend)

    def call(logits: Tensor, target: Tensor, image: Tensor, *, band: Tensor) -> Tensor:
        return _Function.apply(sweeps(logits.shape[1]), logits, target, image, band)[0]

    return call


def dirichlet_uncertainty(backend: str = "inductor") -> Callable[..., tuple[Tensor, ...]]:
    sweeps = _compiled(_dirichlet, backend)

    def call(logits: Tensor, *, measures: tuple[str, ...]) -> tuple[Tensor, ...]:
        return _Function.apply(sweeps(logits.shape[1], measures), logits)

    return call
