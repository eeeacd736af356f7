"""Cases of one training step: forward, loss, backward and the optimizer's step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segnext.graphed import Graphed
from segnext.model import Config
from segnext_kernels import upsample_cross_entropy

from . import plain
from .case import LAYOUTS, Case, Contender, Work, generator, image_shape
from .models import complexity, network

Loss = Callable[[Tensor, Tensor], Tensor]
COMPILED = {"torch.compile": "network", "torch.compile with the loss": "forward"}  # by the contender's name, see Step


def training_case(
    name: str, config: Config, image_size: tuple[int, int], dtype: torch.dtype, batch: int, on_gpu: bool = False
) -> Case:
    """A step of AdamW on [batch, 3, *image_size], in float32 or under bfloat16 autocast.

    The results are the loss and the gradient of the first convolution, to which all the rest contributes. Nothing is dropped
    and the decomposition's bases are given, so that every contender computes the same.
    """
    config = replace(config, dropout=0.0, drop_path=0.0)
    target_shape = (batch, *image_size)

    def setup() -> list[Tensor]:
        draw = generator()
        images = torch.randn(batch, config.in_channels, *image_size, generator=draw, dtype=torch.float64)
        bases = torch.rand(batch, config.decoder_channels, config.rank, generator=draw, dtype=torch.float64)
        target = torch.randint(config.num_classes, target_shape, generator=draw)
        return [images, F.normalize(bases, dim=1), torch.where(target == 0, 255, target)]

    def reference(images: Tensor, bases: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        model = plain.network(network(config)).double().train()
        with torch.enable_grad():
            loss = plain.upsample_cross_entropy(model(images, bases), target)
        return loss.detach(), *torch.autograd.grad(loss, first_weight(model))

    def fused(**options) -> Step:
        return Step(copy.deepcopy(network(config)), upsample_cross_entropy, dtype, "channels_last", **options)

    def pytorch(layout: str, **options) -> Step:
        return Step(plain.network(network(config)), plain.upsample_cross_entropy, dtype, layout, **options)

    def compilations(ending: str = "", **options) -> list[Contender]:
        return [
            Contender(name + ending, layout, partial(pytorch, layout, compiled=what, **options))
            for name, what in COMPILED.items()
            for layout in (LAYOUTS if on_gpu else ("channels_last",))
        ]

    graphs = ()
    if on_gpu:
        graphs = (
            Contender("fused, CUDA graph", "channels_last", partial(fused, graphed=True), ours=True),
            Contender(
                "fused torch.compile, CUDA graph", "channels_last", partial(fused, compiled="network", graphed=True), ours=True
            ),
            *(Contender("PyTorch, CUDA graph", layout, partial(pytorch, layout, graphed=True)) for layout in LAYOUTS),
            *compilations(", CUDA graph", graphed=True),
        )

    return Case(
        name,
        image_shape(batch, *image_size),
        dtype,
        setup,
        reference,
        (
            Contender("fused", "channels_last", fused, ours=True),
            Contender("fused torch.compile", "channels_last", partial(fused, compiled="network"), ours=True),
            *(Contender("PyTorch", layout, partial(pytorch, layout)) for layout in LAYOUTS),
            *compilations(),
            *graphs,
        ),
        ("step",),
        lambda direction: _work(config, image_size, batch),
        gradients=False,
        input_dtype=torch.float32,
        model=True,
    )


class Step:
    """A model in training with its loss and optimizer, ready to be called with images, bases and target.

    Compiled can be the "network", as in segnext train, or all of "forward", the loss too; on a GPU forward and backward can be
    one CUDA graph.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        dtype: torch.dtype,
        layout: str,
        *,
        compiled: str | None = None,
        graphed: bool = False,
    ) -> None:
        self.model, self.graphed = model.train(), graphed
        if layout == "channels_last":
            self.model.to(memory_format=torch.channels_last)
        self.loss, self.autocast = loss, dtype == torch.bfloat16
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=6e-5, fused=True)
        self.network = torch.compile(self.model, dynamic=False) if compiled == "network" else self.model
        self.forward = torch.compile(self._forward, dynamic=False) if compiled == "forward" else self._forward
        self.add_gradients = Graphed(self._add_gradients, self.model) if graphed else self._add_gradients

    def _forward(self, images: Tensor, bases: Tensor, target: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.autocast):
            return self.loss(self.network(images, bases), target)

    def _add_gradients(self, images: Tensor, bases: Tensor, target: Tensor) -> Tensor:
        loss = self.forward(images, bases, target)
        loss.backward()
        return loss.detach()

    def __call__(self, images: Tensor, bases: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        self.optimizer.zero_grad(set_to_none=not self.graphed)
        loss = self.add_gradients(images, bases, target)
        self.optimizer.step()
        return loss, first_weight(self.model).grad


def first_weight(model: nn.Module) -> nn.Parameter:
    return next(model.parameters())


def _work(config: Config, image_size: tuple[int, int], batch: int) -> Work:
    """Forward and twice that for backward; weights and both moments are read and written."""
    parameters, macs = complexity(config, image_size, upsampled=True)
    pixels = batch * image_size[0] * image_size[1]
    return Work(6 * 4 * parameters + pixels * (4 * config.in_channels + 8), 6 * batch * macs)
