"""Device special functions against mpmath, and evidence activations against PyTorch in float64."""

from __future__ import annotations

import mpmath
import pytest
import torch
import triton
import triton.language as tl

from sure_kernels.kernel_lib import device_special as special
from sure_kernels.kernel_lib.special import concentration

# Error / max(1, |f|): in the interpreter, and on a GPU with its approximate reciprocal square root and exp2.
TOLERANCE = {"cpu": 1e-6, "cuda": 2e-6}
# Terms of x / 1e-3 and their logarithms meet in it.
KL_TOLERANCE = {"cpu": 2e-6, "cuda": 4e-6}
PRIOR = 0.75
GAP = 0.5


@triton.jit
def _evaluate(
    p_x, p_out, n,
    PRIOR: tl.constexpr, GAP: tl.constexpr, NAME: tl.constexpr, BELOW_ONE: tl.constexpr, SLOPE_OF: tl.constexpr,
):  # fmt: skip
    o = tl.arange(0, 128)
    x = tl.load(p_x + o, mask=o < n, other=1.0)
    if NAME == "ln":
        result = special.ln(x)
    elif NAME == "ln1p":
        result = special.ln1p(x)
    elif NAME == "reciprocal":
        result = special.reciprocal(x)
    elif NAME == "digamma":
        result = special.digamma(x, BELOW_ONE)
    elif NAME == "digamma_difference":
        result = special.digamma_difference(x, x * GAP, BELOW_ONE)
    elif NAME == "digamma_excess":
        result = special.digamma_excess(x, BELOW_ONE)
    elif NAME == "digamma_excess_slope":
        result = special.digamma_excess_slope(x, BELOW_ONE) - (1.0 / x if BELOW_ONE else 0.0)
    elif NAME == "lgamma":
        result = special.lgamma(x, BELOW_ONE)
    elif NAME == "trigamma":
        result = special.trigamma(x, BELOW_ONE)
    elif NAME == "kl_term":
        result = special.kl_term(x, PRIOR, BELOW_ONE)
    elif NAME == "kl_term_slope":
        result = special.kl_term_slope(x, PRIOR, BELOW_ONE)
    elif NAME == "softplus" or NAME == "relu" or NAME == "exp":
        result = special.evidence(x, NAME)
    else:
        tl.static_assert(SLOPE_OF == "softplus" or SLOPE_OF == "relu" or SLOPE_OF == "exp")
        result = special.evidence_slope(x, special.evidence(x, SLOPE_OF), SLOPE_OF)
    tl.store(p_out + o, result, mask=o < n)


EXACT = {
    "ln": mpmath.log,
    "ln1p": lambda x: mpmath.log(1 + x),
    "reciprocal": lambda x: 1 / x,
    "digamma": lambda x: mpmath.psi(0, x),
    "digamma_difference": lambda x: mpmath.psi(0, x + GAP * x) - mpmath.psi(0, x),
    "digamma_excess": lambda x: mpmath.psi(0, x + 1) - mpmath.log(x),
    "digamma_excess_slope": lambda x: mpmath.psi(1, x + 1) - 1 / x,
    "lgamma": mpmath.loggamma,
    "trigamma": lambda x: mpmath.psi(1, x),
    "kl_term": lambda x: (x - PRIOR) * mpmath.psi(0, x) - mpmath.loggamma(x) - (x - PRIOR),
    "kl_term_slope": lambda x: (x - PRIOR) * mpmath.psi(1, x) - 1,
}


def evaluate(name: str, x: torch.Tensor, below_one: bool = False) -> torch.Tensor:
    out = torch.full_like(x, float("nan"))
    # Cut here: Triton 3.6 cuts no strings in a kernel.
    options = {"NAME": name, "BELOW_ONE": below_one, "SLOPE_OF": name.removeprefix("slope ")}
    _evaluate[(1,)](x, out, len(x), PRIOR=PRIOR, GAP=GAP, **options)
    return out.cpu().double()


def exact(name: str, x: torch.Tensor) -> torch.Tensor:
    return torch.tensor([float(mpmath.re(EXACT[name](mpmath.mpf(v)))) for v in x.tolist()], dtype=torch.float64)


@pytest.mark.parametrize("below_one", [False, True])
@pytest.mark.parametrize("name", EXACT)
def test_functions(name, below_one, device):
    x = torch.logspace(-3 if below_one else 0, 6, 120)
    expected = exact(name, x)
    error = (evaluate(name, x.to(device), below_one) - expected).abs() / expected.abs().clamp_min(1)
    tolerance = KL_TOLERANCE if name == "kl_term" else TOLERANCE
    assert float(error.max()) <= tolerance[device]


@pytest.mark.parametrize("name", ["ln1p", "digamma_excess", "digamma_excess_slope", "kl_term_slope"])
def test_small_results_keep_their_digits(name, device):
    """Where the parts are large and the result is small, the relative error stays small."""
    x = torch.logspace(-6, -2, 60) if name == "ln1p" else torch.logspace(1, 4, 60)
    expected = exact(name, x)
    error = ((evaluate(name, x.to(device)) - expected) / expected).abs()
    assert float(error.max()) < 1e-5


@triton.jit
def _share(p_e, p_prior, p_out, n, PRIOR: tl.constexpr, BELOW_ONE: tl.constexpr):
    o = tl.arange(0, 128)
    e = tl.load(p_e + o, mask=o < n, other=1.0)
    tl.store(p_out + o, special.kl_share(e, PRIOR, p_prior, 1, BELOW_ONE), mask=o < n)


@pytest.mark.parametrize(
    ("b", "below_one"), [(1e-3, True), (0.3, True), (40.0, True), (2.0, False), (9.0, False), (400.0, False)]
)
def test_kl_keeps_its_digits_whatever_the_prior(b, below_one, device):
    e = torch.cat((torch.zeros(1), torch.logspace(-4, 4, 120)))
    numbers = torch.tensor(concentration(b, below_one)[2:], device=device)
    out = torch.full_like(e, float("nan"), device=device)
    _share[(1,)](e.to(device), numbers, out, len(e), PRIOR=b, BELOW_ONE=below_one)
    x = mpmath.mpf(b)
    expected = torch.tensor(
        [float(v * mpmath.psi(0, x + v) - mpmath.loggamma(x + v) + mpmath.loggamma(x) - v) for v in e.tolist()],
        dtype=torch.float64,
    )
    error = (out.cpu().double() - expected).abs() / expected.abs().clamp_min(1)
    assert float(error.max()) <= TOLERANCE[device]


@pytest.mark.parametrize("kind", ["softplus", "relu", "exp"])
def test_evidence(kind, device):
    x = torch.cat((torch.linspace(-30, 30, 119), torch.zeros(1)))
    z = x.double().requires_grad_()
    e = {"softplus": torch.nn.functional.softplus(z, threshold=1e3), "relu": z.relu(), "exp": z.clamp(-10, 10).exp()}
    e[kind].sum().backward()
    for name, expected in ((kind, e[kind].detach()), (f"slope {kind}", z.grad)):
        error = (evaluate(name, x.to(device)) - expected).abs() / expected.clamp_min(1e-3)
        assert float(error.max()) <= 2 * TOLERANCE[device]


@pytest.mark.parametrize("kind", ["softplus", "relu", "exp"])
def test_nan_stays_nan(kind, device):
    assert bool(torch.isnan(evaluate(kind, torch.full((3,), float("nan"), device=device))).all())
