"""The order in which the decode heads compute, and when they keep to the official code's."""

from __future__ import annotations

import copy

import pytest
import small
import torch
from operators import error
from torch import nn

import segnext
from segnext.heads import in_published_order
from segnext.model import HEADS
from segnext.mscan import DropPath


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_order_of_the_official_code(head, layout):
    """The heads convolve before they resize, and bases instead of pixels: the same values and gradients."""
    model = small.model(head=head).double().train()
    model.apply(lambda module: setattr(module, "p", 0.0) if isinstance(module, (nn.Dropout2d, DropPath)) else None)
    images = torch.randn(2, 3, 70, 97, dtype=torch.float64).contiguous(memory_format=layout)
    bases = torch.rand(2, model.config.decoder_channels, model.config.rank, dtype=torch.float64) if head == "ham" else None
    answers = []
    for network in (model, in_published_order(copy.deepcopy(model))):
        logits = network(images, bases)
        logits.square().mean().backward()
        answers.append([logits.detach(), *(parameter.grad for parameter in network.parameters())])
    for found, expected in zip(*answers, strict=True):
        assert (found - expected).abs().max() <= 1e-9 * max(expected.abs().max(), 1e-6)


LAYERS = ("squeeze", "squeeze.conv", "hamburger.ham", "hamburger.ham_out", "hamburger.ham_out.conv")


def touch(module: nn.Module, way: str, calls: list[str]) -> None:
    """Has ``calls`` grow by one whenever a module is called."""
    if way == "hook":
        module.register_forward_hook(lambda *args: calls.append(way))
    else:
        forward = module.forward
        module.forward = lambda *args: calls.append(way) or forward(*args)


@pytest.mark.parametrize("way", ["hook", "forward"])
@pytest.mark.parametrize("layer", LAYERS)
def test_layers_of_the_heads_that_are_watched_are_called(layer, way):
    """Where more than a convolution is meant, its module is called, as in the official code."""
    model, images, calls = small.model().eval(), torch.randn(1, 3, 70, 97), []
    with torch.no_grad():
        expected = model(images)
        touch(model.decode_head.get_submodule(layer), way, calls)
        assert error(model(images), expected) < 1e-5
    assert calls == [way]


@pytest.mark.parametrize("layer", ["squeeze", "hamburger.ham_out"])
def test_other_convolutions_in_the_heads_are_taken_as_they_are(layer):
    model, images = small.model().eval(), torch.randn(1, 3, 70, 97)
    layers = model.decode_head.get_submodule(layer)
    weight, outputs = layers.conv.weight, layers.conv.out_channels
    layers.conv = nn.Conv2d(layers.conv.in_channels, outputs, 1)
    layers.conv.weight = weight
    with torch.no_grad():
        layers.conv.bias.normal_()
        found, expected = model(images), in_published_order(copy.deepcopy(model))(images)
        assert error(found, expected) < 1e-5
        if layer == "squeeze":
            assert error(segnext.fuse(model)(images), expected) < 1e-5
        else:
            with pytest.raises(
                TypeError, match="fuse: the Hamburger must have an NMF2D and, in ham_out, a convolution without"
            ):
                segnext.fuse(model)
