"""Whole models on a GPU, beside test_gpu.py: ``make gpu-test``."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import pytest
import small
import torch
from operators import assert_same, error
from torch import nn

import segnext
from segnext.data import Scenes
from segnext.fuse import inference_model
from segnext.graphed import Graphed
from segnext.recipes import Recipe
from segnext.trainer import Trainer
from segnext_kernels import upsample_cross_entropy

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def exact_convolutions() -> Iterator[None]:
    """PyTorch's own are made in TF32 unless told."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return segnext.create("t", num_classes=19).eval()


def test_a_model_says_on_the_gpu_what_it_says_on_the_cpu(network, exact_convolutions):
    images = torch.randn(2, 3, 128, 160)
    on_gpu = copy.deepcopy(network).to("cuda", memory_format=torch.channels_last)
    with torch.inference_mode():
        logits = network(images)
        got = on_gpu(images.cuda())
        assert error(got.cpu(), logits) < 1e-4
        labels = on_gpu.predict(images.cuda()).cpu()
    assert (labels == network.predict(images)).float().mean() > 0.999


def test_a_captured_model(network):
    """A CUDA graph of a whole model: nothing in it waits for the GPU, or reads what only the CPU has."""
    model = copy.deepcopy(network).to("cuda", torch.bfloat16, memory_format=torch.channels_last)
    images = torch.randn(2, 1, 3, 128, 160, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        captured = Graphed(model)
        for image in images:
            assert_same([captured(image)], [model(image)])


def test_training_on_the_gpu_is_training_on_the_cpu(network, exact_convolutions):
    """A step's loss and the gradient of the first convolution, to which all the others contribute."""
    images, target = torch.randn(2, 3, 96, 128), torch.randint(0, 19, (2, 96, 128))
    found = {}
    for device in ("cpu", "cuda"):
        model = copy.deepcopy(network).to(device, memory_format=torch.channels_last)
        loss = upsample_cross_entropy(model(images.to(device)), target.to(device))
        loss.backward()
        found[device] = loss.detach().cpu(), next(model.parameters()).grad.cpu()
    for got, want in zip(found["cuda"], found["cpu"], strict=True):
        assert error(got, want) < 1e-3


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-3), ("bfloat16", 2e-2), ("float16", 1e-2)])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_training_in_a_graph_goes_as_without(precision, tolerance, accumulate, exact_convolutions):
    """The same losses, with all that is random, from a data loader that pins memory meanwhile; the same statistics."""
    recipe = Recipe(iterations=6, batch=4, lr=1e-3, warmup=0, precision=precision)
    found = []
    for cuda_graph in (False, True):
        model = small.model(num_classes=10, dropout=0.3, drop_path=0.3, bases="random").cuda()
        options = {"accumulate": accumulate, "workers": 1, "cuda_graph": cuda_graph}
        loop, losses = Trainer(model, Scenes(8, (64, 96)), recipe, **options), []
        for step in loop.steps():
            inference_model(model.eval(), loop.device)  # as an evaluation does, which moves gradients
            losses.append(step.loss)
        losses = torch.tensor(losses)
        found.append((losses, model.backbone.patch_embed1.proj[1].running_var.clone()))
        assert loop.graphed == cuda_graph and model.backbone.patch_embed1.proj[1].num_batches_tracked == 6 * accumulate
    for got, want in zip(found[1], found[0], strict=True):
        assert error(got, want) < tolerance


def test_a_compiled_training_in_a_graph(exact_convolutions):
    """Without bases, dropout and stochastic depth, for which compiled code draws other numbers."""
    recipe = Recipe(iterations=3, batch=4, lr=1e-3, warmup=0, precision="float32")
    losses = []
    for both in (False, True):
        model = small.model(num_classes=10, head="msca", dropout=0.0, drop_path=0.0).cuda()
        loop = Trainer(model, Scenes(8, (64, 96)), replace(recipe, compile=both), cuda_graph=both)
        losses.append(torch.tensor([step.loss for step in loop.steps()]))
    assert error(losses[1], losses[0]) < 1e-3
