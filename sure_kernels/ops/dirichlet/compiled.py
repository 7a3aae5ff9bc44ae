"""Dirichlet measures and their gradients, the formulas of `closed_form` fused by torch.compile: the `compiled` backend.

Priors are read from a table, so that their values do not count.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from sure_kernels.kernel_lib import blocks
from sure_kernels.kernel_lib.chunks import BLOCK, flat
from sure_kernels.kernel_lib.inductor import Kernel, example
from sure_kernels.ops.dirichlet.closed_form import gradient_of, measures_of, number_of_maps


class _Signature(NamedTuple):
    """What a kernel belongs to."""

    measures: tuple[str, ...]
    evidence: str
    k: int
    below_one: bool
    dtype: torch.dtype

    @property
    def maps(self) -> list[int]:
        """Channels of each measure."""
        return [number_of_maps(m, self.k) for m in self.measures]

    def name(self, sweep: str) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"dirichlet_uncertainty, {sweep}: {self.k} classes, {', '.join(self.measures)}, {self.evidence}, {kind}"


def _examples(number: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [example(blocks.EXAMPLE, BLOCK, dtype=dtype) for _ in range(number)]


def _table(prior: tuple[float, ...]) -> Tensor:
    return torch.tensor(prior, dtype=torch.float32, device="cpu")


@functools.cache
def _forward_kernel(s: _Signature) -> Kernel:
    def run(z, prior, out):
        piece = [x.flatten().float() for x in z]
        for maps, to in zip(measures_of(piece, s.measures, s.evidence, prior.unbind(), s.below_one), out, strict=True):
            for values, blocks_ in zip(maps, to, strict=True):
                blocks_.copy_(values.view_as(blocks_))

    def arguments() -> list:
        return [_examples(s.k, s.dtype), _table((1.0,) * s.k), [_examples(n) for n in s.maps]]

    return Kernel(s.name("forward"), run, arguments)


@functools.cache
def _backward_kernel(s: _Signature) -> Kernel:
    def run(z, prior, upstream, out):
        piece = [x.flatten().float() for x in z]
        up = [[x.flatten() for x in maps] for maps in upstream]
        for to, dz in zip(
            out, gradient_of(piece, up, s.measures, s.evidence, prior.unbind(), s.below_one), strict=True
        ):
            to.copy_(dz.view_as(to))

    def arguments() -> list:
        z, out = _examples(s.k, s.dtype), _examples(s.k, s.dtype)
        return [z, _table((1.0,) * s.k), [_examples(n) for n in s.maps], out]

    return Kernel(s.name("backward"), run, arguments)


def _signature(logits: Tensor, evidence: str, prior: tuple[float, ...], measures: tuple[str, ...]) -> _Signature:
    return _Signature(measures, evidence, logits.shape[1], min(prior) < 1, logits.dtype)


def forward(logits: Tensor, evidence: str, prior: tuple[float, ...], measures: tuple[str, ...]) -> list[Tensor]:
    """As `closed_form.forward`."""
    kernel = _forward_kernel(_signature(logits, evidence, prior, measures))
    n, k, *spatial = logits.shape
    outputs = [logits.new_empty((n, number_of_maps(m, k), *spatial), dtype=torch.float32) for m in measures]
    table = _table(prior)
    z, flat_outputs = flat(logits).detach(), [flat(out) for out in outputs]
    for image in range(n):
        rows, out = list(z[image]), [list(maps[image]) for maps in flat_outputs]
        for span in blocks.spans(z.shape[2]):
            targets = [[blocks.target(row, span) for row in maps] for maps in out]
            kernel([blocks.read(row, span) for row in rows], table, targets)
            for maps, to in zip(out, targets, strict=True):
                for row, written in zip(maps, to, strict=True):
                    blocks.store(written, row, span)
    return outputs


def backward(
    grads: list[Tensor], logits: Tensor, evidence: str, prior: tuple[float, ...], measures: tuple[str, ...]
) -> Tensor:
    """As `closed_form.backward`."""
    kernel = _backward_kernel(_signature(logits, evidence, prior, measures))
    result = torch.empty_like(logits, memory_format=torch.contiguous_format)
    table = _table(prior)
    z, out, flat_grads = flat(logits).detach(), flat(result), [flat(g).detach() for g in grads]
    for image in range(logits.shape[0]):
        rows, up = list(z[image]), [list(g[image]) for g in flat_grads]
        for span in blocks.spans(z.shape[2]):
            targets = [blocks.target(row, span) for row in out[image]]
            upstream = [[blocks.read(row, span) for row in maps] for maps in up]
            kernel([blocks.read(row, span) for row in rows], table, upstream, targets)
            for row, to in zip(out[image], targets, strict=True):
                blocks.store(to, row, span)
    return result
