"""What holds for every op of the registry when its kernels serve it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import sure_kernels as sk
from sure_kernels.registry import OPS, OpSpec

pytestmark = pytest.mark.usefixtures("triton_backend", "poisoned_memory")

EACH = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)


def example(op: OpSpec, device: str, dtype: torch.dtype = torch.float32):
    """Positional and keyword arguments of a small call."""
    with sk.backend("auto"):  # made on the CPU, some of it by ops of ours
        args, kwargs = op.example(torch.Generator().manual_seed(0), 3, (3, 4, 5), dtype)
    return [a.to(device) for a in args], kwargs


def evaluate(op: OpSpec, function, args, kwargs) -> list[Tensor]:
    """Results and, where there is one, the gradient."""
    leaf = args[0].detach().requires_grad_(op.differentiable)
    out = function(leaf, *args[1:], **kwargs)
    results = [out] if isinstance(out, Tensor) else list(out)
    if not op.differentiable:
        return results
    return [*(r.detach() for r in results), *torch.autograd.grad(sum(r.sum() for r in results), leaf)]


def assert_equal(got: list[Tensor], expected: list[Tensor]) -> None:
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(op, dtype, device):
    """Values stay float32, gradients return in the dtype that came; inside a region as outside."""
    args, kwargs = example(op, device, dtype)
    expected = evaluate(op, op.function, args, kwargs)
    with torch.autocast(device, dtype=torch.bfloat16):
        got = evaluate(op, op.function, args, kwargs)
    assert_equal(got, expected)


@EACH
def test_full_graph(op, device):
    args, kwargs = example(op, device)
    traced = torch.compile(op.function, fullgraph=True, backend="aot_eager")
    assert_equal(evaluate(op, traced, args, kwargs), evaluate(op, op.function, args, kwargs))


@EACH
def test_inputs_are_not_written_to(op, device):
    args, kwargs = example(op, device)
    before = [a.clone() for a in args]
    evaluate(op, op.function, args, kwargs)
    assert_equal(args, before)
