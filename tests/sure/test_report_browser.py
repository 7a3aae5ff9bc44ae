"""The report in a browser: its viewer draws what the sliders say, and it fits a phone."""

from __future__ import annotations

import json
import re

import browser
import numpy as np
import pytest
from tiny_run import CLASSES

from sure.report import figures, write_report
from sure.report.slices import stack

pytestmark = pytest.mark.skipif(
    browser.find() is None, reason="no Chromium or Chrome on PATH, and CHROME_BIN names none"
)

SHAPE = (24, 20, 6)
COUNT = """(() => {  // share of the pixels of the first run's panel that are not black
  const panel = document.querySelectorAll(".viewer canvas")[1], copy = document.createElement("canvas");
  [copy.width, copy.height] = [panel.width, panel.height];
  const context = copy.getContext("2d", { willReadFrequently: true });
  context.drawImage(panel, 0, 0);
  const data = context.getImageData(0, 0, copy.width, copy.height).data;
  let count = 0;
  for (let i = 0; i < data.length; i += 4) count += data[i] + data[i + 1] + data[i + 2] > 0;
  return count / data.length * 4;
})()"""


def move(name: str, value: float) -> str:
    """Move a slider as a user does."""
    return f"""(() => {{
      const slider = document.querySelector(".viewer .{name}");
      slider.value = {value};
      slider.dispatchEvent(new Event("input", {{ bubbles: true }}));
    }})()"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Two runs, one case of a black image without labels: all that is drawn is uncertainty, growing from left to right
    in the first slice, and 0 in the others."""
    root = tmp_path_factory.mktemp("browser")
    uncertainty = np.zeros(SHAPE, np.float32)
    uncertainty[:, :, 0] = np.linspace(0, 1, SHAPE[0])[:, None]
    nothing = np.zeros(SHAPE, np.uint8)
    volumes = (nothing.astype(np.float32), nothing, nothing, uncertainty, np.eye(4))
    entry = {"mean": 0.5, "std": 0.1, "n": 2, "ci": [0.4, 0.6]}
    names = ["dice", "hd95", "ece", "ueo", "aurc", "ucc_g", "a_metric_of_some_other_version_with_a_long_name"]
    for loss in ("edl", "sure"):
        folder = root / loss
        (folder / "pictures").mkdir(parents=True)
        figures.save_planes(folder / "pictures/case_a.npz", figures.planes(*volumes), stack(*volumes))
        np.savez(folder / "pictures/gradient.npz", gradient=np.ones(3), uncertainty=np.ones(3))
        values = {
            "kind": "sure evaluation",
            "run": f"/a/long/path/to/where/all/the/runs/are/kept/{loss}/fold-0",
            "checkpoint": "final",
            "epoch": 3,
            "loss": loss,
            "model": "unet",
            "spatial_dims": 3,
            "class_names": list(CLASSES),
            "dataset": "/data",
            "layout": "decathlon",
            "cases_from": "held-out",
            "date": "2026",
            "device": "cpu",
            "versions": {},
            "cases": [{"name": name, **dict.fromkeys(names, 0.5)} for name in ("a", "b")],
            "summary": dict.fromkeys(names, entry),
            "reliability": {"confidence": [0.5], "accuracy": [0.5], "voxels": [1.0]},
            "pictures": {"planes": {"a": "pictures/case_a.npz"}, "boundary": "pictures/gradient.npz"},
        }
        (folder / "metrics.json").write_text(json.dumps(values))
    return write_report([root / "edl", root / "sure"], root / "report.html")


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    binary = browser.find()
    assert binary is not None
    with browser.browser(binary, tmp_path_factory.mktemp("profile")) as tab:
        yield tab


@pytest.fixture(scope="module")
def opened(tab, page):
    tab.size(1280, 900)
    tab.open(page)
    tab.run("document.querySelector('.case').scrollIntoView()")
    tab.wait("document.querySelector('.viewer').dataset.ready === 'yes'")
    return tab


def test_the_threshold_changes_what_is_drawn(opened):
    opened.run(move("slice", 0))
    shares = []
    for threshold in (0.2, 0.5, 0.8):
        opened.run(move("threshold", threshold))
        shares.append(opened.run(COUNT))
    expected = [(np.rint(255 * np.linspace(0, 1, SHAPE[0])) / 255 > t).mean() for t in (0.2, 0.5, 0.8)]
    assert shares == pytest.approx(expected)
    note = opened.run("document.querySelectorAll('.viewer .counts')[0].textContent")
    assert f"{100 * expected[-1]:.0f} % of the slice" in note


def test_the_slice_changes_what_is_drawn(opened):
    opened.run(move("threshold", 0.5))
    opened.run(move("slice", 3))
    assert opened.run(COUNT) == 0
    assert opened.run("document.querySelector('.slice-value').textContent") == f"4 of {SHAPE[2]}"


def test_sliders_answer_to_keys(opened):
    opened.run(move("slice", 3))
    opened.run("document.querySelector('.viewer .slice').focus()")
    for kind in ("keyDown", "keyUp"):
        opened.send("Input.dispatchKeyEvent", type=kind, key="ArrowRight", code="ArrowRight", windowsVirtualKeyCode=39)
    opened.wait("document.querySelector('.slice-value').textContent.startsWith('5 ')")


def test_screen_shows_the_viewer_and_paper_the_still_picture(opened):
    shown = "['.viewer', '.still'].map((name) => document.querySelector(name).getBoundingClientRect().height > 0)"
    assert opened.run(shown) == [True, False]
    opened.send("Emulation.setEmulatedMedia", media="print")
    assert opened.run(shown) == [False, True]
    opened.size(718, 1000)  # of A4 between margins
    opened.run("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    assert opened.run("document.documentElement.scrollWidth") <= 718  # paper does not scroll
    opened.size(1280, 900)
    opened.send("Emulation.setEmulatedMedia", media="screen")


@pytest.mark.parametrize("width", [375, 1280])
def test_nothing_sticks_out(opened, width):
    opened.size(width, 800)
    opened.run("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    assert opened.run("document.documentElement.scrollWidth") <= width
    # what is wider than the page scrolls within itself
    assert opened.run("[...document.querySelectorAll('.scroll')].every((e) => e.clientWidth <= innerWidth)")


def test_nothing_is_complained_about_or_fetched(opened):
    assert opened.complaints == []
    loaded = opened.run("performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert [name for name in loaded if not name.startswith("data:")] == []


def test_without_script_the_still_picture_is_there(tab, page, tmp_path):
    html = re.sub(r"<script>.*?</script>", "", page.read_text(), flags=re.DOTALL)
    (tmp_path / "still.html").write_text(html)
    tab.size(1280, 900)
    tab.open(tmp_path / "still.html")
    assert tab.run("document.querySelector('.still').getBoundingClientRect().height") > 100
    assert tab.run("document.querySelector('.viewer').getBoundingClientRect().height") == 0
