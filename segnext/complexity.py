"""Parameters and multiply-accumulates of the models, counted on the meta device; the paper's table beside ours."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .heads import in_published_order
from .model import SegNeXt, create

# (size, head) -> millions of parameters and GFLOPs at 512x512 with 150 classes, as the paper prints them.
PAPER = {
    ("t", "ham"): (4.3, 6.6),
    ("t", "msca"): (4.4, 6.7),
    ("s", "ham"): (13.9, 15.9),
    ("s", "msca"): (14.0, 15.9),
    ("b", "ham"): (27.6, 34.9),
    ("b", "msca"): (28.0, 33.6),
    ("l", "ham"): (48.9, 70.0),
    ("l", "msca"): (50.1, 69.8),
}


@dataclass(frozen=True)
class Complexity:
    """parameters: their number. macs: multiply-accumulates for one image, what the paper calls FLOPs."""

    parameters: int
    macs: int


def count(size: str, head: str = "ham", num_classes: int = 150, image_size: tuple[int, int] = (512, 512)) -> Complexity:
    """Counts a model in evaluation, from the normalised image to logits at the image's size.

    Counted are convolutions and matrix products, one per element for norms and for elementwise products, and four per element
    of bilinear upsampling. Additions, activations and divisions are free.

    Args:
        image_size: height and width in pixels.

    Source:
        The rules of torchprofile, which the paper's table follows.
    """
    with torch.device("meta"):
        return count_model(create(size, num_classes, head), image_size)


def count_model(model: SegNeXt, image_size: tuple[int, int], upsampled: bool = True) -> Complexity:
    """:func:`count` for a model on the meta device, to logits at the image's size or at stride 8."""
    model = in_published_order(copy.deepcopy(model)).eval()
    with torch.no_grad(), _Counter() as counter:
        logits = model(torch.empty(1, model.config.in_channels, *image_size, device="meta"))
        if upsampled:
            F.interpolate(logits, image_size, mode="bilinear", align_corners=False)
    return Complexity(sum(p.numel() for p in model.parameters()), counter.macs)


def info(size: str, head: str, num_classes: int = 150, image_size: tuple[int, int] = (512, 512)) -> str:
    """Two lines with a model's parameters and GFLOPs."""
    found = count(size, head, num_classes, image_size)
    return (
        f"SegNeXt-{size.upper()}, {head} head, {num_classes} classes, {image_size[0]}x{image_size[1]} pixels\n"
        f"{found.parameters / 1e6:.1f} M parameters, {found.macs / 1e9:.1f} GFLOPs (multiply-accumulates, as the paper counts)"
    )


def table2(further: Mapping[str, Mapping[tuple[str, str], str]] | None = None) -> str:
    """The paper's table 2: parameters and GFLOPs of the eight models with 150 classes at 512x512, ours and the paper's.

    Args:
        further: columns to add, by their titles: the text for (size, head), where there is one.
    """
    further = further or {}
    lines = ["size  head   parameters (M)  paper   GFLOPs  paper" + "".join(f"  {title:>8}" for title in further)]
    for (size, head), (parameters, gflops) in PAPER.items():
        found = count(size, head)
        millions, giga = found.parameters / 1e6, found.macs / 1e9
        lines.append(f"{size.upper():4}  {head:4}   {millions:14.1f}  {parameters:5.1f}   {giga:6.1f}  {gflops:5.1f}")
        lines[-1] += "".join(f"  {column.get((size, head), '-'):>8}" for column in further.values())
    return "\n".join(lines)


class _Counter(TorchDispatchMode):
    """Adds up the cost of every operator that runs under it."""

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in _COSTS:
            self.macs += _COSTS[func.overloadpacket](out, *args)
        return out


def _elements(out: Tensor | tuple[Tensor, ...], *args) -> int:
    out = out if isinstance(out, Tensor) else out[0]
    return out.numel() if out.is_floating_point() else 0  # whole numbers are multiplied where bases are drawn, not in the model


def _convolution(out: Tensor, x: Tensor, weight: Tensor, *args) -> int:
    return out.numel() * weight[0].numel()


_aten = torch.ops.aten  # on the meta device the fused operators are plain PyTorch
_COSTS: dict[torch._ops.OpOverloadPacket, Callable[..., int]] = {
    _aten.convolution: _convolution,
    _aten.bmm: lambda out, a, b: out.numel() * a.shape[-1],
    _aten.mul: _elements,
    _aten.native_batch_norm: _elements,
    _aten.native_layer_norm: _elements,
    _aten.native_group_norm: _elements,
    _aten.upsample_bilinear2d: lambda out, *args: 4 * out.numel(),
}
