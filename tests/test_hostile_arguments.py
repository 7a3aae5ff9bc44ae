"""Every argument of every public function, module and metric, each with everything that it must not be.

Which argument is of which kind is written down once; a test holds the list to the signatures.
"""

from __future__ import annotations

import inspect
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import sure_kernels as sk
from sure_kernels import metrics

DOCS = Path(__file__).parents[1] / "docs" / "reliability.md"
T, V = TypeError, ValueError
NAN, INF, HUGE = math.nan, math.inf, 10**400

GENERATOR = torch.Generator().manual_seed(0)
Z = torch.randn((2, 3, 4, 5), generator=GENERATOR)
Y = torch.randint(0, 3, (2, 4, 5), generator=GENERATOR)
X = torch.rand((2, 1, 4, 5), generator=GENERATOR)
P = Z.softmax(1)
D = torch.full_like(X, 0.5)
GOOD = {
    "logits": Z,
    "input": Z,
    "probability": P,
    "target": Y,
    "image": X,
    "distance": D,
    "hard": X > 0.5,
    "error": X > 0.5,
    "noisy": [X + 0.1, X + 0.2],
    "maps": [X, X + 0.1],
    "levels": [0.3, 0.7],
    **dict.fromkeys(("values", "uncertainty", "clean", "x"), X),
    **dict.fromkeys(("scores", "gradient", "noised", "y"), X.flip(0)),
    "num_classes": 3,
    "num_levels": 2,
}


def filled(tensor: torch.Tensor, value: float) -> torch.Tensor:
    """`tensor` with its first number replaced."""
    tensor = tensor.clone()
    tensor.view(-1)[0] = value
    return tensor


# What no tensor argument may be, whatever it stands for.
NO_TENSOR = {
    "a list": lambda t: (t.tolist(), T),
    "a NumPy array": lambda t: (t.numpy(), T),
    "a word": lambda t: ("map", T),
    "a number": lambda t: (1.0, T),
    "None": lambda t: (None, T),
    "complex": lambda t: (t + 0j, T),
    "sparse": lambda t: (t.to_sparse(), T),
    "nested": lambda t: (torch.nested.nested_tensor(list(t)), T),
}
NO_FLOATS = {
    "integers": lambda t: (t.long(), T),
    "booleans": lambda t: (t > 0, T),
    "float8": lambda t: (t.to(torch.float8_e4m3fn), T),
}
# Of an argument that decides the shape of the others, what it may not be on its own.
NO_SHAPE = {
    "0-d": lambda t: (t.flatten()[0], V),
    "an empty batch": lambda t: (t[:0], V),
    "six axes": lambda t: (t[..., None, None], V),
}
NO_VOXEL = {"zero voxels": lambda t: (t[..., :0], V)}
ONE_CLASS = {"one class": lambda t: (t[:, :1], V)}
# Of an argument that must look like another one.
UNLIKE = {
    "0-d": lambda t: (t.flatten()[0], V),
    "another batch": lambda t: (t[:1], V),
    "zero voxels": lambda t: (t[..., :0], V),
    "swapped axes": lambda t: (t.mT, V),
    "a voxel more": lambda t: (torch.cat([t, t[..., :1]], -1), V),
    "another device": lambda t: (t.to("meta"), V),
}
NOT_FINITE = {"a NaN": lambda t: (filled(t, NAN), V), "an infinity": lambda t: (filled(t, INF), V)}
LEARNED = {"requires a gradient": lambda t: (t.float().clone().requires_grad_(), V)}


def constant(value: Any, error: type[Exception]) -> Callable[[Any], tuple[Any, type[Exception]]]:
    return lambda good: (value, error)


NO_NUMBER = {
    "a word": constant("one", T),
    "None": constant(None, T),
    "a list": constant([1.0], T),
    "True": constant(True, T),
    "complex": constant(1j, T),
}
FINITE = {
    "NaN": constant(NAN, V),
    "400 digits": constant(HUGE, V),
}
POSITIVE = {"-1": constant(-1, V), "minus infinity": constant(-INF, V)}
NO_INTEGER = {**NO_NUMBER, "a fraction": constant(1.5, T), "400 digits": constant(HUGE, V)}
NO_NUMBERS = {
    "a word": constant("one", T),
    "a dict": constant({0: 1.0}, T),
    "words": constant(["a", "b", "c"], T),
    "switches": constant([True, True, True], T),
    "complex": constant([1j, 1j, 1j], T),
    "a matrix": constant(torch.ones(3, 3), V),
    "five of them": constant([1.0] * 5, V),
    "none of them": constant([], V),
    "a NaN": constant([1.0, 1.0, NAN], V),
    "a negative one": constant([1.0, -1.0, 1.0], V),
    "an infinite one": constant([1.0, 1.0, INF], V),
}

KINDS: dict[str, dict[str, Callable[[Any], tuple[Any, type[Exception]]]]] = {
    "logits": {**NO_TENSOR, **NO_FLOATS, **NO_SHAPE, **NO_VOXEL, **ONE_CLASS, **NOT_FINITE},
    "logits of maps": {**NO_TENSOR, **NO_FLOATS, **NO_SHAPE, **NO_VOXEL, **ONE_CLASS},
    "probabilities": {
        **NO_TENSOR,
        **NO_FLOATS,
        **NO_SHAPE,
        **NO_VOXEL,
        **ONE_CLASS,
        "above 1": lambda t: (t + 1, V),
        "below 0": lambda t: (t - 1, V),
    },
    "map": {**NO_TENSOR, **NO_FLOATS, **NO_SHAPE, **NO_VOXEL},
    "points": {**NO_TENSOR, **NO_FLOATS, "0-d": NO_SHAPE["0-d"], "an empty batch": NO_SHAPE["an empty batch"]},
    "finite points": {**NO_TENSOR, **NO_FLOATS, **NO_SHAPE, **NO_VOXEL, **NOT_FINITE},
    "labels": {
        **NO_TENSOR,
        **UNLIKE,
        "fractions": lambda t: (t + 0.5, T),
        "label -1": lambda t: (t - 1, V),
        "label 3 of 3": lambda t: (t + 1, V),
    },
    "labels of an image": {
        **NO_TENSOR,
        **UNLIKE,
        "fractions": lambda t: (t + 0.5, T),
        "label -1": lambda t: (t - 1, V),
    },
    "index map": {
        **NO_TENSOR,
        **NO_SHAPE,
        **NO_VOXEL,
        "fractions": lambda t: (t + 0.5, T),
    },
    "image of logits": {**NO_TENSOR, **NO_FLOATS, **UNLIKE, **NOT_FINITE, **LEARNED},
    "gradient of logits": {**NO_TENSOR, **NO_FLOATS, **UNLIKE, **NOT_FINITE, **LEARNED},
    "band": {**NO_TENSOR, **UNLIKE, "floats": lambda t: (t.float(), T), "band 9": lambda t: (t * 0 + 9, V)},
    "distances": {
        **NO_TENSOR,
        **UNLIKE,
        "integers": lambda t: (t.long(), T),
        "negative": lambda t: (-t, V),
    },
    "like points": {**NO_TENSOR, **NO_FLOATS, **UNLIKE},
    "finite, like points": {**NO_TENSOR, "integers": NO_FLOATS["integers"], **UNLIKE, **NOT_FINITE},
    "0 and 1": {
        **NO_TENSOR,
        **UNLIKE,
        **LEARNED,
        "a 2": lambda t: (filled(t.float(), 2), V),
        "a half": lambda t: (filled(t.float(), 0.5), V),
        "a NaN": lambda t: (filled(t.float(), NAN), V),
    },
    "groups": {**NO_TENSOR, **UNLIKE, "floats": lambda t: (t.float(), T)},
    "maps": {
        "a word": constant("map", T),
        "a number": constant(1.0, T),
        "a 0-d tensor": constant(torch.tensor(1.0), T),
        "none of them": constant([], V),
        "no tensors": constant([1.0, 2.0], T),
        "integers": lambda maps: ([m.long() for m in maps], T),
        "complex": lambda maps: ([m + 0j for m in maps], T),
        "another batch": lambda maps: ([maps[0], maps[1][:1]], V),
        "another device": lambda maps: ([maps[0], maps[1].to("meta")], V),
    },
    "levels": {
        "a word": constant("one", T),
        "a number": constant(1.0, T),
        "a 0-d tensor": constant(torch.tensor(1.0), T),
        "words": constant(["a", "b"], T),
        "None among them": constant([0.3, None], T),
        "a NaN": constant([0.3, NAN], V),
        "an infinity": constant([0.3, INF], V),
        "three for two": constant([0.1, 0.2, 0.3], V),
        "complex": constant(torch.tensor([1j, 2j]), T),
        "levels for three cases": constant([0.3, torch.ones(3)], V),
    },
    "coordinates": {
        **NO_TENSOR,
        "fractions": lambda t: (t + 0.5, T),
        "three axes": constant(torch.zeros((2, 1, 3), dtype=torch.long), V),
        "outside": lambda t: (t + 99, V),
        "another device": lambda t: (t.to("meta"), V),
    },
    "choice": {
        "an unknown word": constant("anything", V),
        "a blank": constant("", V),
        "a number": constant(1, T),
        "None": constant(None, T),
        "a list": constant(["exact"], T),
    },
    "measures": {
        "an unknown word": constant("variance", V),
        "none of them": constant((), V),
        "twice the same": constant(("vacuity", "vacuity"), V),
        "a number": constant(1, T),
        "None": constant(None, T),
        "a set": constant({"vacuity"}, T),
    },
    "switch": {"a word": constant("no", T), "a number": constant(1, T), "None": constant(None, T)},
    "weight": {**NO_NUMBER, **FINITE, **POSITIVE, "infinity": constant(INF, V)},
    "distance limit": {**NO_NUMBER, **FINITE, **POSITIVE},
    "signed number": {**NO_NUMBER, **FINITE, "infinity": constant(INF, V)},
    "integer": NO_INTEGER,
    "count": {**NO_INTEGER, "0": constant(0, V), "-1": constant(-1, V), "2^62": constant(2**62, V)},
    "odd count": {**NO_INTEGER, "0": constant(0, V), "-1": constant(-1, V), "2": constant(2, V), "99": constant(99, V)},
    "prior": {
        **NO_NUMBERS,
        "None": constant(None, T),
        "0": constant(0.0, V),
        "below 1e-3": constant(9e-4, V),
        "negative": constant(-1.0, V),
        "NaN": constant(NAN, V),
        "infinity": constant(INF, V),
        "400 digits": constant(HUGE, V),
        "learned": constant(torch.ones(3, requires_grad=True), V),
    },
    "class weight": {**NO_NUMBERS, "a number": constant(1.0, T), "all 0": constant([0.0, 0.0, 0.0], V)},
    "spacing": {
        **{name: case for name, case in NO_NUMBERS.items() if name != "a matrix"},
        "0": constant(0.0, V),
        "-1": constant(-1.0, V),
        "NaN": constant(NAN, V),
    },
    "axes": {**NO_INTEGER, "1": constant(1, V), "4": constant(4, V)},
    "three weights": {
        "a number": constant(1.0, T),
        "two of them": constant((1.0, 1.0), V),
        "a NaN": constant((1.0, NAN, 1.0), V),
        "a negative one": constant((1.0, 1.0, -1.0), V),
        "a word": constant((1.0, "x", 1.0), T),
        "None": constant(None, T),
    },
    "range": {
        "a word": constant("one", T),
        "None": constant(None, T),
        "one number": constant([1.0], V),
        "wrong order": constant((1.0, 0.0), V),
        "a NaN": constant((0.0, NAN), V),
        "an infinity": constant((0.0, INF), V),
    },
    "generator": {"a number": constant(1, T), "a word": constant("x", T)},
    "process group": {"a number": constant(0, T), "a word": constant("world", T)},
    "soft thresholds": {"True": constant(True, T), "a tuple": constant((1.0, 2.0), T), "a word": constant("on", T)},
    "pairs without soft": {"a tensor": constant(torch.tensor([[0, 1]]), V), "a number": constant(1, V)},
    "function": {"a number": constant(1, T), "a word": constant("mean", T), "None": constant(None, T)},
}

OPTIONS = {
    **dict.fromkeys(
        ("kind", "evidence", "dice", "compat", "relation", "operator", "padding_mode", "channel_reduction"), "choice"
    ),
    **dict.fromkeys(("supervision", "method", "ties"), "choice"),
    **dict.fromkeys(("include_background", "return_terms", "within_class", "per_class", "return_reason"), "switch"),
    **dict.fromkeys(
        ("ace_weight", "kl_weight", "dice_weight", "gradient_weight", "far_weight", "noise_weight"), "weight"
    ),
    **dict.fromkeys(("eps", "std", "margin", "num_epochs", "good_model_step", "annealing_steps"), "weight"),
    **dict.fromkeys(("boundary", "near", "far"), "weight"),
    "max_distance": "weight",
    "mean": "signed number",
    "ignore_index": "integer",
    **dict.fromkeys(("num_pairs", "patches_per_class", "num_bins", "num_classes", "num_levels"), "count"),
    "patch_size": "odd count",
    "prior": "prior",
    "class_weight": "class weight",
    "spacing": "spacing",
    "spatial_dims": "axes",
    "measures": "measures",
    **dict.fromkeys(("weights", "noise_weights"), "three weights"),
    "mean_range": "range",
    "generator": "generator",
    "process_group": "process group",
    "soft": "soft thresholds",
    "pairs": "pairs without soft",
    "mask": "0 and 1",
    "groups": "groups",
    "distance": "distances",
    "levels": "levels",
    "points": "coordinates",
    "function": "function",
}
OF_LOGITS = {
    "logits": "logits",
    "input": "logits",
    "target": "labels",
    "image": "image of logits",
    "gradient": "gradient of logits",
    "band": "band",
}
SEGMENTATION = {"probability": "probabilities", "target": "labels", "uncertainty": "like points"}
DETECTION = {"uncertainty": "points", "error": "0 and 1"}
RANKS = {"x": "points", "y": "like points"}
RANKING = {"uncertainty": "finite points", "gradient": "finite, like points"}
NOISE = {"clean": "finite points", "noisy": "maps"}
RESPONSE = {"maps": "maps"}

# What the tensors of each public callable are; its options are named alike everywhere.
TENSORS: dict[str, dict[str, str]] = {
    "gradient_magnitude": {"image": "map"},
    "dirichlet_uncertainty": {"logits": "logits of maps"},
    "evidential_loss": OF_LOGITS,
    "supervised_evidential_loss": OF_LOGITS,
    "boundary_distance": {"target": "index map", "max_distance": "distance limit"},
    "boundary_band": {"target": "index map"},
    "pairwise_ranking_loss": {"values": "finite points", "scores": "finite, like points"},
    "gradient_uncertainty_loss": RANKING,
    "noise_uncertainty_loss": NOISE,
    "hard_sample_mask": {"clean": "map", "noised": "like points"},
    "add_gaussian_noise": {"image": "map"},
    "sample_noise_patches": {"image": "map", "target": "labels of an image", "hard": "0 and 1"},
    "GradientMagnitude": {"image": "map"},
    "DirichletUncertainty": {"logits": "logits of maps"},
    "EvidentialLoss": OF_LOGITS,
    "GradientUncertaintyLoss": RANKING,
    "NoiseUncertaintyLoss": NOISE,
    "SURELoss": {**OF_LOGITS, "noisy": "maps"},
    "metrics.reliability_curve": SEGMENTATION,
    "metrics.expected_calibration_error": SEGMENTATION,
    "metrics.adaptive_calibration_error": SEGMENTATION,
    "metrics.brier_score": SEGMENTATION,
    "metrics.negative_log_likelihood": SEGMENTATION,
    "metrics.segmentation_histograms": SEGMENTATION,
    "metrics.calibration_error_detection": SEGMENTATION,
    "metrics.error_detection_auroc": DETECTION,
    "metrics.error_detection_auprc": DETECTION,
    "metrics.area_under_risk_coverage": DETECTION,
    "metrics.uncertainty_error_overlap": DETECTION,
    "metrics.uncertainty_correlation": RANKS,
    "metrics.uncertainty_ratio": RANKS,
    "metrics.noise_response": RESPONSE,
    "metrics.ReliabilityCurve": SEGMENTATION,
    "metrics.ExpectedCalibrationError": SEGMENTATION,
    "metrics.AdaptiveCalibrationError": SEGMENTATION,
    "metrics.BrierScore": SEGMENTATION,
    "metrics.NegativeLogLikelihood": SEGMENTATION,
    "metrics.CalibrationErrorDetection": SEGMENTATION,
    "metrics.ErrorDetectionAUROC": DETECTION,
    "metrics.ErrorDetectionAUPRC": DETECTION,
    "metrics.AreaUnderRiskCoverage": DETECTION,
    "metrics.UncertaintyErrorOverlap": DETECTION,
    "metrics.UncertaintyCorrelation": RANKS,
    "metrics.UncertaintyRatio": RANKS,
    "metrics.NoiseResponse": RESPONSE,
}
# Good values of arguments that have a default, where the bad ones are made from good ones.
OPTIONAL = {
    "mask": torch.ones((2, 4, 5), dtype=torch.bool),
    "groups": Y,
    "band": torch.ones((2, 4, 5), dtype=torch.uint8),
    "points": torch.zeros((2, 1, 2), dtype=torch.long),
}
PUBLIC = {
    **{name: getattr(sk, name) for name in sk.__all__},
    **{f"metrics.{name}": getattr(metrics, name) for name in metrics.__all__},
}
# Results, switches and what has no tensors to check; CaseMean is in test_hostile_library.
NOT_HERE = {
    *("BackendUnavailableError", "backend", "backends", "doctor", "get_backend", "set_backend", "metrics", "reference"),
    *("EvidentialTerms", "SupervisedTerms", "NoiseTerms", "NoisePatches", "SURETerms", "SoftThresholds"),
    *("Bounded", "CaseMean", "Reliability", "Response", "SegmentationHistograms", "SegmentationScores", "Undefined"),
}


def stages(name: str) -> list[dict[str, inspect.Parameter]]:
    """The parameters of a function, or those of a class when it is made, called or updated, and asked."""
    public = PUBLIC[name]
    if inspect.isfunction(public):
        return [dict(inspect.signature(public).parameters)]
    called = [public.__init__, *((public.update, public.compute) if hasattr(public, "compute") else (public.forward,))]
    found = [{n: p for n, p in inspect.signature(f).parameters.items() if n != "self"} for f in called]
    if issubclass(public, metrics.CaseMean):  # whose update takes what the function of its name takes
        function = {"UncertaintyCorrelation": "uncertainty_correlation", "UncertaintyRatio": "uncertainty_ratio"}
        every = inspect.signature(getattr(metrics, function[public.__name__])).parameters
        found[1] = {n: every[n] for n in ("x", "y", "mask", "groups")}
    return found


def call(name: str, **replaced: Any) -> None:
    """Make, call or update, and ask what `name` is, with good arguments but for those that are `replaced`."""
    public = PUBLIC[name]
    given = [
        {
            n: replaced.get(n, GOOD.get(n))
            for n, p in stage.items()
            if n in replaced or p.default is inspect.Parameter.empty
        }
        for stage in stages(name)
    ]
    if inspect.isfunction(public):
        public(**given[0])
        return
    made = public(**given[0])
    if isinstance(made, sk.SURELoss):
        made.set_epoch(60)  # of those that are supervised
        made(**{"image": X, "noisy": [Z + 0.1, Z + 0.2], "levels": [0.3, 0.7], **given[1]})
    elif isinstance(made, torch.nn.Module):
        made(**given[1])
    else:
        made.update(**given[1])
        made.compute(**given[2])


def kind_of(name: str, argument: str) -> str:
    return TENSORS[name].get(argument) or OPTIONS[argument]


def bad_arguments(name: str):
    """Each argument of `name` with each value that it must not have: the value's name, the value and the error."""
    for argument, parameter in {n: p for stage in stages(name) for n, p in stage.items()}.items():
        good = GOOD.get(argument, OPTIONAL.get(argument))
        if (name, argument) == ("SURELoss", "noisy"):
            good = [Z, Z]
        for case, make in KINDS[kind_of(name, argument)].items():
            if case == "None" and parameter.default is None:
                continue
            yield argument, case, *make(good)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of nested and sparse tensors, from torch
@pytest.mark.parametrize("name", TENSORS)
def test_every_argument_is_checked(name):
    call(name)
    wrong = []
    for argument, case, value, expected in bad_arguments(name):
        try:
            call(name, **{argument: value})
            found = "nothing"
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
            # Modules are called as MONAI's are; their errors call the input what it is.
            name_of_it = {"input": "logits"}.get(argument, argument)
            named = re.match(rf"(\w+, )*{name_of_it}(\[\d+\])?(, \w+)*: ", str(error))
            if type(error) is expected and named and "\n" not in str(error) and len(str(error)) < 300:
                continue
        wrong.append(f"{argument}, {case}: expected {expected.__name__} that names it, got {found[:200]}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", TENSORS)
def test_several_bad_arguments_at_once_end_in_the_same_errors(name):
    """Whatever is wrong, and however many: one line, from a fixed seed."""
    rng, cases = random.Random(name), list(bad_arguments(name))
    for _ in range(20):
        chosen = {argument: value for argument, _, value, _ in rng.sample(cases, 3)}
        with pytest.raises((TypeError, ValueError), match=r"^[^\n]{1,300}$"):
            call(name, **chosen)


def test_every_public_callable_is_here():
    assert {n for n in PUBLIC if n.rpartition(".")[2] not in NOT_HERE} == set(TENSORS)
    for name in TENSORS:
        for argument in (n for stage in stages(name) for n in stage):
            assert kind_of(name, argument) in KINDS


def test_the_table_of_the_docs_is_this_one():
    text = DOCS.read_text().partition("### Every argument of the library")[2].partition("###")[0]
    rows = [tuple(cell.strip() for cell in line.split("|")[1:-1]) for line in text.splitlines() if "|" in line]
    assert rows[2:] == table()
    assert f" {sum(1 for name in TENSORS for _ in bad_arguments(name))} calls" in " ".join(text.split())


def table() -> list[tuple[str, str, str]]:
    """Rows of docs/reliability.md: a kind of argument, what is tried in its place, the error."""
    good = {"labels": Y, "labels of an image": Y, "index map": Y, "band": OPTIONAL["band"], "groups": Y, "maps": [X, X]}
    rows = []
    for kind, cases in KINDS.items():
        errors: dict[str, list[str]] = {}
        for case, make in cases.items():
            errors.setdefault(make(good.get(kind, X))[1].__name__, []).append(case)
        rows += [(kind, ", ".join(names), error) for error, names in errors.items()]
    return rows
