"""SURE as a trainer of nnU-Net v2: `nnUNetv2_train ... -tr nnUNetTrainerSURE`.

nnU-Net finds it where the environment variable nnUNet_extTrainer names this folder (docs/integrations.md).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from sure.integrations.deep_supervision import SUPERVISION, DeepSupervision


class nnUNetTrainerSURE(nnUNetTrainer):
    """nnU-Net's own training with SURELoss: deep supervision, its ignore label, and Dice over the whole batch.

    The schedules follow the published shares of all epochs: KL rises over the first fifth, uncertainty is supervised
    from 30 % on, in the form of `sure train`. What nnU-Net predicts stays valid: the most probable class has the
    largest logit.
    """

    def _build_loss(self) -> DeepSupervision:
        """Raises ValueError for regions: a Dirichlet distribution is over classes that exclude each other."""
        if self.label_manager.has_regions:
            raise ValueError("labels: expected classes that exclude each other for SURELoss, got regions")
        weights = [1.0]
        if self.enable_deep_supervision:
            weights = [2.0**-i for i in range(len(self._get_deep_supervision_scales()))]
            # As nnU-Net has it: the coarsest output does not count, but DDP wants each to be used.
            weights[-1] = 1e-6 if self.is_ddp else 0.0
        ignored = self.label_manager.ignore_label
        return DeepSupervision(
            [w / sum(weights) for w in weights],
            num_epochs=self.num_epochs,
            good_model_step=0.3 * self.num_epochs,
            annealing_steps=0.2 * self.num_epochs,
            **SUPERVISION,
            include_background=False,
            ignore_index=-100 if ignored is None else ignored,
            process_group=dist.group.WORLD if self.is_ddp else None,
        )

    def on_train_epoch_start(self) -> None:
        self.loss.set_epoch(self.current_epoch)
        super().on_train_epoch_start()

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        with self.loss.seeing(batch["data"]):
            return super().train_step(batch)

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        with self.loss.seeing(batch["data"]):
            return super().validation_step(batch)


class nnUNetTrainerSURE_trial(nnUNetTrainerSURE):
    """Two epochs of three iterations: whether everything runs, in minutes on a CPU."""

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008  # nnU-Net reads the signature
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 2, 3, 1
