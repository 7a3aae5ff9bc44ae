"""Shared by all tests: the hypothesis profile, where golden files and real data lie."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"
SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

# A machine with a GPU may lack hypothesis; property tests are skipped there.
try:
    import hypothesis
except ModuleNotFoundError:
    pass
else:
    # Derandomised: a red run is red again. Deadlines would measure the machine.
    hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, max_examples=50, print_blob=True)
    hypothesis.settings.load_profile("ci")


@pytest.fixture(autouse=True)
def seeded():
    """Numbers drawn without a generator are the same whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture
def golden():
    """Load a golden file by its number and name: arrays as tensors, scalars as numbers."""

    def load(name: str) -> dict[str, object]:
        with np.load(GOLDEN / f"{name}.npz") as file:
            arrays = {key: file[key] for key in file.files}
        return {
            key: a.item() if a.ndim == 0 else (torch.from_numpy(a) if a.dtype.kind != "U" else a)
            for key, a in arrays.items()
        }

    return load


@pytest.fixture
def hippocampus() -> Path:
    """Real MRI in the Decathlon layout, where it is present."""
    path = SHARED_DATA / "hippocampus"
    if not path.is_dir():
        pytest.skip(f"real data not present at {path}")
    return path
