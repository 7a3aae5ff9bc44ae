"""The benchmarks' machinery: what is measured, what a file of results holds, when one may be recorded."""

from __future__ import annotations

import copy
import subprocess
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tolerances import FLOAT32_MAPS

from benchmarks import __main__ as command
from benchmarks import host, instructions, measure, report, results
from benchmarks.registry import CASES, FUSED, OURS, Case, Setting, forms_of
from benchmarks.run import measure_all

TINY = Setting("volume", 1, 3, (16, 16, 16), torch.float32)


@pytest.fixture(scope="module")
def found():
    """Two forms at one size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "_COPIED", 1 << 20)
        patch.setattr(measure, "_REPEATS", 2)
        patch.setattr("benchmarks.run.QUICK", (TINY,))
        missing: Callable = lambda: __import__("no_such_package")
        case = next(c for c in CASES if c.op == "evidential_loss")
        peers = {"textbook": case.peers["textbook"], "somebody's": missing}
        small = Case(case.op, case.example, case.ours, peers, case.traffic)
        patch.setattr("benchmarks.run.CASES", (small,))
        return measure_all(torch.device("cpu"), quick=True)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.op)
def test_every_case_runs(case):
    """Ours and the rivals that are quick to make take the same arguments."""
    args, kwargs = case.example(torch.Generator().manual_seed(0), TINY)
    for name, load in forms_of(case).items():
        if "torch.compile" not in name:
            assert load()(*args, **kwargs) is not None, name
    assert case.traffic(args) > 0


@pytest.mark.parametrize("case", [case for case in CASES if FUSED in case.peers], ids=lambda case: case.op)
def test_closed_forms_whole(case):
    """What the kernels are compared with on a GPU computes what they do: values and gradient of two images."""
    args, kwargs = case.example(torch.Generator().manual_seed(0), TINY._replace(batch=2, shape=(9, 8, 7)))
    assert FUSED not in forms_of(case)
    fused = forms_of(case, on_gpu=True)[FUSED]
    results = []
    for function in (case.ours, fused(backend="aot_eager")):
        leaf = args[0].clone().requires_grad_()
        found = function(leaf, *args[1:], **kwargs)
        maps = [found] if isinstance(found, torch.Tensor) else list(found)
        total = sum((x * torch.linspace(0.5, 1.5, x.numel()).view(x.shape)).sum() for x in maps)
        results.append((*(x.detach() for x in maps), *torch.autograd.grad(total, leaf)))
    for a, b in zip(*results, strict=True):
        assert float((a - b).abs().max()) <= FLOAT32_MAPS * float(a.abs().max())


class OnGPU(torch.Tensor):
    """A tensor that NumPy cannot read before it has been fetched, like one on a GPU."""

    def numpy(self, **_):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


@pytest.mark.parametrize(
    "form", ["SciPy distance_transform_edt", "edt", "SciPy spearmanr", "scikit-learn roc_auc_score"]
)
def test_rivals_on_the_cpu_fetch_what_is_on_a_gpu(form):
    (case,) = (case for case in CASES if form in case.peers)
    args, kwargs = case.example(torch.Generator().manual_seed(0), TINY)
    rival = case.peers[form]()
    got = rival(*(x.as_subclass(OnGPU) for x in args), **kwargs)
    assert torch.equal(got.cpu(), rival(*args, **kwargs))


def test_rows(found):
    results.check(found)
    ours, textbook, missing = found["rows"]
    assert ours["form"] == OURS
    assert ours["backend"] == "eager"
    assert ours["kept"] <= 1.1 < textbook["kept"]
    assert ours["added"] == pytest.approx(ours["kept"] - 1)  # beside the logits
    assert 0 < ours["both"]["fastest"] <= ours["both"]["median"] <= ours["both"]["slowest"]
    assert ours["peak"] > 0
    assert missing["absent"].startswith("ModuleNotFoundError: No module named 'no_such_package'")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: r.update(schema=0), "schema: expected 1, got 0"),
        (lambda r: r["machine"].pop("commit"), "machine: commit is missing"),
        (lambda r: r["rows"][0].pop("dtype"), r"rows\[0\]: dtype is missing"),
        (lambda r: r["rows"][0].update(kept="much"), r"rows\[0\].kept: expected float, got 'much'"),
        (lambda r: r["rows"][0]["both"].pop("median"), r"rows\[0\].both: median is missing"),
        (lambda r: r["rows"][0].pop("both"), r"rows\[0\]: expected either `both` or `absent`"),
        (lambda r: r["rows"][0].update(speed=1.0), r"rows\[0\]: unknown field speed"),
    ],
)
def test_schema(found, damage, message):
    broken = copy.deepcopy(found)
    damage(broken)
    with pytest.raises(ValueError, match=message):
        results.check(broken)


def test_page_plot_and_comparison(found, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "headlines_of", lambda _: (TINY,))
    path = tmp_path / "this-machine.json"
    results.write(found, path)
    assert results.read(path) == found
    page = report.page([path])
    assert "| `evidential_loss` | 1x3x16x16x16 | textbook |" in page
    assert "No module named" in page
    assert "Against the textbook form, in 1 rows:" in page
    text = report.readme(f"Before\n{report.BEGIN}\nold\n{report.END}\nafter\n", [path])
    assert text.startswith(f"Before\n{report.BEGIN}\n{found['machine']['cpu']}, ")
    assert text.endswith(f"{report.END}\nafter\n")
    assert "old" not in text
    ours, textbook = (row["both"]["median"] for row in found["rows"][:2])
    assert f" ({textbook / ours:.1f} x) |" in text
    assert report.plot(path, tmp_path).stat().st_size > 1000
    slower = copy.deepcopy(found)
    slower["rows"][0]["both"]["median"] *= 3
    results.write(slower, tmp_path / "later.json")
    ratios = dict(report.compare(path, tmp_path / "later.json"))
    assert sorted(ratios.values()) == pytest.approx([1.0, 3.0])
    assert command.main(["compare", str(path), str(tmp_path / "later.json")]) == 1
    assert command.main(["compare", str(path), str(path)]) == 0


@pytest.mark.parametrize(
    ("status", "tests", "reason"), [(" M README.md\n", 0, "changes that no commit holds"), ("", 1, "tests are red")]
)
def test_nothing_is_recorded_of_a_red_or_dirty_tree(monkeypatch, capsys, status, tests, reason):
    def run(arguments, **_):
        return subprocess.CompletedProcess(arguments, 0 if arguments[0] == "git" else tests, status, "")

    monkeypatch.setattr(results.subprocess, "run", run)
    monkeypatch.setattr(command, "measure_all", lambda *_, **__: pytest.fail("measured all the same"))
    assert command.main(["run", "--record"]) == 1
    assert reason in capsys.readouterr().err


def test_the_commit_of_a_copy_is_named(monkeypatch):
    monkeypatch.delenv("BENCHMARKS_COMMIT", raising=False)
    head = results.commit()
    monkeypatch.setenv("BENCHMARKS_COMMIT", "0123abcd" * 5)
    assert results.commit() == "0123abc" != head
    monkeypatch.setenv("BENCHMARKS_COMMIT", "main")
    with pytest.raises(ValueError, match="BENCHMARKS_COMMIT: expected 7 to 40 hexadecimal digits, got 'main'"):
        results.commit()


def test_recorded_results_are_sound():
    for path in results.FOLDER.glob("*.json"):
        results.read(path)


def test_readme_quotes_the_recorded_results():
    text = report.README.read_text(encoding="utf-8")
    assert report.readme(text, sorted(results.FOLDER.glob("*.json"))) == text


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's caches belong to the GPU that is here")
def test_host():
    pytest.importorskip("triton")
    found = host.seconds()
    assert {op: times["launches"] for op, times in found.items()} == {
        "gradient_magnitude": 3,
        "dirichlet_uncertainty": 2,
        "evidential_loss": 4,
        "supervised_evidential_loss": 4,
    }
    assert all(0 < times["forward"] < times["both"] for times in found.values())


def test_instructions():
    """The sweeps stay as short as they are: time on a GPU follows."""
    triton = pytest.importorskip("triton")
    forward, backward = (instructions.count(sweep, 4, "marched") for sweep in ("forward", "backward"))
    assert forward.instructions > 100
    if triton.__version__.startswith("3.7"):
        assert forward.instructions <= 290
        assert backward.instructions <= 320
        assert forward.registers <= 96
        assert backward.registers <= 72
    measures = ("vacuity", "entropy", "mutual_information")
    forward, backward = (instructions.count_measures(sweep, 4, measures) for sweep in ("forward", "backward"))
    assert forward.instructions > 100
    if triton.__version__.startswith("3.7"):
        assert forward.instructions <= 235
        assert backward.instructions <= 335


def test_listings():
    sass = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   FADD R2, R2, R3 ;
        /*0020*/                   ISETP.GE.AND P0, PT, R0, R4, PT ;
        /*0030*/              @!P0 BRA 0x10 ;
        /*0040*/                   BRA 0x60 ;
        /*0050*/                   EXIT ;
        /*0060*/                   BRA 0x60;
    """
    assert instructions.loop_length(sass) == 3
    assert instructions.length(sass) == 6
    with pytest.raises(ValueError, match="found no branch backwards"):
        instructions.loop_length(sass.replace("0x10", "0x50").replace("BRA 0x60;", "EXIT;"))


def test_results_are_added_onto(found, monkeypatch):
    """Sizes that were measured are not measured again; the others are."""
    monkeypatch.setattr("benchmarks.run.CASES", (replace(CASES[0], peers={}),))
    first = measure_all(torch.device("cpu"), quick=True, largest=32)
    assert len(first["rows"]) == 1
    both = measure_all(torch.device("cpu"), quick=True, onto=copy.deepcopy(first))
    assert both["rows"][0] == first["rows"][0]
    assert [results.voxels(row) for row in both["rows"]] == [32**3, 64**3]
    assert results.why_not_onto(first, torch.device("cpu")) is None
    first["machine"]["commit"] = "0000000"
    assert "commit: expected 0000000 as in the file, got" in results.why_not_onto(first, torch.device("cpu"))
