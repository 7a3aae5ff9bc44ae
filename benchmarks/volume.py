"""Peak memory of `sure predict` on a volume of noise: `python -m benchmarks.volume --size 512`.

The network, of one layer, is small on purpose: what is measured is all that grows with the volume.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path
from unittest import mock

import nibabel as nib
import numpy as np
import torch

import sure.predict
from sure.checkpoint import Run
from sure.config import TrainConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=512, help="voxels along each axis")
    parser.add_argument("--classes", type=int, default=14)
    parser.add_argument("--patch", type=int, default=48, help="width of a window")
    options = parser.parse_args()
    torch.manual_seed(0)
    network = torch.nn.Conv3d(1, options.classes, 1)
    config = TrainConfig(loss="edl", patch_size=(options.patch,))
    names = tuple(map(str, range(options.classes)))
    run = Run(Path("run"), config, network, options.classes, 1, names, (), 0, "final")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image.nii.gz"
        rng = np.random.default_rng(0)
        image = np.empty((options.size,) * 3, np.int16)
        for plane in image:
            plane[:] = rng.normal(0, 100, plane.shape)
        nib.save(nib.Nifti1Image(image, np.eye(4)), path)
        del image
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began = time.perf_counter()
        with mock.patch.object(sure.predict, "load_run", return_value=run):
            sure.predict.predict(Path("run"), [path], Path(folder) / "out", progress=False)
        seconds = time.perf_counter() - began
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{options.size}^3 voxels, {options.classes} classes, windows of {options.patch}^3: {seconds:.0f} s")
    print(f"peak memory of the process {after / 2**20:.2f} GiB; before predicting {before / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
