"""Sets of points: how the metrics read maps (N, 1, *spatial), rows (N, n) and a single set (n,)."""

from __future__ import annotations

import torch
from torch import Tensor

from sure_kernels.validation import (
    FLOAT_DTYPES,
    INT_DTYPES,
    as_boolean,
    check_same_device,
    plain_tensor,
    shape_of,
    torch_integer,
)


def as_points(value: object, name: str) -> Tensor:
    """A float tensor of shape (n,), (N, n) or (N, 1, *spatial), checked but unchanged."""
    tensor = plain_tensor(value, name)
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {tensor.dtype}")
    if tensor.ndim > 1 and not len(tensor):
        raise ValueError(f"{name}: expected at least one set of points, got {shape_of(tensor)}")
    if tensor.ndim in (1, 2):
        return tensor
    if tensor.ndim not in (4, 5) or tensor.shape[1] != 1:
        raise ValueError(f"{name}: expected shape (n,), (N, n) or (N, 1, *spatial), got {shape_of(tensor)}")
    return tensor


def rows(tensor: Tensor) -> Tensor:
    """(N, n), one set of points per row."""
    return tensor[None] if tensor.ndim == 1 else tensor.flatten(1)


def as_result(per_row: Tensor, points: Tensor) -> Tensor:
    """(N,) as it is; 0-d where `points` was a single set."""
    return per_row[0] if points.ndim == 1 else per_row


def match(value: object, name: str, points: Tensor, points_name: str) -> Tensor:
    """`value` reshaped to the rows of `points`; maps may leave their channel axis out."""
    tensor = plain_tensor(value, name)
    check_same_device(tensor, name, points, points_name)
    if points.ndim > 2 and tensor.ndim == points.ndim - 1:
        tensor = tensor.unsqueeze(1)
    if tensor.shape != points.shape:
        raise ValueError(f"{name}: expected shape {shape_of(points)} like {points_name}, got {shape_of(tensor)}")
    return rows(tensor)


def match_boolean(value: object, name: str, points: Tensor, points_name: str) -> Tensor:
    """`match`, as booleans; numbers must be 0 or 1."""
    return as_boolean(match(value, name, points, points_name), name)


def match_kinds(value: object, name: str, points: Tensor, points_name: str) -> Tensor:
    """`match_boolean` as (N, C, n), where maps may come as (N, C, *spatial): C > 1 booleans for every point."""
    tensor = plain_tensor(value, name)
    if points.ndim > 2 and tensor.ndim == points.ndim and tensor.shape[1] > 1:
        check_same_device(tensor, name, points, points_name)
        n, _, *spatial = points.shape
        kinds = tensor.shape[1]
        if shape_of(tensor) != (n, kinds, *spatial):
            raise ValueError(
                f"{name}: expected shape {(n, kinds, *spatial)} like {points_name}, got {shape_of(tensor)}"
            )
        return as_boolean(tensor, name).flatten(2)
    return match_boolean(tensor, name, points, points_name)[:, None]


def match_groups(groups: object, points: Tensor, points_name: str) -> Tensor:
    """`match`, of integers (or booleans) that name the group of each point."""
    tensor = match(groups, "groups", points, points_name)
    if tensor.dtype not in (*INT_DTYPES, torch.bool):
        raise TypeError(f"groups: expected an integer dtype, got {tensor.dtype}")
    return torch_integer(tensor, "groups")
