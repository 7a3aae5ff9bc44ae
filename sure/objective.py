"""The training objective: logits, labels and image in; a loss and its terms out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from monai.losses import DiceLoss
from torch import Tensor, nn

import sure_kernels as sk
from sure.config import TrainConfig
from sure.data import IGNORE


class DiceCE(nn.Module):
    """Cross-entropy and MONAI's batch Dice over counted voxels: the loss to compare with."""

    def __init__(self) -> None:
        super().__init__()
        self.dice = DiceLoss(batch=True)

    def set_epoch(self, epoch: float) -> None:
        """The same in every epoch."""

    def forward(self, logits: Tensor, label: Tensor, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        target = label.long()
        counted = (target != IGNORE).to(logits.dtype)
        present = torch.where(target == IGNORE, 0, target)
        one_hot = F.one_hot(present.squeeze(1), logits.shape[1]).movedim(-1, 1) * counted
        dice = self.dice(logits.softmax(1) * counted, one_hot)
        # A batch of padding alone has no mean.
        losses = F.cross_entropy(logits, target.squeeze(1), ignore_index=IGNORE, reduction="sum")
        cross_entropy = losses / counted.sum().clamp_min(1)
        return dice + cross_entropy, {"cross_entropy": cross_entropy.detach(), "dice": dice.detach()}


class Evidential(nn.Module):
    """SURELoss as configured; for `edl` without supervision."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        supervised = config.loss == "sure"
        self.loss = sk.SURELoss(
            num_epochs=config.epochs if supervised else config.supervised_from + 1,
            good_model_step=config.supervised_from,
            annealing_steps=config.kl_epochs,
            gradient_weight=config.gradient_weight if supervised else 0.0,
            far_weight=config.far_weight if supervised else 0.0,
            supervision=config.ranking,
            ace_weight=config.ace_weight,
            kl_weight=config.kl_weight,
            dice_weight=config.dice_weight,
            kind=config.kind,
            evidence=config.evidence,
            prior=config.prior[0] if len(config.prior) == 1 else config.prior,
            dice=config.dice,
            ignore_index=IGNORE,
            boundary=config.boundary,
            near=config.near,
            far=config.far,
            relation=config.relation,
            return_terms=True,
        )

    def set_epoch(self, epoch: float) -> None:
        self.loss.set_epoch(epoch)

    def forward(self, logits: Tensor, label: Tensor, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss, terms = self.loss(logits, label, image=image)
        return loss, terms._asdict()


def build_objective(config: TrainConfig) -> DiceCE | Evidential:
    """The objective of `config`, called as objective(logits, label, image) -> (loss, terms).

    Logits (N, K, *patch), label (N, 1, *patch) with IGNORE where a voxel does not count, image (N, M, *patch).
    """
    return DiceCE() if config.loss == "dice_ce" else Evidential(config)
