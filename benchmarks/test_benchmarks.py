"""The cases under pytest-benchmark: `python -m pytest benchmarks --benchmark-only`; the sizes are those of --quick."""

from __future__ import annotations

import pytest
import torch

from benchmarks.registry import CASES, QUICK, forms_of


@pytest.mark.parametrize("setting", QUICK, ids=lambda s: f"{s.shape[0]}^3")
@pytest.mark.parametrize(
    ("case", "form"), [(case, form) for case in CASES for form in forms_of(case)], ids=lambda x: getattr(x, "op", x)
)
def test_loss_and_gradient(benchmark, case, form, setting):
    args, kwargs = case.example(torch.Generator().manual_seed(0), setting)
    if setting.shape[0] ** 3 > case.most.get(form, setting.shape[0] ** 3):
        pytest.skip(f"not run beyond {case.most[form]} voxels")
    try:
        function = forms_of(case)[form]()
    except ImportError as error:
        pytest.skip(str(error))
    leaf = args[0].detach().requires_grad_(case.differentiable)

    def run() -> None:
        out = function(leaf, *args[1:], **kwargs)
        if case.differentiable:
            leaf.grad = None
            parts = [out] if isinstance(out, torch.Tensor) else list(out)
            torch.stack([x.sum() for x in parts]).sum().backward()

    run()
    benchmark.group = f"{case.op}, {setting.shape[0]}^3"
    benchmark(run)
