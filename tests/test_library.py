"""The library as a whole: backends, registry, layering, public surface, compilation, process groups."""

from __future__ import annotations

import ast
import itertools
import subprocess
import sys
import tomllib
from pathlib import Path
from unittest import mock

import pytest
import tolerances
import torch
import torch.multiprocessing as mp
from packaging.requirements import Requirement
from packaging.version import Version

import sure_kernels as sk
from sure_kernels import functional, registry
from sure_kernels.backends import BACKENDS, COMPILED_OPS
from sure_kernels.kernel_lib.labels import pack_labels

PACKAGE = Path(sk.__file__).parent


def test_public_surface():
    """What is public is decided, not stumbled into: a new name has to be added here."""
    assert sorted(sk.__all__) == [
        "BackendUnavailableError",
        "DirichletUncertainty",
        "EvidentialLoss",
        "EvidentialTerms",
        "GradientMagnitude",
        "GradientUncertaintyLoss",
        "NoisePatches",
        "NoiseTerms",
        "NoiseUncertaintyLoss",
        "SURELoss",
        "SURETerms",
        "SoftThresholds",
        "SupervisedTerms",
        "add_gaussian_noise",
        "backend",
        "backends",
        "boundary_band",
        "boundary_distance",
        "dirichlet_uncertainty",
        "doctor",
        "evidential_loss",
        "get_backend",
        "gradient_magnitude",
        "gradient_uncertainty_loss",
        "hard_sample_mask",
        "metrics",
        "noise_uncertainty_loss",
        "pairwise_ranking_loss",
        "reference",
        "sample_noise_patches",
        "set_backend",
        "supervised_evidential_loss",
    ]
    for name in sk.__all__:
        assert getattr(sk, name).__doc__, name


def test_every_op_has_every_part():
    for op in registry.OPS:
        for part in op.parts:
            assert op.part(part).__doc__, f"{op.name}: {part}"
        assert op.function.__doc__
        assert op.reference is not op.function


def imports_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith(("sure_kernels", "sure.", "triton"))}


# The supervised loss is made of the ops it fuses; the evidential sweeps, which serve both losses, of Dirichlet
# distributions and of gradient magnitudes.
ROOMS_USED = {
    "evidential": {"dirichlet", "gradient_magnitude"},
    "supervised": {"evidential", "gradient_magnitude", "dirichlet", "ranking"},
}


def test_imports_run_one_way():
    for path in PACKAGE.rglob("*.py"):
        relative = path.relative_to(PACKAGE)
        for name in imports_of(path):
            where = f"{relative} imports {name}"
            assert not name.startswith("sure."), where
            if relative.parts[0] == "kernel_lib":
                assert name.startswith(("sure_kernels.kernel_lib", "triton")), where
            elif relative.parts[0] == "ops" and len(relative.parts) == 3:
                room = relative.parts[1]
                allowed = {room} | ROOMS_USED.get(room, set())
                rooms = tuple(f"sure_kernels.ops.{r}" for r in allowed)
                # A kernel lists the flag sets that the offline check compiles.
                listing = ("sure_kernels.compile_check.cases",) if relative.name == "kernel.py" else ()
                assert name.startswith(("sure_kernels.kernel_lib", "triton", *listing, *rooms)), where
            if name.startswith("triton"):
                assert relative.name == "kernel.py" or relative.parts[0] in ("kernel_lib", "compile_check"), where


def test_importing_needs_neither_triton_nor_the_training_extra():
    code = (
        "import sys\n"
        "for name in ('triton', 'scipy', 'monai', 'nibabel', 'matplotlib'): sys.modules[name] = None\n"
        "import torch, sure_kernels as sk\n"
        "z = torch.randn(1, 3, 4, 4)\n"
        "sk.evidential_loss(z, torch.zeros(1, 4, 4, dtype=torch.long))\n"
        "sk.boundary_distance(torch.zeros(1, 4, 4, dtype=torch.long))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_lowest_versions_are_the_bounds_of_the_project():
    """What `make test-lowest` installs is what pyproject.toml promises."""
    root = PACKAGE.parent
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    promised = set()
    for line in itertools.chain(project["dependencies"], *project["optional-dependencies"].values()):
        requirement = Requirement(line)
        promised |= {(requirement.name, Version(s.version)) for s in requirement.specifier if s.operator == ">="}
    lines = (root / "constraints-lowest.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    assert all([s.operator for s in pin.specifier] == ["=="] for pin in pins)
    assert {(pin.name, Version(s.version)) for pin in pins for s in pin.specifier} == promised
    assert len(pins) == len(promised)


def test_backends_explain_themselves():
    found = sk.backends()
    assert set(found) == set(BACKENDS) - {"auto"}
    assert found["eager"] is None
    assert found["reference"] is None
    x = torch.zeros(1)
    assert sk.get_backend(x) == "eager"
    with sk.backend("reference"):
        assert sk.get_backend(x) == "reference"
        with sk.backend("eager"):
            assert sk.get_backend(x) == "eager"
        assert sk.get_backend(x) == "reference"
    for name, reason in found.items():
        if reason is not None:
            with sk.backend(name), pytest.raises(sk.BackendUnavailableError, match=name):
                sk.get_backend(x)


def test_backend_from_the_environment(monkeypatch):
    monkeypatch.setenv("SURE_KERNELS_BACKEND", "reference")
    assert sk.get_backend(torch.zeros(1)) == "reference"
    monkeypatch.setenv("SURE_KERNELS_BACKEND", "gpu")
    with pytest.raises(ValueError, match="SURE_KERNELS_BACKEND: expected one of"):
        sk.get_backend(torch.zeros(1))


def test_doctor_is_well(capsys):
    assert sk.doctor() == 0
    out = capsys.readouterr().out
    for op in registry.OPS:
        assert op.name in out
    assert "all well" in out
    rows = {tuple(line.split()[:3]) for line in out.splitlines()}
    if not torch.cuda.is_available() and sk.backends()["compiled"] is None:
        assert {(name, "cpu", "compiled") for name in COMPILED_OPS} <= rows
    with sk.backend("eager"):
        assert sk.doctor() == 0
    assert " compiled  " not in capsys.readouterr().out.partition("ops against")[2]


@pytest.mark.parametrize("op", [op for op in registry.OPS if op.differentiable], ids=lambda op: op.name)
def test_full_graph_compilation(op):
    """torch.compile traces the public function whole; aot_eager needs no C++ compiler."""
    args, kwargs = op.example(torch.Generator().manual_seed(0), 3, (7, 6, 9), torch.float32)
    results = []
    for function in (op.function, torch.compile(op.function, fullgraph=True, backend="aot_eager")):
        leaf = args[0].clone().requires_grad_()
        out = function(leaf, *args[1:], **kwargs)
        total = sum(v.sum() for v in ((out,) if isinstance(out, torch.Tensor) else out))
        (gradient,) = torch.autograd.grad(total, leaf)
        results.append((total.detach(), gradient))
    torch.testing.assert_close(results[1], results[0])


def test_ops_that_keep_tensors_or_wait_are_left_out_of_graphs():
    """Those that Inductor records: what is kept from call to call must not lie in a graph's memory."""
    tag, ops = torch.Tag.cudagraph_unsafe, torch.ops.sure_kernels
    for name in ("evidential_loss", "supervised_gradient", "dirichlet_uncertainty", "pairwise_ranking"):
        assert tag in getattr(ops, name).default.tags
    for name in ("gradient_magnitude", "boundary_band", "noise_sums"):
        assert tag not in getattr(ops, name).default.tags


def test_a_weight_may_change_under_compilation():
    """As schedules change it from epoch to epoch: the second value makes it a symbol, and no graph breaks."""
    logits, target, _ = (x[1:] for x in joined_batch("like the rest"))
    traced = torch.compile(sk.evidential_loss, fullgraph=True, backend="aot_eager")
    for weight in (0.1, 0.2, 0.7):
        expected = sk.evidential_loss(logits, target, kl_weight=weight)
        torch.testing.assert_close(traced(logits, target, kl_weight=weight), expected)


@pytest.mark.parametrize("op", [op for op in registry.OPS if op.differentiable], ids=lambda op: op.name)
@pytest.mark.parametrize("upstream", ["scalar", "expanded", "stride 0", "transposed"])
def test_upstream_gradients_of_any_stride(op, upstream):
    args, kwargs = op.example(torch.Generator().manual_seed(0), 3, (5, 5, 5), torch.float32)
    grads = {}
    for name, function in (("closed form", op.function), ("reference", op.reference)):
        leaf = args[0].clone().requires_grad_()
        out = function(leaf, *args[1:], **kwargs)
        out = out if isinstance(out, torch.Tensor) else out[0]
        if upstream == "scalar":
            weight = torch.ones_like(out)
        elif upstream == "expanded":
            weight = torch.tensor(2.0).expand_as(out)
        elif upstream == "stride 0" and out.ndim:
            weight = torch.rand(out.shape[-1], generator=torch.Generator().manual_seed(1)).expand_as(out)
        else:
            weight = torch.rand(out.shape, generator=torch.Generator().manual_seed(1))
            weight = weight.transpose(-1, -2) if out.ndim else weight
        out.backward(weight)
        grads[name] = leaf.grad
    torch.testing.assert_close(grads["closed form"], grads["reference"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("op", [op for op in registry.OPS if op.differentiable], ids=lambda op: op.name)
def test_autocast_changes_nothing(op):
    args, kwargs = op.example(torch.Generator().manual_seed(0), 3, (5, 6, 7), torch.float32)
    leaf = args[0].clone().requires_grad_()
    expected = op.function(leaf, *args[1:], **kwargs)
    with torch.autocast("cpu", torch.bfloat16):
        got = op.function(leaf, *args[1:], **kwargs)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("k", [4, 40])
@pytest.mark.parametrize("banded", [False, True])
def test_packed_labels_are_a_sound_custom_op(k, banded):
    g = torch.Generator().manual_seed(0)
    target = torch.randint(-1, k, (2, 5, 7), generator=g)
    mask = torch.rand((2, 5, 7), generator=g) < 0.5
    band = torch.randint(0, 4, (2, 5, 7), generator=g, dtype=torch.uint8) if banded else None
    torch.library.opcheck(pack_labels.op, (target, mask, band, k, -1))


def test_every_custom_op_is_checked():
    """By torch.library.opcheck, somewhere in the tests."""
    defined, checked = set(), set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any("custom_op" in ast.dump(d) for d in node.decorator_list):
                defined.add(node.name)
    for path in Path(__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "opcheck":
                op = node.args[0]
                assert isinstance(op, ast.Attribute), f"{path}: {ast.unparse(node)}"
                assert op.attr == "op", f"{path}: {ast.unparse(node)}"
                checked.add(op.value.attr if isinstance(op.value, ast.Attribute) else getattr(op.value, "id", ""))
    assert len(defined) > 15
    assert defined <= checked


def test_inputs_are_not_written_to():
    for op in registry.OPS:
        args, kwargs = op.example(torch.Generator().manual_seed(0), 3, (5, 6, 7), torch.float32)
        before = [a.clone() for a in args]
        leaf = args[0].requires_grad_() if op.differentiable else args[0]
        out = op.function(leaf, *args[1:], **kwargs)
        if op.differentiable:
            sum(v.sum() for v in ((out,) if isinstance(out, torch.Tensor) else out)).backward()
        for a, b in zip(args, before, strict=True):
            assert torch.equal(a.detach(), b)


def joined_batch(first_rank: str):
    """Three images, of which the first rank holds one: without a valid voxel, without a boundary, or like the rest."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn((3, 3, 6, 7), generator=g, dtype=torch.float64)
    target = torch.randint(0, 3, (3, 6, 7), generator=g)
    target[0] = {"nothing valid": -100, "no boundary": 1, "like the rest": target[0]}[first_rank]
    # Far from every boundary but in one image, where there is none.
    target[2, :, 3:] = 0
    return logits, target, torch.randn((3, 1, 6, 7), generator=g, dtype=torch.float64)


FIRST_RANKS = ("nothing valid", "no boundary", "like the rest")


def _supervised(z, y, x, **options):
    return sk.supervised_evidential_loss(z, y, x, near=1.0, far=1.5, gradient_weight=20.0, **options)


SOFT = sk.SoftThresholds(d_g=1.0, d_f=1.5, d_n=1.0, d_eps=0.1, alpha=3.0)


def _neighbours(z):
    """Pairs within an image."""
    return torch.arange(z[:, 0].numel()).view(-1, 2)


def _noise(z, y, x, **options):
    maps = z.split(1, 1)
    return sk.noise_uncertainty_loss(maps[0], maps[1:], (0.3, 0.8), x.abs(), mask=y != -100, **options)


def _distance(y):
    return sk.boundary_distance(y, spatial_dims=2)


def _everything(z, y, x, **options):
    loss = sk.SURELoss(near=1.0, far=1.5, **options)
    loss.set_epoch(90)
    # All pairs of one voxel: what is drawn at random would differ between the ranks.
    with mock.patch.object(functional, "_soft_pairs", lambda pairs, inputs, *_: _neighbours(inputs.u)):
        return loss(z, y, image=x, noisy=[0.7 * z, 0.5 * z + x], levels=[0.3, 0.8])


LOSSES = {
    "evidential": lambda z, y, x, **group: sk.evidential_loss(z, y, **group),
    "supervised": _supervised,
    "exact": lambda z, y, x, **group: _supervised(z, y, x, supervision="exact", relation="increasing", **group),
    "correlation": lambda z, y, x, **group: _supervised(z, y, x, supervision="correlation", **group),
    "within class": lambda z, y, x, **group: _supervised(
        z, y, x, supervision="exact", within_class=True, dice="soft", class_weight=(1, 2, 3), **group
    ),
    "ranking": lambda z, y, x, **group: sk.pairwise_ranking_loss(z[:, :1], x, mask=y != -100, **group),
    "covariance": lambda z, y, x, **group: sk.pairwise_ranking_loss(
        z[:, :1], x, mask=y != -100, groups=y, method="covariance", **group
    ),
    "gradient": lambda z, y, x, **group: sk.gradient_uncertainty_loss(
        z[:, :1], x, _distance(y), mask=y != -100, groups=y, **group
    ),
    "everything": lambda z, y, x, **group: _everything(z, y, x, **group),
    "everything, soft": lambda z, y, x, **group: _everything(z, y, x, soft=SOFT, **group),
    "noise": lambda z, y, x, **group: _noise(z, y, x, near=1.0, **group),
    "noise at points": lambda z, y, x, **group: _noise(
        z, y, x, points=torch.tensor([[0, 1], [2, 3], [4, 4], [5, 6]]).expand(len(z), -1, -1), **group
    ),
    "soft noise": lambda z, y, x, **group: _noise(z, y, x, soft=SOFT, pairs=_neighbours(z), **group),
    "soft gradient": lambda z, y, x, **group: sk.gradient_uncertainty_loss(
        z[:, :1], x, x.abs(), mask=y != -100, soft=SOFT, pairs=_neighbours(z), **group
    ),
}


def one_rank(rank: int, port: int, folder: str, backends: tuple[str, ...], names: tuple[str, ...], dtype) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    shard = slice(0, 1) if rank == 0 else slice(1, 3)
    group = torch.distributed.group.WORLD
    out = {}
    for kind, namespace, name in itertools.product(FIRST_RANKS, backends, names):
        with sk.backend(namespace):
            logits, target, image = (t[shard] for t in joined_batch(kind))
            leaf = logits.to(dtype).requires_grad_()
            loss = LOSSES[name](leaf, target, image.to(dtype), process_group=group)
            loss.backward()
            # What DistributedDataParallel's averaging makes of it.
            out[kind, namespace, name] = (loss.detach(), leaf.grad / 2)
    logits, target, image = (t[shard] for t in joined_batch("like the rest"))
    for name, process_group in (("alone", None), ("sampled", group)):
        generator = torch.Generator().manual_seed(0)
        options = {"method": "sampled", "generator": generator, "process_group": process_group}
        out[name] = sk.pairwise_ranking_loss(logits[:, :1], image, **options)
    torch.save(out, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def two_ranks(folder: Path, backends: tuple[str, ...], names: tuple[str, ...], dtype: torch.dtype) -> list[dict]:
    """What each of two processes finds."""
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(one_rank, (port, str(folder), backends, names, dtype), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def on_joined_batch(kind: str, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient of one process, float64."""
    logits, target, image = joined_batch(kind)
    leaf = logits.clone().requires_grad_()
    expected = LOSSES[name](leaf, target, image)
    expected.backward()
    assert float(expected.detach()) > 0
    return expected.detach(), leaf.grad


def test_two_processes_are_one(tmp_path):
    ranks = two_ranks(tmp_path, ("eager", "reference"), tuple(LOSSES), torch.float64)
    for kind, namespace, name in itertools.product(FIRST_RANKS, ("eager", "reference"), LOSSES):
        with sk.backend(namespace):
            expected, expected_gradient = on_joined_batch(kind, name)
        for rank in ranks:
            torch.testing.assert_close(rank[kind, namespace, name][0], expected, rtol=1e-12, atol=0)
        gradient = torch.cat([r[kind, namespace, name][1] for r in ranks])
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-12)
    # Each rank draws pairs of its own images: theirs is the mean over all three.
    expected = (ranks[0]["alone"] + 2 * ranks[1]["alone"]) / 3
    for rank in ranks:
        torch.testing.assert_close(rank["sampled"], expected, rtol=1e-12, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "names"),
    [
        ("compiled", ("evidential", "supervised", "exact", "correlation")),
        ("triton", ("evidential", "supervised", "exact", "ranking", "covariance", "noise", "noise at points")),
    ],
)
def test_two_processes_are_one_in_float32(tmp_path, monkeypatch, backend, names):
    """The backends without float64, Triton in its interpreter, against the reference on the joined batch."""
    if backend == "triton":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    ranks = two_ranks(tmp_path, (backend,), names, torch.float32)
    for kind, name in itertools.product(FIRST_RANKS, names):
        with sk.backend("reference"):
            expected, expected_gradient = on_joined_batch(kind, name)
        for rank in ranks:
            torch.testing.assert_close(
                rank[kind, backend, name][0].double(), expected, rtol=tolerances.FLOAT32_VALUE, atol=0
            )
        gradient = torch.cat([r[kind, backend, name][1] for r in ranks]).double()
        bound = tolerances.FLOAT32_GRADIENT * float(expected_gradient.abs().max())
        torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=bound)
