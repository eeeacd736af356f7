"""Modules with the official names and parameter names, on the fused operators: drop-ins for SegNeXt's slow parts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._modules import is_depthwise, on_images
from ._select import COMPILED_BRANCHES
from ._validate import accumulator, check_gradient, check_tensor, check_updates, transformed, whole
from .dwconv_gelu import dwconv_gelu
from .msca_strips import msca_strips
from .nmf import nmf

DEPTHWISE = {"conv0": (5, 5)}  # AttentionModule's convolutions and their kernel sizes, in msca_strips' order
for _branch, _size in enumerate(COMPILED_BRANCHES):
    DEPTHWISE |= {f"conv{_branch}_1": (1, _size), f"conv{_branch}_2": (_size, 1)}


class PointwiseConv2d(nn.Conv2d):
    """A 1x1 convolution. On a GPU, of channels_last in 16 bits, a matrix product, whose library adds the bias in passing.

    There PyTorch's convolution adds it in a kernel of its own, which takes as long as the product. In float32 convolutions may
    be made in TF32 where products may not, so they stay what they are.

    Args:
        in_channels, out_channels, bias: as in ``torch.nn.Conv2d``.

    Shape: x [N, in_channels, H, W] -> [N, out_channels, H, W], in x's layout.
    """

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 1, bias=bias)

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not _is_matrix_on_gpu(x):
            return super()._conv_forward(x, weight, bias)
        pixels = x.permute(0, 2, 3, 1)
        y = F.linear(pixels.reshape(-1, x.shape[1]), weight.flatten(1), bias)
        return y.view(*pixels.shape[:3], -1).permute(0, 3, 1, 2)


def _is_matrix_on_gpu(x: Tensor) -> bool:
    if x.device.type != "cuda" or x.dim() != 4 or x.numel() == 0 or transformed():  # under vmap layouts cannot be asked for
        return False
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    return dtype.itemsize == 2 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


class AttentionModule(nn.Module):
    """MSCA, the attention of SegNeXt: (1x1 convolution of msca_strips(x)) * x.

    Where one of the depthwise convolutions was replaced, pruned, parametrized, or has hooks of its own, all of them are called
    one by one.

    Args:
        dim: channels.

    Shape: x [N, dim, H, W] -> [N, dim, H, W], in x's layout.
    Source: ``AttentionModule`` (official) and ``MSCAAttention`` (mmsegmentation); the parameter names are theirs.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        for name, (height, width) in DEPTHWISE.items():
            padding = (height // 2, width // 2)
            self.add_module(name, nn.Conv2d(dim, dim, (height, width), padding=padding, groups=dim))
        self.conv3 = PointwiseConv2d(dim, dim)

    def strip_weights(self) -> list[Tensor]:
        """The filters and biases in the order that :func:`segnext_kernels.msca_strips` takes them."""
        return _tensors(self._depthwise())

    def _depthwise(self) -> list[nn.Module]:
        return [getattr(self, name) for name in DEPTHWISE]

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(self._strips(x)) * x

    def _strips(self, x: Tensor) -> Tensor:
        convolutions = self._depthwise()
        if all(is_depthwise(one, size) for one, size in zip(convolutions, DEPTHWISE.values(), strict=True)):
            return on_images(msca_strips, x, _tensors(convolutions))
        first, *branches = convolutions
        a = first(x)
        return a + sum(columns(rows(a)) for rows, columns in zip(branches[::2], branches[1::2], strict=True))


def _tensors(convolutions: list[nn.Module]) -> list[Tensor]:
    return [tensor for convolution in convolutions for tensor in (convolution.weight, convolution.bias)]


class DWConvGELU(nn.Module):
    """The middle of SegNeXt's MLP: 3x3 depthwise convolution and GELU.

    Where the convolution was replaced, pruned, parametrized, or has hooks of its own, it is called as it is.

    Args:
        dim: channels.

    Shape: x [N, dim, H, W] -> [N, dim, H, W], in x's layout.
    Source: ``DWConv`` (official; the parameter is ``dwconv`` as there) followed by ``Mlp``'s activation.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        if not is_depthwise(self.dwconv, (3, 3)):
            return F.gelu(self.dwconv(x))
        return on_images(dwconv_gelu, x, self.dwconv.weight, self.dwconv.bias)


class NMF2D(nn.Module):
    """The Hamburger's matrix decomposition: replaces an image's features by their low-rank approximation.

    Args:
        rank: R, the number of bases.
        train_steps, eval_steps: updates in training and in evaluation.
        bases: what the decomposition starts from in evaluation: "fixed" draws from ``seed``, so that the same image gives the
            same answer; "random" draws anew at every call, as the official code does. Training always draws anew.
        seed: of the fixed bases.
        gradient: "exact" or "one_step", see :func:`segnext_kernels.nmf`.
        round_factors: see there.

    Shape: x [N, C, H, W] >= 0 -> [N, C, H, W], in x's layout; optionally bases [N, C, rank], and the filters [C, C] of a 1x1
        convolution without bias that follows.
    Source: ``NMF2D`` of the official code.
    """

    def __init__(
        self,
        rank: int = 64,
        train_steps: int = 6,
        eval_steps: int = 7,
        *,
        bases: str = "fixed",
        seed: int = 0,
        gradient: str = "exact",
        round_factors: bool = False,
    ) -> None:
        super().__init__()
        if bases not in ("fixed", "random"):
            raise ValueError(f"NMF2D: bases must be 'fixed' or 'random', got {bases!r}")
        check_gradient("NMF2D", gradient)
        whole("NMF2D", "rank", rank)
        if rank < 1:
            raise ValueError(f"NMF2D: rank must be at least 1, got {rank}")
        whole("NMF2D", "seed", seed)
        for steps in (train_steps, eval_steps):
            check_updates("NMF2D", steps, round_factors)
        self.rank, self.train_steps, self.eval_steps = int(rank), int(train_steps), int(eval_steps)
        self.bases, self.seed, self.gradient, self.round_factors = bases, int(seed), gradient, round_factors

    def forward(self, x: Tensor, bases: Tensor | None = None, projection: Tensor | None = None) -> Tensor:
        check_tensor("NMF2D", "x", x, "[N, C, H, W]")
        if bases is None:
            bases = self.initial_bases(x)
        steps = self.train_steps if self.training else self.eval_steps
        options = {"projection": projection, "round_factors": self.round_factors}
        return nmf(x.flatten(2), bases, steps, self.gradient, **options).view(x.shape)

    def initial_bases(self, x: Tensor) -> Tensor:
        """Columns of length one, uniform before that: [N, C, rank] for x [N, C, H, W]."""
        images, channels = x.shape[:2]
        dtype = accumulator(x.dtype)
        if self.training or self.bases == "random":
            return F.normalize(torch.rand(images, channels, self.rank, device=x.device, dtype=dtype), dim=1)
        return self.fixed_bases(channels, x.device, dtype).repeat(images, 1, 1)

    def fixed_bases(self, channels: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """Those of one image that depend on the seed alone: [1, channels, rank]."""
        uniform = fixed_uniform(channels * self.rank, self.seed, device).to(dtype)
        return F.normalize(uniform.view(1, channels, self.rank), dim=1)

    def extra_repr(self) -> str:
        return (
            f"rank={self.rank}, train_steps={self.train_steps}, eval_steps={self.eval_steps}, bases={self.bases!r}, "
            f"seed={self.seed}, gradient={self.gradient!r}, round_factors={self.round_factors}"
        )


def fixed_uniform(count: int, seed: int, device: torch.device | None) -> Tensor:
    """Numbers in [0, 1) that depend on nothing but their index and the seed: the same on every device and under torch.compile.

    Every product stays below 2^63, because compilers do not let int64 wrap.

    Source: the finaliser of the splitmix32 generators in common use, on a counter.
    """
    mask = (1 << 32) - 1
    z = (torch.arange(count, device=device) + seed * 0x9E3779B9 % (1 << 32)) & mask
    z = (z ^ z >> 16) * 0x21F0AAAD & mask
    z = (z ^ z >> 15) * 0x735A2D97 & mask
    return ((z ^ z >> 15) >> 8).to(torch.float32) / (1 << 24)
