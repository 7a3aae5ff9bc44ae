"""The two sweeps of `closed_form`, its formulas fused by torch.compile: the `compiled` backend.

A kernel belongs to the shape of a formula. Priors (other than 1, which simplifies) and class weights are read from a
table, so that their values do not count.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from sure_kernels.kernel_lib import blocks
from sure_kernels.kernel_lib.chunks import BLOCK, flat
from sure_kernels.kernel_lib.inductor import Kernel, example
from sure_kernels.kernel_lib.labels import code_for, unpack_labels
from sure_kernels.kernel_lib.special import Concentration
from sure_kernels.ops.evidential.closed_form import (
    Constants,
    Formula,
    Piece,
    Supervised,
    constants_of,
    gradient_of,
    number_of_coefficients,
    number_of_sums,
    sums_of,
)


def _shape_of(formula: Formula) -> Formula:
    """A formula that stands for all that share a kernel with this one."""
    k = formula.k
    if formula.prior != (1.0,) * k:
        first = 0.5 if formula.below_one else 2.0
        formula = formula._replace(prior=tuple(first + i for i in range(k)))
    return formula._replace(class_weight=(1.0,) * k if formula.class_weight else ())


def _table(formula: Formula) -> Tensor:
    """Class weights, the numbers of every prior, and those of their sum."""
    c = constants_of(formula)
    weight = c.weight or (1.0,) * formula.k
    numbers = [*weight, *(x for b in (*c.prior, c.total) for x in b)]
    return torch.tensor(numbers, dtype=torch.float32, device="cpu")


def _constants(table: Tensor, of: Constants) -> Constants:
    """The constants of `_table`, of a shape whose own are `of`; those of a unit prior are known."""
    k = len(of.prior)
    prior, total = of.prior, of.total
    if any(b.value != 1.0 for b in prior):
        *prior, total = (Concentration(*row.unbind()) for row in table[k:].view(k + 1, -1))
    return Constants(prior, total, None if of.weight is None else table[:k].unbind(), of.below_one, of.uniform)


def _pieces(
    z: list[Tensor], codes: Tensor, magnitude: Tensor | None, bits: int, ignored: int
) -> tuple[Piece, Supervised | None]:
    """Blocks, flat, as the formulas take them. 32-bit labels: bytes would take Inductor four times as long."""
    numbers = codes.flatten().to(torch.int32)
    label = numbers & ignored
    valid = (label != ignored).to(torch.float32)
    piece = Piece([x.flatten().float() for x in z], label, valid, all_count=False)
    return piece, None if magnitude is None else Supervised(magnitude.flatten(), numbers >> bits)


def _known(shape: Formula, supervised: bool) -> tuple[Constants, int, int]:
    """What a kernel need not compute: the shape's own constants, and its code's bits and `ignored`."""
    code = code_for(shape.k, supervised)
    return constants_of(shape), code.bits, code.ignored


def _example(shape: Formula, dtype: torch.dtype, supervised: bool) -> list:
    """Arguments that both kernels share: logits, codes (one a voxel), magnitude, table."""
    volume = (blocks.EXAMPLE, BLOCK)
    return [
        [example(*volume, dtype=dtype) for _ in range(shape.k)],
        example(*volume, dtype=code_for(shape.k, supervised).dtype),
        example(*volume) if supervised else None,
        _table(shape),
    ]


def _name(shape: Formula, dtype: torch.dtype, supervised: bool, sweep: str) -> str:
    op = "supervised_evidential_loss" if supervised else "evidential_loss"
    return f"{op}, {sweep}: {shape.k} classes, {shape.kind}, {shape.evidence}, {str(dtype).removeprefix('torch.')}"


@functools.cache
def _sums_kernel(shape: Formula, dtype: torch.dtype, supervised: bool) -> Kernel:
    own, bits, ignored = _known(shape, supervised)

    def run(z, codes, magnitude, table):
        piece, g = _pieces(z, codes, magnitude, bits, ignored)
        return sums_of(piece, g, shape, _constants(table, own))

    return Kernel(_name(shape, dtype, supervised, "forward"), run, lambda: _example(shape, dtype, supervised))


@functools.cache
def _gradient_kernel(shape: Formula, dtype: torch.dtype, supervised: bool) -> Kernel:
    own, bits, ignored = _known(shape, supervised)

    def run(z, codes, magnitude, table, coefficients, means, out):
        piece, g = _pieces(z, codes, magnitude, bits, ignored)
        slopes = gradient_of(piece, g, coefficients, means, shape, _constants(table, own))
        for to, dz in zip(out, slopes, strict=True):
            to.copy_(dz.view_as(to))

    def arguments() -> list:
        first = _example(shape, dtype, supervised)
        row = example(number_of_coefficients(shape.k, supervised), dynamic=())
        means = example(2, dynamic=()) if supervised else None
        return [*first, row, means, _example(shape, dtype, supervised)[0]]

    return Kernel(_name(shape, dtype, supervised, "backward"), run, arguments)


def _sweep(
    logits: Tensor, codes: Tensor, magnitude: Tensor | None, formula: Formula, visit: Callable[..., None]
) -> None:
    """visit(image, span, arguments that both kernels share) for every piece of every image."""
    table = _table(formula)
    k, supervised = formula.k, magnitude is not None
    ignored = code_for(k, supervised).ignored
    for image, z in enumerate(flat(logits).detach()):
        rows = list(z)
        for span in blocks.spans(z.shape[1]):
            # Half bytes are unpacked first: the two voxels of a byte would break up the kernel's one loop.
            label = codes[image][span] if supervised else unpack_labels(codes[image], span, k, banded=False)
            arguments = (
                [blocks.read(row, span) for row in rows],
                blocks.read(label, slice(0, span.stop - span.start), ignored),
                None if magnitude is None else blocks.read(magnitude[image], span),
                table,
            )
            visit(image, span, arguments)


def sums(logits: Tensor, codes: Tensor, formula: Formula, gradient: Tensor | None = None) -> Tensor:
    """As `closed_form.sums`."""
    supervised = gradient is not None
    kernel = _sums_kernel(_shape_of(formula), logits.dtype, supervised)
    out = torch.zeros((logits.shape[0], number_of_sums(formula.k, supervised)), dtype=torch.float64)

    def visit(image: int, span: slice, arguments: tuple) -> None:
        out[image] += torch.stack([x.double() for x in kernel(*arguments)])

    _sweep(logits, codes, _float(gradient), formula, visit)
    return out


def gradient(
    logits: Tensor,
    codes: Tensor,
    coefficients: Tensor,
    formula: Formula,
    magnitude: Tensor | None = None,
    means: Tensor | None = None,
) -> Tensor:
    """As `closed_form.gradient`."""
    kernel = _gradient_kernel(_shape_of(formula), logits.dtype, magnitude is not None)
    result = torch.empty_like(logits, memory_format=torch.contiguous_format)
    out = flat(result)
    coefficients = coefficients.float()
    means = None if means is None else means.float()

    def visit(image: int, span: slice, arguments: tuple) -> None:
        targets = [blocks.target(row, span) for row in out[image]]
        kernel(*arguments, coefficients[image], None if means is None else means[image], targets)
        for row, to in zip(out[image], targets, strict=True):
            blocks.store(to, row, span)

    _sweep(logits, codes, _float(magnitude), formula, visit)
    return result


def _float(magnitude: Tensor | None) -> Tensor | None:
    """Gradient magnitudes as the kernels read them."""
    return None if magnitude is None else magnitude.detach().float().contiguous()
