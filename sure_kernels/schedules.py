"""How the weights of the SURE loss change with the epoch (Li et al., MICCAI 2025, as their program computes it)."""

from __future__ import annotations

import math

FLOOR = 0.01


def kl_weight(epoch: float, annealing_steps: float) -> float:
    """lambda(t) = min(1, t / annealing_steps); 1 where annealing_steps is 0."""
    return 1.0 if annealing_steps == 0 else min(1.0, epoch / annealing_steps)


def supervision_weight(epoch: float, good_model_step: float, num_epochs: float) -> float:
    """0 before epoch t0 = good_model_step, then 0.01 exp(-ln(0.01) (t - t0) / (T - t0)): from 0.01 up to 1 at T, and 1
    after it.

    Raises ValueError unless num_epochs > good_model_step.
    """
    if not num_epochs > good_model_step:
        raise ValueError(f"num_epochs: expected more than good_model_step ({good_model_step:g}), got {num_epochs:g}")
    if epoch < good_model_step:
        return 0.0
    done = min(1.0, (epoch - good_model_step) / (num_epochs - good_model_step))
    return FLOOR * math.exp(-math.log(FLOOR) * done)


def ramp(epoch: float, start: float, end: float) -> float:
    """0 up to epoch `start`, 1 from `end` on, straight between; a step where they are not apart."""
    if epoch >= end:
        return 1.0
    return max(0.0, (epoch - start) / (end - start))
