"""`kernel_lib.custom_op`: straight to the function where nothing looks on, else through the dispatcher."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sure_kernels.kernel_lib.custom_op import custom_op

calls: list[type] = []


@custom_op("sure_kernels_tests::doubled")
def doubled(x: Tensor, more: list[Tensor], factor: float) -> Tensor:
    calls.append(type(x))
    return x * factor + sum(more)


@doubled.register_fake
def _(x, more, factor):
    return torch.empty_like(x)


class Ops(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


class Wrapped(Tensor):
    pass


@pytest.fixture
def dispatched(monkeypatch):
    """How often the registered op was called."""
    times = []
    op = doubled.op
    monkeypatch.setattr(
        doubled.__closure__[doubled.__code__.co_freevars.index("op")],
        "cell_contents",
        lambda *args: times.append(1) or op(*args),
    )
    return times


X = torch.ones(3)


def test_plain_tensors_go_straight_to_the_function(dispatched):
    with torch.no_grad():
        assert torch.equal(doubled(X, [X], 2.0), torch.full((3,), 3.0))
        assert torch.equal(doubled(torch.nn.Parameter(X), [], 2.0), torch.full((3,), 2.0))
    assert not dispatched


def test_autograd_sees_the_op(dispatched):
    out = doubled(X.clone().requires_grad_(), [X], 2.0)
    assert dispatched == [1]
    with pytest.raises(RuntimeError, match="doubled"):
        out.sum().backward()


def test_modes_see_the_op(dispatched):
    with torch.no_grad(), Ops() as mode:
        doubled(X, [X], 2.0)
    assert dispatched == [1]
    assert mode.seen == ["sure_kernels_tests.doubled.default"]


def test_profilers_see_the_op():
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        doubled(X, [X], 2.0)
    assert "sure_kernels_tests::doubled" in {event.key for event in profile.key_averages()}


def test_subclasses_go_through_the_dispatcher(dispatched):
    wrapped = X.as_subclass(Wrapped)
    with torch.no_grad():
        doubled(wrapped, [], 2.0)
        doubled(X, [wrapped], 2.0)
    assert dispatched == [1, 1]


def test_fake_tensors_get_fake_results():
    mode = FakeTensorMode()
    fake = mode.from_tensor(X)
    calls.clear()
    with torch.no_grad():
        out = doubled(fake, [fake], 2.0)
    assert type(out) is type(fake)
    assert not calls


def test_graphs_hold_the_op():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda x: doubled(x, [x], 2.0) + 1, fullgraph=True, backend=backend)
    with torch.no_grad():
        assert torch.equal(compiled(X), torch.full((3,), 4.0))
    assert any("doubled" in str(node.target) for node in graphs[0].graph.nodes)
