"""Cases of whole models, in inference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

import segnext
from segnext.complexity import count_model
from segnext.export.formats import ONNX_RUNTIME, onnx_runtime
from segnext.graphed import Graphed
from segnext.model import Config, SegNeXt
from segnext_kernels.nn import NMF2D

from . import exported, plain
from .case import FROZEN, LAYOUTS, Case, Contender, Work, device, generator, image_shape


@lru_cache(maxsize=1)
def network(config: Config) -> SegNeXt:
    """A SegNeXt in evaluation, the same at every call, its norms and scales not the identity, so that errors show."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = SegNeXt(config)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 2)
        for name, parameter in model.named_parameters():
            if "layer_scale" in name:
                parameter.normal_(std=0.03)
    return model.eval().to(device())


class PlainModel(nn.Module):
    """:func:`network` in plain PyTorch, computing in ``dtype``: images to logits at stride 8, or to labels."""

    def __init__(self, config: Config, dtype: torch.dtype, labels: bool) -> None:
        super().__init__()
        self.model, self.dtype, self.labels = plain.network(network(config)).to(dtype), dtype, labels

    def forward(self, images: Tensor) -> Tensor:
        logits = self.model(images.to(self.dtype))
        return plain.upsample_argmax(logits, images.shape[-2:]) if self.labels else logits


class FusedModel(nn.Module):
    """:func:`network` as it is on a GPU, where its operators are fused and no more: as :class:`PlainModel`."""

    def __init__(self, config: Config, dtype: torch.dtype, labels: bool) -> None:
        super().__init__()
        model = copy.deepcopy(network(config)).to(dtype, memory_format=torch.channels_last)
        for module in model.modules():
            if isinstance(module, NMF2D):
                module.round_factors = dtype == torch.bfloat16  # as segnext.fuse does
        self.model, self.dtype = model.predict if labels else model, dtype

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images.to(self.dtype))


def logits_case(
    name: str, config: Config, image_size: tuple[int, int], dtype: torch.dtype, batch: int = 1, on_gpu: bool = False
) -> Case:
    """Images [batch, 3, *image_size] to logits at stride 8."""
    return _case(name, config, image_size, dtype, batch, labels=False, on_gpu=on_gpu)


def labels_case(name: str, config: Config, image_size: tuple[int, int], dtype: torch.dtype, batch: int = 1) -> Case:
    """Images [batch, 3, *image_size] to labels [batch, *image_size]."""
    return _case(name, config, image_size, dtype, batch, labels=True)


def _case(
    name: str,
    config: Config,
    image_size: tuple[int, int],
    dtype: torch.dtype,
    batch: int,
    labels: bool,
    on_gpu: bool = False,
) -> Case:
    shape = (batch, config.in_channels, *image_size)
    return Case(
        name,
        image_shape(batch, *image_size),
        dtype,
        lambda: [torch.randn(shape, generator=generator(), dtype=torch.float64)],
        lambda images: PlainModel(config, torch.float64, labels)(images),
        _contenders(config, shape, dtype, labels, on_gpu),
        ("forward",),
        lambda direction: _work(config, shape, dtype, labels),
        gradients=False,
        input_dtype=torch.float32,
        model=True,
    )


def _contenders(
    config: Config, shape: tuple[int, ...], dtype: torch.dtype, labels: bool, on_gpu: bool
) -> tuple[Contender, ...]:
    """The fused model and the same weights elsewhere; on the CPU torch.compile in channels_last, where it is faster."""

    def fused() -> Callable[[Tensor], Tensor]:
        model = segnext.fuse(network(config), dtype)
        return model.predict if labels else model

    def pytorch(layout: str) -> nn.Module:
        return PlainModel(config, dtype, labels).to(
            memory_format=getattr(torch, layout.replace("contiguous", "contiguous_format"))
        )

    def compiled(model: nn.Module) -> Callable[[Tensor], Tensor]:
        return torch.compile(model, fullgraph=True, dynamic=False, options=None if on_gpu else FROZEN)

    ways = {
        "PyTorch": pytorch,
        "torch.compile": lambda layout: compiled(pytorch(layout)),
        "PyTorch, CUDA graph": lambda layout: Graphed(pytorch(layout)),
        "torch.compile, CUDA graph": lambda layout: Graphed(compiled(pytorch(layout))),
    }
    if on_gpu:
        ours = partial(FusedModel, config, dtype, labels)
        return (
            Contender("fused", None, ours, ours=True),
            Contender("fused, CUDA graph", None, lambda: Graphed(ours()), ours=True),
            Contender("fused torch.compile, CUDA graph", None, lambda: Graphed(compiled(ours())), ours=True),
            *(Contender(name, layout, partial(build, layout)) for name, build in ways.items() for layout in LAYOUTS),
        )
    return (
        Contender("fused", None, fused, ours=True),
        *(Contender("PyTorch", layout, partial(pytorch, layout)) for layout in LAYOUTS),
        Contender("torch.compile", "channels_last", partial(ways["torch.compile"], "channels_last")),
        *_runtimes(config, shape, dtype, labels),
    )


def _runtimes(config: Config, shape: tuple[int, ...], dtype: torch.dtype, labels: bool) -> list[Contender]:
    """What runs ONNX files, each with the file of the plain model and with the one that ``segnext export`` writes."""

    def file(own: bool) -> str:
        def program() -> ExportedProgram:
            if own:
                return exported.segnext_program(network(config), shape, labels)
            return exported.program(PlainModel(config, torch.float32, labels), shape)

        return exported.onnx_file((config, shape, labels, own), program)

    def in_onnx_runtime(own: bool) -> Callable[[Tensor], Tensor]:
        return onnx_runtime(file(own))

    def in_openvino(own: bool) -> Callable[[Tensor], Tensor]:
        return exported.openvino(file(own), dtype)

    runtimes = [("ONNX Runtime", in_onnx_runtime, ONNX_RUNTIME)] if dtype == torch.float32 else []
    runtimes.append(("OpenVINO", in_openvino, exported.OPENVINO))
    return [
        Contender(name + ending, None, partial(run, own), packages=packages)
        for name, run, packages in runtimes
        for ending, own in (("", False), (", exported by segnext", True))
    ]


@lru_cache
def complexity(config: Config, image_size: tuple[int, int], upsampled: bool) -> tuple[int, int]:
    """Parameters, and multiply-accumulates for one image."""
    with torch.device("meta"):
        found = count_model(SegNeXt(config), image_size, upsampled)
    return found.parameters, found.macs


def _work(config: Config, shape: tuple[int, ...], dtype: torch.dtype, labels: bool) -> Work:
    batch, channels, height, width = shape
    parameters, macs = complexity(config, (height, width), labels)
    logits = config.num_classes * -(-height // 8) * -(-width // 8) * dtype.itemsize
    output = 8 * height * width if labels else logits
    image = 4 * channels * height * width
    return Work(parameters * dtype.itemsize + batch * (image + output), 2 * batch * macs)
