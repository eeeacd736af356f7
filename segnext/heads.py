"""The decode heads of SegNeXt: stages 2-4 to class logits at stage 2's size. Parameter names are the official ones."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segnext_kernels._modules import is_untouched
from segnext_kernels.nn import NMF2D, PointwiseConv2d

from .mscan import SpatialAttention, draw_normal, init_convolution

GROUPS = 32


def conv_norm(in_channels: int, channels: int) -> nn.Sequential:
    """1x1 convolution and group norm."""
    conv = nn.Conv2d(in_channels, channels, 1, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, gn=nn.GroupNorm(GROUPS, channels)))


def is_projection(layers: nn.Module) -> bool:
    """Whether the convolution of :func:`conv_norm` is a product with its filters and nothing else."""
    if not is_untouched(layers, nn.Sequential) or not is_untouched(layers.conv, nn.Conv2d):
        return False
    conv = layers.conv
    return conv.bias is None and (conv.kernel_size, conv.stride, conv.padding, conv.groups) == ((1, 1), (1, 1), (0, 0), 1)


class Hamburger(nn.Module):
    """relu(x + ham_out(NMF(relu(ham_in(x))))) on [B, dim, H, W].

    The convolution of ham_out meets the decomposition's bases instead of all pixels on the CPU, whose kernels do that, unless
    ``published_order`` is set.

    Args:
        dim: channels.
        ham: the matrix decomposition.

    Source: "Is Attention Better Than Matrix Decomposition?" (ICLR 2021), figure 2; ``Hamburger`` of the official code.
    """

    published_order = False

    def __init__(self, dim: int, ham: NMF2D) -> None:
        super().__init__()
        self.ham_in = nn.Sequential(OrderedDict(conv=PointwiseConv2d(dim, dim)))
        self.ham = ham
        self.ham_out = conv_norm(dim, dim)

    def forward(self, x: Tensor, bases: Tensor | None = None) -> Tensor:
        v = F.relu(self.ham_in(x))
        on_bases = x.device.type == "cpu" and is_untouched(self.ham, NMF2D) and is_projection(self.ham_out)
        if self.published_order or not on_bases:
            return F.relu(x + self.ham_out(self.ham(v, bases)))
        projection = self.ham_out.conv.weight.flatten(1)
        if not torch.is_grad_enabled():
            projection = projection.detach()  # a view made now says that it needs a gradient, which FlopCounterMode believes
        return F.relu(x + self.ham_out.gn(self.ham(v, bases, projection)))


class Head(nn.Module):
    """What both heads share; a subclass says with ``mix`` how pixels learn of each other.

    A 1x1 convolution and resizing commute, so each map is squeezed at its own size and then resized, a quarter of the products,
    unless ``published_order`` is set.

    Args:
        in_channels: of stages 2-4.
        channels: of the decoder, a multiple of 32.
        num_classes: channels of the logits.
        dropout: probability that a channel is dropped before the classifier, in training.
    """

    published_order = False

    def __init__(self, in_channels: Sequence[int], channels: int, num_classes: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.squeeze = conv_norm(sum(in_channels), channels)
        self.align = conv_norm(channels, channels)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = PointwiseConv2d(channels, num_classes)

    def init_weights(self) -> None:
        self.apply(init_convolution)
        draw_normal(self.conv_seg.weight, 0.01)

    def mix(self, x: Tensor, bases: Tensor | None) -> Tensor:
        raise NotImplementedError

    def squeezed(self, fine: Tensor, *coarse: Tensor) -> Tensor:
        """The maps through ``squeeze``, at the size of the finest."""

        def resize(x: Tensor) -> Tensor:
            return F.interpolate(x, fine.shape[-2:], mode="bilinear", align_corners=False)

        if self.published_order or not is_projection(self.squeeze):
            return self.squeeze(torch.cat([fine, *map(resize, coarse)], dim=1))
        first, *weights = self.squeeze.conv.weight.split([x.shape[1] for x in (fine, *coarse)], dim=1)
        z = F.conv2d(fine, first)
        for x, weight in zip(coarse, weights, strict=True):
            z = z + resize(F.conv2d(x, weight))
        return self.squeeze.gn(z)

    def forward(self, features: Sequence[Tensor], bases: Tensor | None = None) -> Tensor:
        """The encoder's four maps -> logits [B, num_classes, H, W] of the second map's size."""
        x = F.relu(self.squeezed(*features[1:]))
        x = F.relu(self.align(self.mix(x, bases)))
        return self.conv_seg(self.dropout(x))


class HamHead(Head):
    """The published head: pixels meet in the Hamburger's matrix decomposition, which starts from ``ham``'s bases or given ones.

    Source: ``LightHamHead`` of the official code.
    """

    def __init__(
        self, in_channels: Sequence[int], channels: int, num_classes: int, dropout: float = 0.1, *, ham: NMF2D
    ) -> None:
        super().__init__(in_channels, channels, num_classes, dropout)
        self.hamburger = Hamburger(channels, ham)
        self.init_weights()

    def mix(self, x: Tensor, bases: Tensor | None) -> Tensor:
        return self.hamburger(x, bases)


class MSCAHead(Head):
    """The head of the paper's comparison: pixels meet in one MSCA attention instead of the Hamburger.

    Source: SegNeXt (NeurIPS 2022), the table that compares the decoders.
    """

    def __init__(self, in_channels: Sequence[int], channels: int, num_classes: int, dropout: float = 0.1) -> None:
        super().__init__(in_channels, channels, num_classes, dropout)
        self.attention = SpatialAttention(channels)
        self.init_weights()

    def mix(self, x: Tensor, bases: Tensor | None) -> Tensor:
        if bases is not None:
            raise ValueError("the MSCA head has no matrix decomposition, so it takes no bases")
        return self.attention(x)


def in_published_order(model: nn.Module) -> nn.Module:
    """The model, whose heads now do everything in the official code's order, which the paper counts: the same to rounding."""
    for module in model.modules():
        if isinstance(module, (Head, Hamburger)):
            module.published_order = True
    return model
