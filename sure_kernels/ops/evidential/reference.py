"""The evidential loss straight from its formulas.

ACE and KL: Sensoy, Kaplan, Kandemir, NeurIPS 2018; Li, Sui, Wu, Zhuang, MICCAI 2025 (with the adaptive Tversky
form of Dice).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sure_kernels.kernel_lib.distributed import global_sum
from sure_kernels.kernel_lib.labels import counted_voxels
from sure_kernels.ops.dirichlet.reference import activation, class_vector

SMOOTH_TARGET = 1e-3
TVERSKY_EPS = 1e-5
SOFT_DICE_EPS = 1e-5


def expected_cross_entropy(a: Tensor, y: Tensor, kind: str = "digamma", error_factor: float = 1.0) -> Tensor:
    """ACE per voxel, (N, *spatial), of concentrations `a` and one-hot `y`, both (N, K, *spatial).

    digamma: psi(S) - psi(a_y) | log: ln S - ln a_y | mse: sum (y - p)^2 + sum p (1 - p) / (S + 1). The published
    program counts the squared error K times: `error_factor=K`.
    """
    s = a.sum(1, keepdim=True)
    if kind == "digamma":
        return (y * (torch.digamma(s) - torch.digamma(a))).sum(1)
    if kind == "log":
        return (y * (s.log() - a.log())).sum(1)
    p = a / s
    return error_factor * (y - p).square().sum(1) + (p * (1 - p)).sum(1) / (s.squeeze(1) + 1)


def dirichlet_kl(a: Tensor, b: Tensor) -> Tensor:
    """KL(Dir(a) || Dir(b)) over axis 1, with that axis gone; `b` broadcasts against `a`."""
    b = b.expand_as(a)
    s = a.sum(1, keepdim=True)
    normalisers = torch.lgamma(s.squeeze(1)) - torch.lgamma(a).sum(1)
    normalisers = normalisers - torch.lgamma(b.sum(1)) + torch.lgamma(b).sum(1)
    return normalisers + ((a - b) * (torch.digamma(a) - torch.digamma(s))).sum(1)


def adaptive_tversky(true_positive: Tensor, probability: Tensor, target: Tensor) -> Tensor:
    """D_k from the sums over all voxels: TP = sum p m, P = sum p, M = sum m, with m = y + 1e-3."""
    false_positive, false_negative = probability - true_positive, target - true_positive
    balance = (false_positive / (false_positive + false_negative + TVERSKY_EPS)).clamp(0.2, 0.8)
    denominator = true_positive + balance * false_positive + (1 - balance) * false_negative
    return true_positive / (denominator + TVERSKY_EPS)


def soft_dice(true_positive: Tensor, probability: Tensor, target: Tensor) -> Tensor:
    """2 TP / (P + Y), both parts with 1e-5 added: MONAI's DiceLoss over the batch."""
    return (2 * true_positive + SOFT_DICE_EPS) / (probability + target + SOFT_DICE_EPS)


def evidential_terms(
    logits: Tensor,
    target: Tensor,
    *,
    kind: str,
    evidence: str,
    prior: tuple[float, ...],
    dice: str,
    class_weight: tuple[float, ...] | None,
    include_background: bool,
    ignore_index: int,
    mask: Tensor | None,
    process_group: object | None,
    official: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(ACE, KL, Dice loss), unweighted scalars; `target` is (N, *spatial), `mask` boolean or None."""
    k = logits.shape[1]
    z = logits if logits.dtype == torch.float64 else logits.float()
    valid = counted_voxels(target, ignore_index, mask)
    # Replaced, not multiplied by 0: NaN logits in voxels that do not count must not reach the sums.
    z = torch.where(valid.unsqueeze(1), z, 0.0)
    labels = torch.where(valid, target.long(), 0)
    y = F.one_hot(labels, k).movedim(-1, 1).to(z.dtype)

    b = class_vector(prior, z)
    e = activation(z, evidence)
    a = e + b
    w = torch.ones(k, dtype=z.dtype, device=z.device) if class_weight is None else z.new_tensor(class_weight)
    voxel_weight = w[labels] * valid
    weight_sum = global_sum(voxel_weight.sum(), process_group)

    def mean(x: Tensor) -> Tensor:
        return _ratio(global_sum((voxel_weight * x).sum(), process_group), weight_sum)

    ace = mean(expected_cross_entropy(a, y, kind, k if official and kind == "mse" else 1.0))
    # The published program puts 1 where the formula has the prior of the true class.
    a_wrong = (a - 1) * (1 - y) + 1 if official else b + (1 - y) * e
    kl = mean(dirichlet_kl(a_wrong, b))

    p = a / a.sum(1, keepdim=True)
    axes = (0, *range(2, z.ndim))
    counted = valid.unsqueeze(1)
    true_positive = global_sum((p * y * counted).sum(axes), process_group)
    probability = global_sum((p * counted).sum(axes), process_group)
    present = global_sum((y * counted).sum(axes), process_group)
    number = global_sum(valid.sum().to(z.dtype), process_group)
    if dice == "adaptive_tversky":
        smoothed = true_positive + SMOOTH_TARGET * probability
        d = adaptive_tversky(smoothed, probability, present + SMOOTH_TARGET * number)
    else:
        d = soft_dice(true_positive, probability, present)
    first = 0 if include_background else 1
    dice_loss = _ratio((w[first:] * (1 - d[first:])).sum(), w[first:].sum())
    return ace, kl, torch.where(number > 0, dice_loss, 0.0 * dice_loss)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, exactly 0 where there is nothing to average."""
    empty = denominator == 0
    return torch.where(empty, 0.0 * numerator, numerator / torch.where(empty, 1.0, denominator))
