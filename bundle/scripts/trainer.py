"""MONAI's trainer with a loss that looks at the image and knows the epoch."""

from __future__ import annotations

from typing import Any

from monai.engines import SupervisedTrainer
from monai.utils.enums import CommonKeys


class SURETrainer(SupervisedTrainer):
    """SupervisedTrainer whose loss is `sure.integrations.deep_supervision.DeepSupervision`."""

    def _iteration(self, engine: Any, batchdata: Any) -> dict[str, Any]:
        self.loss_function.set_epoch(engine.state.epoch - 1)
        with self.loss_function.seeing(batchdata[CommonKeys.IMAGE]):
            return super()._iteration(engine, batchdata)
