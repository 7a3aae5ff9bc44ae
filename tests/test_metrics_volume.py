"""All calibration and error-detection metrics of a 256^3 volume with 4 classes: time and memory. Long."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

PROGRAM = """
import json, resource, time
import torch
from sure_kernels import metrics

size = 256
generator = torch.Generator().manual_seed(0)
probability = torch.empty(1, 4, size, size, size)
target = torch.empty(1, size, size, size, dtype=torch.uint8)
uncertainty = torch.empty(1, 1, size, size, size)
for z in range(size):  # plane by plane, so that making the inputs takes no memory that would hide the metrics' own
    plane = (3 * torch.randn(1, 4, size, size, generator=generator)).softmax(1)
    drawn = torch.rand(1, 1, size, size, generator=generator) > plane.cumsum(1)
    probability[:, :, z], target[:, z] = plane, drawn.sum(1).clamp(max=3)
    uncertainty[:, :, z] = 1 - plane.amax(1, keepdim=True)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

metrics.calibration_error_detection(probability[..., :8, :8], target[..., :8, :8], uncertainty[..., :8, :8])
before, began, worked = peak(), time.perf_counter(), time.process_time()
scores = metrics.calibration_error_detection(probability, target, uncertainty)
print(json.dumps({
    "seconds": time.perf_counter() - began,
    "processor_seconds": time.process_time() - worked,
    "mebibytes": peak() - before,
    "auroc": scores.error_detection_auroc.value.item(),
    "ece": scores.expected_calibration_error.item(),
}))
"""


@pytest.mark.slow
def test_a_large_volume_takes_seconds_and_little_memory():
    """6 s and 1 GB are promised on two idle cores; the margin in time is for machines that others use as well."""
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    found = json.loads(run.stdout)
    print(found)
    assert found["mebibytes"] < 128  # the volumes are 336
    assert found["processor_seconds"] < 12
    assert found["auroc"] > 0.6
    assert found["ece"] < 0.001  # labels were drawn from the probabilities
