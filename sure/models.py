"""Networks by name, all of them MONAI's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

from monai.networks.blocks import Convolution, ResidualUnit, UnetBasicBlock, UnetResBlock
from monai.networks.blocks.segresnet_block import ResBlock
from monai.networks.nets import AttentionUnet, DynUNet, SegResNet, UNet
from torch import nn
from torch.utils.checkpoint import checkpoint

from sure.config import TrainConfig
from sure.errors import UserError


def build_model(config: TrainConfig, in_channels: int, num_classes: int) -> nn.Module:
    """The network of `config`: (N, in_channels, *spatial) -> logits (N, num_classes, *spatial).

    Raises UserError where MONAI has no such network, or memory does not hold it.
    """
    try:
        return _built(config, in_channels, num_classes)
    except (RuntimeError, ValueError, TypeError, MemoryError) as error:
        wanted = f"a {config.model} of channels {config.channels}"
        raise UserError(f"model, channels: no such network can be built, {wanted}: {str(error)[:200]}") from error


def _built(config: TrainConfig, in_channels: int, num_classes: int) -> nn.Module:
    dims, channels = config.spatial_dims, config.channels
    levels = len(channels)
    norm = "instance" if config.norm == "auto" else config.norm
    if config.model == "unet":
        return UNet(
            dims,
            in_channels,
            num_classes,
            channels,
            (2,) * (levels - 1),
            num_res_units=2,
            norm=norm,
            dropout=config.dropout,
        )
    if config.model == "attention_unet":
        return AttentionUnet(dims, in_channels, num_classes, channels, (2,) * (levels - 1), dropout=config.dropout)
    if config.model == "segresnet":
        group = ("GROUP", {"num_groups": 8})
        return SegResNet(
            spatial_dims=dims,
            init_filters=channels[0],
            in_channels=in_channels,
            out_channels=num_classes,
            dropout_prob=config.dropout or None,
            norm=group if config.norm == "auto" else norm,
            blocks_down=(1,) * levels,
            blocks_up=(1,) * (levels - 1),
        )
    strides = (1, *(2,) * (levels - 1))
    return DynUNet(
        spatial_dims=dims,
        in_channels=in_channels,
        out_channels=num_classes,
        kernel_size=(3,) * levels,
        strides=strides,
        upsample_kernel_size=strides[1:],
        filters=channels,
        dropout=config.dropout or None,
        norm_name=norm,
    )


BLOCKS = (Convolution, ResidualUnit, UnetBasicBlock, UnetResBlock, ResBlock)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The convolutional blocks of a network, the outermost of each."""
    found: list[nn.Module] = []
    for child in model.children():
        found += [child] if isinstance(child, BLOCKS) else blocks(child)
    return found


def tracking(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The layers of a network that keep running statistics."""
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]


def checkpoint_activations(model: nn.Module) -> None:
    """Each block of `model` keeps its input alone, and is computed again for the gradient."""
    for block in blocks(model):
        # Running statistics see a batch once: the second time none is updated.
        contexts = partial(_contexts, block)
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)  # type: ignore[method-assign]


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _untouched_statistics(block)


@contextmanager
def _untouched_statistics(block: nn.Module) -> Iterator[None]:
    """Batch normalisation leaves its running statistics as they are.

    As copies that are written to and then forgotten: autograd wants the second pass to keep the same tensors.
    """
    layers = tracking(block)
    kept = [dict(layer.named_buffers(recurse=False)) for layer in layers]
    for layer, buffers in zip(layers, kept, strict=True):
        for name, value in buffers.items():
            setattr(layer, name, value.clone())
    try:
        yield
    finally:
        for layer, buffers in zip(layers, kept, strict=True):
            for name, value in buffers.items():
                setattr(layer, name, value)
