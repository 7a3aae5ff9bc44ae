"""The training objective: logits, labels and image in; a loss and its terms out.

Where the response to noise is supervised, the objective asks the network about noised copies of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sure_kernels as sk
from sure.config import TrainConfig
from sure.data import IGNORE
from sure.models import tracking
from sure_kernels import schedules
from sure_kernels.kernel_lib.distributed import global_sum

Network = Callable[[Tensor], Tensor]

SOFT = {
    "off": None,
    "acdc": sk.SoftThresholds(),
    "isic": sk.SoftThresholds(d_g=5.0, d_f=24.0, d_n=8.0, d_eps=0.0),
}
DICE_SMOOTH = 1e-5  # MONAI's
# Share of the epochs after which whole images get their full noise (PriUS).
FULL_NOISE = 0.9


class DiceCE(nn.Module):
    """Cross-entropy and the Dice of MONAI's `DiceLoss(batch=True)` over counted voxels: the loss to compare with.

    MONAI's own sums end at the process; these run over the ranks of `process_group`.
    """

    def __init__(self, process_group: Any | None = None) -> None:
        super().__init__()
        self.process_group = process_group

    def set_epoch(self, epoch: float) -> None:
        """The same in every epoch."""

    def forward(
        self,
        logits: Tensor,
        label: Tensor,
        image: Tensor,
        noised: Network | None = None,
        images_ratio: float = 1.0,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # half precision holds no sum of a volume
        target = label.long()
        counted = (target != IGNORE).to(logits.dtype)
        present = torch.where(target == IGNORE, 0, target)
        one_hot = F.one_hot(present.squeeze(1), logits.shape[1]).movedim(-1, 1) * counted
        axes = (0, *range(2, logits.ndim))
        probability = logits.softmax(1) * counted
        # A batch of padding alone has no mean.
        losses = F.cross_entropy(logits, target.squeeze(1), ignore_index=IGNORE, reduction="sum")
        sums = torch.cat(
            (
                (probability * one_hot).sum(axes),
                (probability + one_hot).sum(axes),
                torch.stack((losses, counted.sum())),
            )
        )
        sums = global_sum(sums, self.process_group)
        k = logits.shape[1]
        dice = (1 - (2 * sums[:k] + DICE_SMOOTH) / (sums[k : 2 * k] + DICE_SMOOTH)).mean()
        cross_entropy = sums[-2] / sums[-1].clamp_min(1)
        return dice + cross_entropy, {"cross_entropy": cross_entropy.detach(), "dice": dice.detach()}


class Evidential(nn.Module):
    """SURELoss as configured; for `edl` without supervision."""

    def __init__(self, config: TrainConfig, process_group: Any | None = None) -> None:
        super().__init__()
        self.config = config
        supervised = config.loss == "sure"
        noised = supervised and config.noise != "off"
        self.loss = sk.SURELoss(
            num_epochs=config.epochs if supervised else config.supervised_from + 1,
            good_model_step=config.supervised_from,
            annealing_steps=config.kl_epochs,
            gradient_weight=config.gradient_weight if supervised else 0.0,
            far_weight=config.far_weight if supervised else 0.0,
            noise_weight=config.noise_weight if noised else 0.0,
            noise_weights=config.noise_weights,  # type: ignore[arg-type]  # three, as checked
            supervision=config.ranking,
            within_class=config.within_class,
            margin=config.correlation_margin,
            soft=SOFT[config.soft],
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
            process_group=process_group,
            return_terms=True,
        )

    def set_epoch(self, epoch: float) -> None:
        self.loss.set_epoch(epoch)

    def forward(
        self,
        logits: Tensor,
        label: Tensor,
        image: Tensor,
        noised: Network | None = None,
        images_ratio: float = 1.0,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        maps: dict[str, Any] = {"image": image}
        if noised is not None and self.loss.wants_noise:
            reach = max(self.config.near, self.config.far) if self.config.soft == "off" else None
            dims = image.ndim - 2
            distance = sk.boundary_distance(label, max_distance=reach, spatial_dims=dims, ignore_index=IGNORE)
            images, levels, points = self._noised_images(logits, label, image, distance, noised)
            noisy = [noised(x) for x in images]
            maps |= {"distance": distance, "points": points, "noisy": noisy, "levels": levels}
        with self._means_over_fewer_images(images_ratio):
            loss, terms = self.loss(logits, label, **maps)
        if images_ratio != 1 and self.config.soft == "off":
            terms = terms._replace(gradient=terms.gradient * images_ratio, d=terms.d * images_ratio)
        return loss, terms._asdict()

    @contextmanager
    def _means_over_fewer_images(self, ratio: float) -> Iterator[None]:
        """The rankings are means over images (the soft ones over pairs): leave out those that only fill up a batch."""
        weights = self.loss.gradient_weight, self.loss.noise_weights
        if self.config.soft == "off":
            mu, d, far = weights[1]
            self.loss.gradient_weight, self.loss.noise_weights = weights[0] * ratio, (mu, d * ratio, far)
        try:
            yield
        finally:
            self.loss.gradient_weight, self.loss.noise_weights = weights

    def _noised_images(
        self, logits: Tensor, label: Tensor, image: Tensor, distance: Tensor, noised: Network
    ) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
        """Two noised copies of the images, their levels, and the voxels that were noised (None: all)."""
        c = self.config
        if c.noise == "images":
            bound = c.noise_std * schedules.ramp(self.loss.epoch, c.supervised_from, FULL_NOISE * c.epochs)
            low, high = sorted((bound * torch.rand(2)).tolist())
            copies = [sk.add_gaussian_noise(image, mean=0.0, std=std) for std in (low, high)]
            return copies, [image.new_tensor(low), image.new_tensor(high)], None
        with torch.no_grad():
            everywhere = noised(sk.add_gaussian_noise(image))
            hard = sk.hard_sample_mask(self.loss.vacuity(logits), self.loss.vacuity(everywhere))
        patches = sk.sample_noise_patches(
            image,
            label,
            distance,
            hard,
            patch_size=c.noise_patch,
            patches_per_class=c.noise_patches,
            mean_range=c.noise_means,
            std=c.noise_std,
            near=c.near,
            num_classes=logits.shape[1],
            ignore_index=IGNORE,
        )
        return list(patches.images), list(patches.means), patches.centres


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Batch normalisation goes on with the batch's statistics, but leaves its running ones as they are."""
    layers = tracking(model)
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


def build_objective(config: TrainConfig, process_group: Any | None = None) -> DiceCE | Evidential:
    """The objective of `config`, called as objective(logits, label, image, noised) -> (loss, terms).

    Logits (N, K, *patch), label (N, 1, *patch) with IGNORE where a voxel does not count, image (N, M, *patch); `noised`
    is the network, for images that are not to enter its running statistics. Where images without a counted voxel only
    fill up the batches of the ranks of `process_group`, `images_ratio` is all images over the others, of all ranks.
    """
    return DiceCE(process_group) if config.loss == "dice_ce" else Evidential(config, process_group)
