"""SURELoss over the outputs of a network at several resolutions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

import sure_kernels as sk
from sure.config import TrainConfig
from sure_kernels.validation import number_tuple, shape_of, shown, values_checked

_TRAIN = TrainConfig()
SUPERVISION = {
    "supervision": _TRAIN.ranking,
    "margin": _TRAIN.correlation_margin,
    "gradient_weight": _TRAIN.gradient_weight,
    "far_weight": _TRAIN.far_weight,
}
"""What `sure train` makes of SURELoss; docs/supervision.md compares it with the other forms."""


class DeepSupervision(nn.Module):
    """The weighted sum of SURELoss at full resolution and its evidential part at the others.

    Uncertainty is supervised at full resolution alone, where the image's gradients are.

    Args:
        weights: of the outputs, the finest first; outputs of weight 0 are not looked at.
        options: of SURELoss, whose defaults apply; `**SUPERVISION` is the form that `sure train` takes. Not
            `return_terms`, since terms of several outputs are not one set.

    Raises:
        TypeError, ValueError: naming the argument, as SURELoss; TypeError for an image that is not seen.
    """

    def __init__(self, weights: Sequence[float], **options: Any) -> None:
        super().__init__()
        if options.get("return_terms"):
            raise ValueError("return_terms: expected False, since each output has terms of its own, got True")
        if isinstance(weights, Real) or getattr(weights, "ndim", 1) == 0:
            raise TypeError(f"weights: expected numbers, one per output, got {shown(weights)} alone")
        self.weights = number_tuple(weights, "weights", None, "output")
        if not all(0 <= w < math.inf for w in self.weights) or not any(self.weights):
            raise ValueError(f"weights: expected finite numbers >= 0, not all 0, got {list(self.weights)}")
        self.finest = sk.SURELoss(**options)
        self.coarser = sk.SURELoss(**{**options, "gradient_weight": 0.0, "far_weight": 0.0})
        self._image: Tensor | None = None

    def set_epoch(self, epoch: float) -> None:
        """Epoch that the schedules are computed for."""
        self.finest.set_epoch(epoch)
        self.coarser.set_epoch(epoch)

    @contextmanager
    def seeing(self, image: Tensor) -> Iterator[None]:
        """Calls inside belong to `image`, (N, M, *spatial): for frameworks that call loss(output, target)."""
        self._image = image
        try:
            yield
        finally:
            self._image = None

    def forward(self, output: Tensor | Sequence[Tensor], target: Tensor | Sequence[Tensor]) -> Tensor:
        """0-d. `output` logits (N, K, *spatial) and `target` labels (N, 1, *spatial), or one of each a resolution."""
        outputs, targets = ([x] if isinstance(x, Tensor) else list(x) for x in (output, target))
        if not len(outputs) == len(targets) <= len(self.weights):
            found = f"{len(outputs)} and {len(targets)}"
            raise ValueError(f"output, target: expected as many of each, up to {len(self.weights)}, got {found}")
        if self._image is None and self.weights[0] and (self.finest.gradient_weight or self.finest.far_weight):
            raise TypeError("image: expected calls within `with loss.seeing(image):`, whose image supervises, got none")
        total = outputs[0].new_zeros((), dtype=torch.float32)
        for i, (logits, labels, weight) in enumerate(zip(outputs, targets, self.weights, strict=False)):
            if weight:
                if labels.is_floating_point():  # as some frameworks hold them
                    labels = _whole(labels)
                if i == 0:
                    image = None if self._image is None else self._image.to(logits.device, non_blocking=True)
                    total = total + weight * self.finest(logits, labels, image=image)
                else:
                    total = total + weight * self.coarser(logits, labels)
        return total


def _whole(labels: Tensor) -> Tensor:
    whole = labels.long()
    if values_checked(labels):
        broken = whole != labels
        if bool(broken.any()):
            found = f"{float(labels[broken][0]):g} and the like in {int(broken.sum())} voxels of {shape_of(labels)}"
            raise ValueError(f"target: expected whole numbers, got {found}")
    return whole
