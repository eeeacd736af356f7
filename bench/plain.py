"""What users write in plain PyTorch, as the operators' docstrings have it, in the dtype of the inputs."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segnext.heads import in_published_order
from segnext.mscan import Block
from segnext_kernels.nn import NMF2D, AttentionModule, DWConvGELU, PointwiseConv2d


def msca_strips(x: Tensor, *weights: Tensor) -> Tensor:
    channels = x.shape[1]
    w5, b5, *strips = weights
    a = F.conv2d(x, w5, b5, padding=2, groups=channels)
    y = a
    for wh, bh, wv, bv in zip(strips[0::4], strips[1::4], strips[2::4], strips[3::4], strict=True):
        k = wh.shape[-1]
        rows = F.conv2d(a, wh, bh, padding=(0, k // 2), groups=channels)
        y = y + F.conv2d(rows, wv, bv, padding=(k // 2, 0), groups=channels)
    return y


def dwconv_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.conv2d(x, weight, bias, padding=1, groups=x.shape[1]))


def scale_add(x: Tensor, y: Tensor, scale: Tensor, keep: Tensor) -> Tensor:
    return x + keep[:, None, None, None] * (scale[:, None, None] * y)


def nmf(x: Tensor, bases: Tensor, steps: int) -> Tensor:
    coef = torch.softmax(x.mT @ bases, dim=-1)
    for _ in range(steps):
        coef = coef * (x.mT @ bases) / (coef @ (bases.mT @ bases) + 1e-6)
        bases = bases * (x @ coef) / (bases @ (coef.mT @ coef) + 1e-6)
    coef = coef * (x.mT @ bases) / (coef @ (bases.mT @ bases) + 1e-6)
    return bases @ coef.mT


def upsample_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    z = F.interpolate(logits, target.shape[-2:], mode="bilinear", align_corners=False)
    return F.cross_entropy(z, target, ignore_index=255)


def upsample_argmax(logits: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(logits, size, mode="bilinear", align_corners=False).argmax(1)


def conv_act(x: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
    return F.relu(F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2))


def spatial_attention(x: Tensor, *weights: Tensor) -> Tensor:
    (w1, b1), strips, (w3, b3, w2, b2, scale) = weights[:2], weights[2:16], weights[16:]
    u = F.gelu(F.conv2d(x, w1, b1))
    return scale[:, None, None] * x + F.conv2d(F.conv2d(msca_strips(u, *strips), w3, b3) * u, w2, b2)


def mlp(x: Tensor, fc1: Tensor, bias1: Tensor, depthwise: Tensor, bias: Tensor, fc2: Tensor, bias2: Tensor) -> Tensor:
    return x + F.conv2d(dwconv_gelu(F.conv2d(x, fc1, bias1), depthwise, bias), fc2, bias2)


def group_norm_relu(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, groups: int) -> Tensor:
    return F.relu(F.group_norm(x, groups, weight, bias) + residual)


def hamburger(x: Tensor, *weights: Tensor, steps: int, groups: int) -> Tensor:
    ham_in, bias, bases, ham_out, norm_weight, norm_bias = weights
    v = F.relu(F.conv2d(x, ham_in, bias))
    z = F.conv2d(nmf(v.flatten(2), bases, steps).view(x.shape), ham_out)
    return F.relu(x + F.group_norm(z, groups, norm_weight, norm_bias))


def resize_concat_conv(*inputs: Tensor) -> Tensor:
    first, *others, weight, bias = inputs
    resized = [F.interpolate(one, first.shape[2:], mode="bilinear", align_corners=False) for one in others]
    return F.conv2d(torch.cat([first, *resized], 1), weight, bias)


class PlainAttentionModule(AttentionModule):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(msca_strips(x, *self.strip_weights())) * x


class PlainDWConvGELU(DWConvGELU):
    def forward(self, x: Tensor) -> Tensor:
        return dwconv_gelu(x, self.dwconv.weight, self.dwconv.bias)


class PlainNMF2D(NMF2D):
    """Keeps its fixed bases, as a fused model does."""

    kept: Tensor  # [1, C, rank], in the model's dtype

    def fixed_bases(self, channels: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.kept.to(dtype)

    def forward(self, x: Tensor, bases: Tensor | None = None) -> Tensor:
        bases = self.initial_bases(x) if bases is None else bases
        steps = self.train_steps if self.training else self.eval_steps
        return nmf(x.flatten(2), bases.to(x.dtype), steps).view(x.shape)


class PlainBlock(Block):
    def update(self, x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        return x + self.drop_path(scale[:, None, None] * y)


PLAIN = {AttentionModule: PlainAttentionModule, DWConvGELU: PlainDWConvGELU, NMF2D: PlainNMF2D, Block: PlainBlock}
PLAIN |= {PointwiseConv2d: nn.Conv2d}


def network(model: nn.Module) -> nn.Module:
    """A copy of a SegNeXt, with its parameters, that has no operator of ours and computes in the official code's order."""
    model = in_published_order(copy.deepcopy(model))
    where = next(model.parameters()).device
    for module in model.modules():
        if isinstance(module, NMF2D):
            kept = module.fixed_bases(model.config.decoder_channels, where, torch.float64)
            module.register_buffer("kept", kept, persistent=False)
        module.__class__ = PLAIN.get(type(module), type(module))
    return model
