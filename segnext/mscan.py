"""MSCAN, the convolutional encoder of SegNeXt. Parameter names are the official ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segnext_kernels import scale_add
from segnext_kernels.nn import AttentionModule, DWConvGELU, PointwiseConv2d

LAYER_SCALE = 1e-2


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of an image [B, C, H, W], in x's layout (no copy where that is channels_last)."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return y.contiguous() if x.is_contiguous() else y


class DropPath(nn.Module):
    """Stochastic depth: in training each image of the batch loses x with probability p; the rest is scaled up to match."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def mask(self, images: int, like: Tensor) -> Tensor | None:
        """What each image's x is multiplied by [images], in ``like``'s dtype; None where nothing is lost."""
        if not self.training or self.p == 0:
            return None
        keep = 1 - self.p
        return like.new_empty(images).bernoulli_(keep).div_(keep)

    def forward(self, x: Tensor) -> Tensor:
        mask = self.mask(x.shape[0], x)
        return x if mask is None else x * mask[:, None, None, None]

    def extra_repr(self) -> str:
        return f"p={self.p:.3g}"


class StemConv(nn.Module):
    """Two 3x3 convolutions of stride 2: [B, in_channels, H, W] -> [B, dim, H/4, W/4], rounded up."""

    def __init__(self, in_channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(in_channels, dim // 2, 3, stride=2, padding=1),
            nn.BatchNorm2d(dim // 2),
            nn.GELU(),
            nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1),
            nn.BatchNorm2d(dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class OverlapPatchEmbed(nn.Module):
    """One 3x3 convolution of stride 2: [B, in_channels, H, W] -> [B, dim, H/2, W/2], rounded up."""

    def __init__(self, in_channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x))


class SpatialAttention(nn.Module):
    """x + proj_2(MSCA(GELU(proj_1(x)))) on [B, dim, H, W]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj_1 = PointwiseConv2d(dim, dim)
        self.spatial_gating_unit = AttentionModule(dim)
        self.proj_2 = PointwiseConv2d(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj_2(self.spatial_gating_unit(F.gelu(self.proj_1(x))))


class MLP(nn.Module):
    """1x1 convolution, 3x3 depthwise convolution with GELU, 1x1 convolution on [B, dim, H, W]."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = PointwiseConv2d(dim, hidden)
        self.dwconv = DWConvGELU(hidden)
        self.fc2 = PointwiseConv2d(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.dwconv(self.fc1(x)))


class Block(nn.Module):
    """Attention and MLP, each normalised, scaled per channel, dropped now and then, and added to its input."""

    def __init__(self, dim: int, mlp_ratio: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(dim)
        self.attn = SpatialAttention(dim)
        self.norm2 = nn.BatchNorm2d(dim)
        self.mlp = MLP(dim, mlp_ratio * dim)
        self.drop_path = DropPath(drop_path)
        self.layer_scale_1 = nn.Parameter(torch.full((dim,), LAYER_SCALE))
        self.layer_scale_2 = nn.Parameter(torch.full((dim,), LAYER_SCALE))

    def forward(self, x: Tensor) -> Tensor:
        x = self.update(x, self.attn(self.norm1(x)), self.layer_scale_1)
        return self.update(x, self.mlp(self.norm2(x)), self.layer_scale_2)

    def update(self, x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        if not isinstance(self.drop_path, DropPath):  # it was replaced
            return x + self.drop_path(scale[:, None, None] * y)
        return scale_add(x, y, scale, self.drop_path.mask(x.shape[0], scale))


class MSCAN(nn.Module):
    """The encoder: images to four feature maps at 1/4, 1/8, 1/16 and 1/32 of their size, rounded up.

    Args:
        channels, depths, mlp_ratios: of the four stages.
        in_channels: of the images.
        drop_path: probability of stochastic depth in the last block; it grows linearly from 0 in the first.

    Shape: [B, in_channels, H, W] -> a list of four [B, channels[i], ceil(H / 2**(i + 2)), ceil(W / 2**(i + 2))].
    Source: SegNeXt (NeurIPS 2022), section 3.1; ``MSCAN`` of the official code, initialisation included.
    """

    def __init__(
        self,
        channels: Sequence[int],
        depths: Sequence[int],
        mlp_ratios: Sequence[int] = (8, 8, 4, 4),
        in_channels: int = 3,
        drop_path: float = 0.1,
    ) -> None:
        super().__init__()
        self.channels = tuple(channels)
        last = max(sum(depths) - 1, 1)
        drop_paths = iter([drop_path * i / last for i in range(sum(depths))])
        for i, (dim, depth, ratio) in enumerate(zip(channels, depths, mlp_ratios, strict=True)):
            embed = OverlapPatchEmbed(channels[i - 1], dim) if i else StemConv(in_channels, dim)
            self.add_module(f"patch_embed{i + 1}", embed)
            self.add_module(f"block{i + 1}", nn.ModuleList(Block(dim, ratio, next(drop_paths)) for _ in range(depth)))
            self.add_module(f"norm{i + 1}", LayerNorm2d(dim))
        self.apply(init_convolution)

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for i in range(1, len(self.channels) + 1):
            x = getattr(self, f"patch_embed{i}")(x)
            for block in getattr(self, f"block{i}"):
                x = block(x)
            x = getattr(self, f"norm{i}")(x)
            features.append(x)
        return features


def init_convolution(module: nn.Module) -> None:
    """Normal weights of variance 2 / fan_out, where fan_out counts one group only (PyTorch's counts all), and zero biases."""
    if isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        draw_normal(module.weight, math.sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def draw_normal(weight: Tensor, std: float) -> None:
    """Nothing on the meta device, where PyTorch would import its compiler for it, which takes seconds."""
    if not weight.is_meta:
        nn.init.normal_(weight, std=std)
