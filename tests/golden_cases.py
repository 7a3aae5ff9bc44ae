"""What golden files hold, as cases for every implementation that has to reproduce them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def image_gradients(data: dict[str, Any]) -> list[tuple[Tensor, Tensor, float, dict[str, Any]]]:
    """File 08: (image, published map, factor by which it exceeds ours, options of `gradient_magnitude`)."""
    central = {"operator": "central", "padding_mode": "extrapolate"}
    grey = (data["rgb"] * torch.tensor([0.2989, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    two = torch.cat((data["img3d"], data["img3d_2ch"][:, None]), 1)
    per_channel = data["sure_3d_2ch"].view(1, 10, 12, 14, 2).movedim(-1, 1)
    return [
        (data["img2d"], data["sure_2d"][:, None], 1.0, central),
        (data["img2d"], data["prius_sobel_2d"][:, None], 8.0, {}),
        (data["img2d"], data["prius_2d"][:, None], 32.0, {}),
        (data["rgb"].mean(1, keepdim=True), data["prius_rgb"][:, None], 32.0, {}),
        (grey, data["sure_rgb"][:, None], 1.0, central),
        (data["img3d"], data["sure_3d"][:, None], 1.0, central),
        (data["img3d"], data["prius_3d"][:, None], 1.0, central),
        (two, data["prius_3d_2ch"][:, None], 1.0, {"channel_reduction": "max", **central}),
        *((two[:, c : c + 1], per_channel[:, c : c + 1], 1.0, central) for c in range(2)),
    ]
