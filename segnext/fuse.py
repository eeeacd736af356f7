"""The model for inference: norms and scales folded into packed weights, every half of a block one operator."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

import segnext_kernels as kernels
from segnext_kernels._modules import is_untouched
from segnext_kernels.nn import NMF2D, PointwiseConv2d

from .distributed import SyncBatchNorm2d
from .heads import Hamburger, HamHead, Head
from .model import SegNeXt, require_images
from .mscan import MLP, MSCAN, Block, DropPath, LayerNorm2d, SpatialAttention
from .recipes import show_as

DTYPES = (torch.float32, torch.bfloat16)
ALIKE = ((nn.Conv2d, PointwiseConv2d), (nn.BatchNorm2d, SyncBatchNorm2d, nn.SyncBatchNorm))  # in evaluation
UNUSED = (nn.Dropout2d, DropPath)  # there


def fuse(model: SegNeXt, dtype: torch.dtype = torch.float32) -> FusedSegNeXt:
    """An inference model with the same outputs: batch norms and layer scales folded, weights packed once, channels_last.

    A stage's layer norm is done by its last block.

    Args:
        model: left as it is. Its batch norms' running statistics are used, as in evaluation.
        dtype: of the weights and activations, float32 or bfloat16; sums are kept in float32.

    Returns:
        A module with ``forward`` and ``predict`` of :class:`segnext.SegNeXt`, without gradients.

    Raises:
        TypeError: another dtype, no SegNeXt, or one with modules that were replaced, hooked or parametrized: what they do more
            would be lost.
    """
    if not isinstance(model, SegNeXt):
        raise TypeError(f"fuse: model must be a SegNeXt, got {type(model).__name__}")
    if dtype not in DTYPES:
        raise TypeError(f"fuse: dtype must be float32 or bfloat16, got {dtype}")
    require_own_modules(model)
    with torch.no_grad():
        return FusedSegNeXt(model, dtype).eval()


def require_own_modules(model: SegNeXt) -> None:
    """Raises a TypeError that names the first module that computes, or has someone watch, something else than a SegNeXt's."""
    depths = tuple(len(getattr(model.backbone, f"block{i + 1}")) for i in range(len(model.config.depths)))
    with torch.device("meta"):
        own = dict(SegNeXt(replace(model.config, depths=depths)).named_modules())
    found = dict(model.named_modules())
    for name in [*own, *(found.keys() - own.keys())]:
        kind = type(own.get(name))
        kinds = next((alike for alike in ALIKE if kind in alike), (kind,))
        fits = kind in UNUSED or any(is_untouched(found.get(name), one) for one in kinds)
        if fits and (name not in found or options(found[name]) == options(own[name])):
            continue
        given = f"{name or 'the model'}: {found[name]}".splitlines()[0] if name in found else f"no {name}"
        raise TypeError(f"fuse: the model has {given}, replaced, hooked or parametrized, which a fused model would not heed")


def options(module: nn.Module) -> tuple:
    """Which of its tensors a module lacks, and what a convolution or activation computes beside them."""
    tensors = {**module._parameters, **module._buffers}
    lacks = {name for name, tensor in tensors.items() if tensor is None}
    if isinstance(module, nn.Conv2d):
        groups = "depthwise" if 1 < module.groups == module.in_channels == module.out_channels else module.groups
        if groups == 1:
            lacks.discard("bias")  # which is zero then
        return lacks, module.kernel_size, module.stride, module.padding, module.dilation, module.padding_mode, groups
    return lacks, (module.approximate if isinstance(module, nn.GELU) else None)


def frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone(), requires_grad=False)


def values(parameters: nn.ParameterList) -> list[nn.Parameter]:
    """The same as ``list(parameters)``, which takes as long as a kernel."""
    return list(parameters._parameters.values())


def matrix(convolution: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """A convolution's filters and bias in float64."""
    weight = convolution.weight.double()
    return weight, weight.new_zeros(len(weight)) if convolution.bias is None else convolution.bias.double()


def affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """What a batch norm multiplies with and adds in evaluation, in float64."""
    scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    return scale, norm.bias.double() - norm.running_mean.double() * scale


def norm_first(norm: nn.BatchNorm2d, convolution: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """The matrix and bias of a batch norm followed by a 1x1 convolution."""
    (scale, shift), (weight, bias) = affine(norm), matrix(convolution)
    return weight.flatten(1) * scale, bias + weight.flatten(1) @ shift


class ConvAct(nn.Module):
    """A convolution, the batch norm that follows it if any, and an activation."""

    def __init__(
        self, convolution: nn.Conv2d, dtype: torch.dtype, activation: str = "none", norm: nn.BatchNorm2d | None = None
    ) -> None:
        super().__init__()
        weight, bias = matrix(convolution)
        if norm is not None:
            scale, shift = affine(norm)
            weight, bias = weight * scale[:, None, None, None], bias * scale + shift
        self.weight, self.bias = frozen(kernels.pack(weight, dtype)), frozen(bias.float())
        self.options = convolution.kernel_size[0], convolution.stride[0], activation

    def forward(self, x: Tensor) -> Tensor:
        return kernels.conv_act(x, self.weight, self.bias, *self.options)


class FusedAttention(nn.Module):
    """x + layer_scale * attention(norm(x)), or attention(x) alone, whose own shortcut then is all there is."""

    def __init__(
        self, attention: SpatialAttention, dtype: torch.dtype, norm: nn.BatchNorm2d | None, layer_scale: Tensor | None
    ) -> None:
        super().__init__()
        (weight_1, bias_1), (weight_2, bias_2) = matrix(attention.proj_1), matrix(attention.proj_2)
        gate, gate_bias = matrix(attention.spatial_gating_unit.conv3)
        scale = torch.ones_like(bias_2)
        if norm is not None:
            weight_1, bias_1 = norm_first(norm, attention.proj_1)
            norm_scale, norm_shift = affine(norm)
            weight_2 = weight_2 * layer_scale.double()[:, None, None, None]
            bias_2 = (bias_2 + norm_shift) * layer_scale.double()
            scale = 1 + layer_scale.double() * norm_scale
        strips = [tensor.to(dtype) for tensor in attention.spatial_gating_unit.strip_weights()]
        tensors = [kernels.pack(weight_1, dtype), bias_1.float(), *strips, kernels.pack(gate, dtype), gate_bias.float()]
        tensors += [kernels.pack(weight_2, dtype), bias_2.float(), scale.float()]
        self.weights = nn.ParameterList(map(frozen, tensors))

    def forward(self, x: Tensor) -> Tensor:
        return kernels.spatial_attention(x, values(self.weights))


class FusedMLP(nn.Module):
    """x + layer_scale * mlp(norm(x)), and the norm that ends a stage in its last block."""

    def __init__(
        self, mlp: MLP, dtype: torch.dtype, norm: nn.BatchNorm2d, layer_scale: Tensor, last_norm: LayerNorm2d | None
    ) -> None:
        super().__init__()
        weight_1, bias_1 = norm_first(norm, mlp.fc1)
        weight_2, bias_2 = matrix(mlp.fc2)
        scale, depthwise = layer_scale.double(), mlp.dwconv.dwconv
        tensors = [kernels.pack(weight_1, dtype), bias_1.float(), depthwise.weight.float(), depthwise.bias.float()]
        tensors += [kernels.pack(weight_2 * scale[:, None, None, None], dtype), (bias_2 * scale).float()]
        tensors += [] if last_norm is None else [last_norm.weight.float(), last_norm.bias.float()]
        self.weights = nn.ParameterList(map(frozen, tensors))
        self.options = {} if last_norm is None else {"eps": last_norm.eps}

    def forward(self, x: Tensor) -> Tensor:
        return kernels.mlp(x, *values(self.weights), **self.options)


class GroupNormReLU(nn.Module):
    """relu(group norm of x + residual)."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.weight, self.bias = frozen(norm.weight.float()), frozen(norm.bias.float())
        self.groups, self.eps = norm.num_groups, norm.eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return kernels.group_norm_relu(x, self.weight, self.bias, self.groups, self.eps, residual)


class FusedHamburger(nn.Module):
    """The matrix decomposition, its two convolutions and the shortcut."""

    def __init__(self, hamburger: Hamburger, dtype: torch.dtype) -> None:
        super().__init__()
        if type(hamburger.ham) is not NMF2D or hamburger.ham_out.conv.bias is not None:
            raise TypeError("fuse: the Hamburger must have an NMF2D and, in ham_out, a convolution without bias")
        weight, bias = matrix(hamburger.ham_in.conv)
        self.ham_in, self.bias = frozen(kernels.pack(weight, dtype)), frozen(bias.float())
        ham, norm = hamburger.ham, hamburger.ham_out.gn
        drawn = ham.bases == "random"
        self.register_parameter("fixed_bases", None if drawn else frozen(ham.fixed_bases(len(bias), bias.device)))
        self.steps, self.random = ham.eval_steps, copy.deepcopy(ham) if drawn else None
        self.ham_out = frozen(hamburger.ham_out.conv.weight.flatten(1).float())
        self.norm_weight, self.norm_bias = frozen(norm.weight.float()), frozen(norm.bias.float())
        self.options = norm.num_groups, norm.eps, dtype == torch.bfloat16

    def forward(self, x: Tensor, bases: Tensor | None = None) -> Tensor:
        if bases is None and self.random is not None:
            bases = self.random.initial_bases(x)
        elif bases is None:
            bases = self.fixed_bases.expand(x.shape[0], -1, -1).contiguous()
        norm = self.norm_weight, self.norm_bias, *self.options
        return kernels.hamburger(x, self.ham_in, self.bias, bases, self.steps, self.ham_out, *norm)


def fused_block(block: Block, dtype: torch.dtype, last_norm: LayerNorm2d | None) -> nn.Sequential:
    attention = FusedAttention(block.attn, dtype, block.norm1, block.layer_scale_1)
    return nn.Sequential(attention, FusedMLP(block.mlp, dtype, block.norm2, block.layer_scale_2, last_norm))


class FusedMSCAN(nn.Module):
    """The encoder."""

    def __init__(self, encoder: MSCAN, dtype: torch.dtype) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        for i in range(1, len(encoder.channels) + 1):
            embed, norm = getattr(encoder, f"patch_embed{i}"), getattr(encoder, f"norm{i}")
            if i == 1:
                conv_1, norm_1, _, conv_2, norm_2 = embed.proj
                layers = [ConvAct(conv_1, dtype, "gelu", norm_1), ConvAct(conv_2, dtype, norm=norm_2)]
            else:
                layers = [ConvAct(embed.proj, dtype, norm=embed.norm)]
            blocks = getattr(encoder, f"block{i}")
            last = len(blocks) - 1
            layers += [fused_block(block, dtype, norm if j == last else None) for j, block in enumerate(blocks)]
            layers += [] if blocks else [copy.deepcopy(norm).to(dtype).requires_grad_(False)]
            self.stages.append(nn.Sequential(*layers))

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features


class FusedHead(nn.Module):
    """Either decode head."""

    def __init__(self, head: Head, in_channels: Sequence[int], dtype: torch.dtype) -> None:
        super().__init__()
        parts = head.squeeze.conv.weight.flatten(1).split(list(in_channels), dim=1)
        self.squeeze = nn.ParameterList(frozen(kernels.pack(part, dtype)) for part in parts)
        self.squeeze_bias = frozen(matrix(head.squeeze.conv)[1].float())
        self.squeeze_norm, self.align_norm = GroupNormReLU(head.squeeze.gn), GroupNormReLU(head.align.gn)
        self.align, self.conv_seg = ConvAct(head.align.conv, dtype), ConvAct(head.conv_seg, dtype)
        if isinstance(head, HamHead):
            self.mix = FusedHamburger(head.hamburger, dtype)
        else:
            self.mix = FusedAttention(head.attention, dtype, None, None)

    def forward(self, features: Sequence[Tensor], bases: Tensor | None = None) -> Tensor:
        x = self.squeeze_norm(kernels.resize_concat_conv(features[-3:], values(self.squeeze), self.squeeze_bias))
        if isinstance(self.mix, FusedHamburger):
            x = self.mix(x, bases)
        elif bases is not None:
            raise ValueError("the MSCA head has no matrix decomposition, so it takes no bases")
        else:
            x = self.mix(x)
        x = self.align(x)  # step by step, so that no more than two of these maps are held
        x = self.align_norm(x)
        return self.conv_seg(x)


class FusedSegNeXt(nn.Module):
    """What :func:`fuse` returns; attributes as of :class:`segnext.SegNeXt`."""

    def __init__(self, model: SegNeXt, dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.dtype = model.config, dtype
        self.classes, self.palette = model.classes, model.palette
        show_as(self, model)
        self.backbone = FusedMSCAN(model.backbone, dtype)
        self.decode_head = FusedHead(model.decode_head, model.config.channels[1:], dtype)
        # glibc gives the memory of every large tensor back to the system, whose fresh pages then take a tenth of a small
        # model's time; once a block of nearly 32 MiB was freed, it keeps what is smaller.
        torch.empty((32 << 20) - 8192, dtype=torch.uint8)

    def forward(self, images: Tensor, bases: Tensor | None = None) -> Tensor:
        """The logits [B, num_classes, ceil(H / 8), ceil(W / 8)] at stride 8, in ``dtype``; see :meth:`SegNeXt.forward`."""
        require_images(images, self.config.in_channels)
        features = self.backbone(images.to(self.dtype))[1:]  # the head has no use for the largest
        return self.decode_head(features, bases)

    def __repr__(self) -> str:
        return f"FusedSegNeXt({self.config}, {self.dtype})"  # and not every packed weight

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """The label maps, int64 [B, H, W]; see :meth:`SegNeXt.predict`."""
        return kernels.upsample_argmax(self(images), images.shape[-2:])

    def _apply(self, function: Callable, recurse: bool = True) -> FusedSegNeXt:
        if any(function(torch.empty(0, dtype=dtype, device="cpu")).dtype != dtype for dtype in {torch.float32, self.dtype}):
            raise TypeError("a fused model keeps its dtype; fuse the model again with another")
        # packed weights keep their order where PyTorch would make them channels_last
        return super()._apply(lambda tensor: function(tensor).contiguous(), recurse)

    def train(self, mode: bool = True) -> FusedSegNeXt:
        if mode:
            raise RuntimeError("a fused model serves inference; train the model that was fused")
        return super().train(False)


def inference_model(model: nn.Module, device: torch.device) -> nn.Module:
    """The fastest form of a model in float32 there: fused on the CPU."""
    return fuse(model) if device.type == "cpu" else model.to(device, memory_format=torch.channels_last).eval()
