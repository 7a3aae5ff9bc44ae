"""Property tests of the kernels: any options, sizes, layouts and dtypes against the reference in float64.

In a file of its own, so that a machine with a GPU but without hypothesis runs all the rest.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("hypothesis")

import test_dirichlet_kernel as dirichlet
import test_gradient_magnitude_kernel as gradient_magnitude
import test_noise_kernel as noise
import test_ranking_kernel as ranking
import test_supervised_kernel as supervised
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from kernel_cases import HALF_TOLERANCE, LAYOUTS, UPSTREAM, laid_out
from loss_cases import case, compare
from tolerances import FLOAT32_GRADIENT_LARGE, FLOAT32_MAPS

from sure_kernels.functional import DICE_FORMS, KINDS, RELATIONS
from sure_kernels.kernel_lib.special import EVIDENCE
from sure_kernels.kernel_lib.taps import CHANNEL_REDUCTIONS, OPERATORS, PADDING_MODES
from sure_kernels.ops.dirichlet.reference import MEASURES

pytestmark = pytest.mark.usefixtures("triton_backend", "poisoned_memory")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
POSITIVE = st.floats(1e-3, 3.0)


def examples(number: int):
    """Shrinking would cost minutes in the interpreter, and the seed of a failure is printed anyway."""
    return settings(
        max_examples=number,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


def sizes(longest: dict[int, int]):
    """Two or three axes, each at most as long as `longest` says for that number of axes."""
    return st.sampled_from(sorted(longest)).flatmap(lambda dims: st.tuples(*(st.integers(1, longest[dims]),) * dims))


@examples(8)
@given(data=st.data())
def test_gradient_magnitude(data):
    spatial = data.draw(sizes({2: 7, 3: 5}))
    shape = (data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3)), *spatial)
    x = gradient_magnitude.image(shape, DEVICE, data.draw(st.integers(0, 2**31)))
    dtype = data.draw(st.sampled_from(DTYPES))
    gradient_magnitude.compare(
        laid_out(x.to(dtype), data.draw(st.sampled_from(LAYOUTS))),
        data.draw(st.sampled_from(UPSTREAM)),
        tolerance=HALF_TOLERANCE.get(dtype, FLOAT32_GRADIENT_LARGE),
        operator=data.draw(st.sampled_from(OPERATORS)),
        spacing=data.draw(st.one_of(st.none(), st.tuples(*(st.floats(0.2, 5.0),) * len(spatial)))),
        padding_mode=data.draw(st.sampled_from(PADDING_MODES)),
        channel_reduction=data.draw(st.sampled_from(CHANNEL_REDUCTIONS)),
        eps=data.draw(st.sampled_from([0.0, 0.1])),
    )


@examples(6)
@given(data=st.data())
def test_dirichlet_uncertainty(data):
    measures = tuple(data.draw(st.lists(st.sampled_from(MEASURES), min_size=1, unique=True)))
    # Pairs of classes are slow in the interpreter.
    k = data.draw(st.one_of(st.integers(2, 8), st.sampled_from([9, 10] if "dissonance" in measures else [16, 17, 32])))
    shape = (data.draw(st.integers(1, 2)), k, *data.draw(sizes({2: 7, 3: 4})))
    x = dirichlet.logits(shape, DEVICE, data.draw(st.sampled_from([0.1, 3.0, 12.0])), data.draw(st.integers(0, 2**31)))
    dtype = data.draw(st.sampled_from(DTYPES))
    layout, upstream = data.draw(st.sampled_from(LAYOUTS)), data.draw(st.sampled_from(UPSTREAM))
    evidence = data.draw(st.sampled_from(EVIDENCE))
    prior = data.draw(st.one_of(st.just(1.0), POSITIVE, st.tuples(*(POSITIVE,) * k)))
    # Numbers as large as 1 / prior meet in the measures.
    small = min(prior if isinstance(prior, tuple) else (prior,)) < 0.01
    dirichlet.compare(
        laid_out(x.to(dtype), layout),
        upstream,
        tolerance=HALF_TOLERANCE.get(dtype, FLOAT32_GRADIENT_LARGE),
        value_tolerance=(2 if small else 1) * FLOAT32_MAPS,
        evidence=evidence,
        prior=prior,
        measures=measures,
    )


@examples(12)
@given(data=st.data())
def test_evidential_loss(data):
    n, k = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 6))
    shape = (n, k, *data.draw(sizes({2: 7, 3: 7})))
    logits, target, mask, *_ = case(
        shape,
        DEVICE,
        scale=data.draw(st.sampled_from([0.1, 3.0, 12.0])),
        ignored=data.draw(st.sampled_from([0.0, 0.3])),
        seed=data.draw(st.integers(0, 2**31)),
    )
    compare(
        "evidential_loss",
        laid_out(logits, data.draw(st.sampled_from(LAYOUTS))),
        target,
        mask=mask if data.draw(st.booleans()) else None,
        kind=data.draw(st.sampled_from(KINDS)),
        evidence=data.draw(st.sampled_from(EVIDENCE)),
        prior=data.draw(st.one_of(st.just(1.0), POSITIVE, st.tuples(*(POSITIVE,) * k))),
        dice=data.draw(st.sampled_from(DICE_FORMS)),
        class_weight=data.draw(st.one_of(st.none(), st.tuples(*(POSITIVE,) * k))),
        include_background=data.draw(st.booleans()),
        compat=data.draw(st.sampled_from([None, "official"])),
        # KL holds (B - 1/2) ln(t + B): with many classes and a large prior an ulp of the logarithm counts B times.
        value_tolerance=5e-6,
        gradient_tolerance=FLOAT32_GRADIENT_LARGE,
    )


@examples(8)
@given(data=st.data())
def test_supervised_evidential_loss(data):
    shape = (data.draw(st.integers(1, 3)), 3, *data.draw(sizes({2: 6, 3: 6})))
    logits, target, mask, image, band = supervised.active(shape, DEVICE, seed=data.draw(st.integers(0, 2**31)))
    compare(
        "supervised_evidential_loss",
        laid_out(logits, data.draw(st.sampled_from(LAYOUTS))),
        target,
        torch.cat([image] * data.draw(st.integers(1, 2)), 1),
        mask=mask if data.draw(st.booleans()) else None,
        band=band,
        supervision=data.draw(st.sampled_from(supervised.FORMS)),
        relation=data.draw(st.sampled_from(RELATIONS)),
        operator=data.draw(st.sampled_from(OPERATORS)),
        padding_mode=data.draw(st.sampled_from(PADDING_MODES)),
        channel_reduction=data.draw(st.sampled_from(CHANNEL_REDUCTIONS)),
        kind=data.draw(st.sampled_from(KINDS)),
        value_tolerance=4e-6,
        # A handful of boundary voxels with nearly equal uncertainty: 1 / std(u) amplifies an ulp of u.
        gradient_tolerance=10 * FLOAT32_GRADIENT_LARGE,
    )


@examples(8)
@given(
    shape=st.tuples(st.integers(1, 3), st.just(1)).flatmap(lambda n: sizes({2: 6, 3: 4}).map(lambda s: (*n, *s))),
    levels=st.integers(1, 4),
    masked=st.booleans(),
    pointwise=st.booleans(),
    near=st.sampled_from([0.0, 3.0, 100.0]),
    official=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_noise_uncertainty_loss(shape, levels, masked, pointwise, near, official, seed):
    maps, m, distance, mask, points = noise.case(shape, DEVICE, levels, seed)
    with pytest.MonkeyPatch.context() as patch:
        noise.several_blocks(patch)
        noise.compare(
            maps,
            m,
            distance,
            near=near,
            mask=mask if masked else None,
            points=points if pointwise else None,
            compat="official" if official else None,
        )


@pytest.mark.parametrize("way", ["direct", "levels"])
@examples(15)
@given(
    rows=st.integers(1, 3),
    n=st.integers(1, 40),
    levels=st.sampled_from([3, 16, 10_000]),
    masked=st.booleans(),
    grouped=st.booleans(),
    relation=st.sampled_from(RELATIONS),
    seed=st.integers(0, 2**20),
)
def test_pairwise_ranking_loss(way, rows, n, levels, masked, grouped, relation, seed):
    values, scores, mask, groups = ranking.points((rows, n), DEVICE, seed, levels)
    options = {"mask": mask if masked else None, "groups": groups if grouped else None}
    with pytest.MonkeyPatch.context() as patch:
        ranking.small_tiles(patch, way)
        ranking.compare(values, scores, relation=relation, **options)
