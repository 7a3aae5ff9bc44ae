"""Networks by name, all of them MONAI's."""

from __future__ import annotations

from monai.networks.blocks import Convolution, ResidualUnit, UnetBasicBlock, UnetResBlock
from monai.networks.blocks.segresnet_block import ResBlock
from monai.networks.nets import AttentionUnet, DynUNet, SegResNet, UNet
from torch import nn

from sure.config import TrainConfig


def build_model(config: TrainConfig, in_channels: int, num_classes: int) -> nn.Module:
    """The network of `config`: (N, in_channels, *spatial) -> logits (N, num_classes, *spatial)."""
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
