"""The fused model has the outputs of the model that it was made from."""

from __future__ import annotations

import re

import golden
import pytest
import small
import torch
from operators import error
from torch import nn

import segnext
from segnext import distributed
from segnext.data import Scenes
from segnext.images import normalise
from segnext.loop import fit
from segnext.mscan import Block
from segnext.recipes import Recipe

HEADS = ("ham", "msca")
SCENE = (64, 96)


def harsh(head: str = "ham", **changes) -> nn.Module:
    """A small model whose norms and scales are far from the identity."""
    model = small.model(head=head, **changes)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
        if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            module.eps = 1e-2
    for name, parameter in model.named_parameters():
        if "layer_scale" in name:
            nn.init.normal_(parameter, std=0.5)
    return model


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("size", [(64, 96), (33, 71), (1, 1), (130, 37)], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_float32_agrees_with_the_model(head, size, layout):
    model, images = harsh(head), torch.randn(2, 3, *size).contiguous(memory_format=layout)
    fused = segnext.fuse(model)
    want = model.double()(images.double())
    assert error(fused(images), want) < 1e-5


def test_golden_logits():
    images, bases = golden.inputs(torch.float32)
    fused = segnext.fuse(golden.model(torch.float32).eval())
    want = golden.model().eval()(*golden.inputs())
    assert error(fused(images, bases), want) < 1e-5


def test_random_bases_are_drawn_as_the_models_at_every_call():
    model, images = harsh(bases="random"), torch.randn(2, 3, 64, 96)
    fused, logits = segnext.fuse(model), []
    for network in (model, fused):
        torch.manual_seed(1)
        logits.append(network(images))
    assert error(logits[1], logits[0]) < 1e-5
    assert not torch.equal(fused(images), logits[1])


@pytest.fixture(scope="module", params=HEADS)
def trained(request):
    """A small model after a hundred steps on drawn scenes, and scenes that it has not seen."""
    # of a rank at which bfloat16 has products of its own in the decomposition
    model, held_out = small.model(head=request.param, num_classes=10, rank=32, drop_path=0.0), Scenes(16, SCENE, seed=1)
    fit(model, Scenes(64, SCENE), Recipe(iterations=100, lr=5e-3, head_lr=1.0, batch=8, warmup=0.05))
    return model, normalise(torch.stack([image for image, _ in held_out]))


def test_bfloat16_is_close_on_a_trained_model(trained):
    model, images = trained
    fused = segnext.fuse(model, torch.bfloat16)
    logits = fused(images)
    assert logits.dtype == torch.bfloat16
    assert error(logits, model(images)) < 2e-2
    assert (fused.predict(images) == model.predict(images)).float().mean() > 0.995


def test_labels_are_those_of_the_model(trained):
    model, images = trained
    assert model.predict(images).unique().numel() > 3
    assert (segnext.fuse(model).predict(images) == model.predict(images)).float().mean() > 0.9999


def test_the_model_is_left_as_it_is():
    model = harsh().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fused = segnext.fuse(model)
    assert model.training and all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for parameter in model.parameters():
        parameter.fill_(torch.nan)
    assert torch.isfinite(fused(torch.randn(1, 3, 32, 32))).all()


def test_saved_and_loaded(tmp_path):
    first, second, images = segnext.fuse(harsh()), segnext.fuse(harsh(), torch.float32), torch.randn(1, 3, 32, 32)
    torch.save(first.state_dict(), tmp_path / "fused.pt")
    for parameter in second.parameters():
        parameter.zero_()
    second.load_state_dict(torch.load(tmp_path / "fused.pt"))
    assert torch.equal(first(images), second(images))


def test_other_classes_sizes_and_odd_channels():
    for changes in ({"num_classes": 1}, {"in_channels": 4, "channels": (9, 15, 33, 50)}, {"decoder_channels": 96}):
        model = harsh(**changes)
        images = torch.randn(1, changes.get("in_channels", 3), 65, 40)
        assert error(segnext.fuse(model)(images), model(images)) < 1e-5
        model = small.model(**changes)
        assert error(segnext.fuse(model, torch.bfloat16)(images), model(images)) < 2e-2


def test_errors():
    with pytest.raises(TypeError, match="dtype must be float32 or bfloat16"):
        segnext.fuse(harsh(), torch.float16)
    with pytest.raises(TypeError, match="must be a SegNeXt, got Linear"):
        segnext.fuse(nn.Linear(1, 1))
    with pytest.raises(RuntimeError, match="serves inference"):
        segnext.fuse(harsh()).train()
    with pytest.raises(ValueError, match="takes no bases"):
        segnext.fuse(harsh("msca"))(torch.randn(1, 3, 32, 32), torch.rand(1, 64, 16))


def dilate(model: nn.Module) -> None:
    old = model.backbone.patch_embed2.proj
    model.backbone.patch_embed2.proj = nn.Conv2d(old.in_channels, old.out_channels, 3, stride=2, padding=2, dilation=2)


def other_activation(model: nn.Module) -> None:
    model.backbone.patch_embed1.proj[2] = nn.GELU(approximate="tanh")


def in_two_groups(model: nn.Module) -> None:
    conv0 = model.backbone.block1[0].attn.spatial_gating_unit.conv0
    conv0.groups, conv0.weight = 2, nn.Parameter(conv0.weight.repeat(1, conv0.in_channels // 2, 1, 1))


CUSTOMISED = {
    "no bias": (lambda model: setattr(model.backbone.block1[0].mlp.dwconv.dwconv, "bias", None), r"dwconv\.dwconv: Conv2d\("),
    "groups": (in_two_groups, r"conv0: Conv2d\("),
    "no scale": (lambda model: setattr(model.backbone.block1[0], "layer_scale_1", None), r"block1\.0: Block\("),
    "no affine": (lambda model: setattr(model.decode_head.squeeze, "gn", nn.GroupNorm(32, 64, affine=False)), "gn: GroupNorm"),
    "no statistics": (lambda model: setattr(model.backbone.block1[0].norm1, "running_mean", None), r"norm1: BatchNorm2d"),
    "padding": (lambda model: setattr(model.backbone.patch_embed1.proj[0], "padding_mode", "reflect"), "padding_mode=reflect"),
    "dilation": (dilate, r"backbone\.patch_embed2\.proj: Conv2d\(.*dilation=\(2, 2\)"),
    "activation": (other_activation, r"backbone\.patch_embed1\.proj\.2: GELU\(approximate='tanh'\)"),
    "hook": (lambda model: model.backbone.block1[0].mlp.fc1.register_forward_hook(print), "block1.0.mlp.fc1: Pointwise"),
    "wrapped": (lambda model: setattr(model.backbone, "norm2", nn.Sequential(model.backbone.norm2)), "backbone.norm2: Seq"),
    "added": (lambda model: model.backbone.patch_embed2.add_module("more", nn.ReLU()), r"patch_embed2\.more: ReLU\(\)"),
    "removed": (lambda model: setattr(model.backbone.block2[0], "norm1", None), "no backbone.block2.0.norm1"),
    "parametrized": (lambda model: nn.utils.parametrizations.weight_norm(model.decode_head.conv_seg), "conv_seg: Param"),
    "forward": (lambda model: setattr(model, "forward", model.forward), "the model: SegNeXt"),
}


@pytest.mark.parametrize("change, message", CUSTOMISED.values(), ids=CUSTOMISED)
def test_what_a_fused_model_would_not_heed_is_refused(change, message):
    model = harsh()
    change(model)
    with pytest.raises(TypeError, match=f"^fuse: the model has .*{message}"):
        segnext.fuse(model)


def test_what_changes_nothing_in_evaluation_is_taken(monkeypatch):
    model, images = harsh(), torch.randn(1, 3, 65, 40)
    model.decode_head.dropout = nn.Identity()
    model.decode_head.squeeze.gn.register_buffer("seen", torch.zeros(1))
    model.backbone.block3.append(Block(40, 4, 0.0))
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "world_size", lambda: 2)
        distributed.synchronise_norms(model)
    assert error(segnext.fuse(model)(images), model.eval()(images)) < 1e-5


@pytest.mark.parametrize("convert", [nn.Module.half, nn.Module.double, nn.Module.bfloat16], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_fused_model_keeps_its_dtype(dtype, convert):
    fused, images = segnext.fuse(harsh(), dtype), torch.randn(1, 3, 32, 32)
    expected = fused(images)
    with pytest.raises(TypeError, match="keeps its dtype; fuse the model again"):
        convert(fused)
    with torch.device("meta"):  # where no tensor of the model is
        fused.to("cpu")
    assert torch.equal(fused(images), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_weights_keep_their_order(dtype):
    """Else every call would copy them."""
    fused = segnext.fuse(harsh(), dtype).to(memory_format=torch.channels_last)
    assert all(tensor.is_contiguous() for tensor in fused.state_dict().values())


def test_a_fused_model_prints_what_it_is():
    assert str(segnext.fuse(small.model().eval())).startswith("FusedSegNeXt(Config(channels=")


@pytest.mark.parametrize("prepare", [lambda model: model, segnext.fuse], ids=["plain", "fused"])
def test_what_is_no_batch_of_normalised_images_is_refused(prepare):
    model = prepare(small.model().eval())
    with pytest.raises(TypeError, match="normalised images of a floating-point dtype, got torch.uint8"):
        model(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    for shape in ((3, 32, 32), (1, 4, 32, 32)):
        with pytest.raises(ValueError, match=rf"takes images \[B, 3, H, W\], got shape {re.escape(str(list(shape)))}"):
            model(torch.zeros(shape))


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}])
def test_norms_of_other_kinds_are_refused(options):
    model = small.model().eval()
    model.backbone.block1[0].norm1 = torch.nn.BatchNorm2d(model.config.channels[0], **options).eval()
    with pytest.raises(TypeError, match=r"block1\.0\.norm1: BatchNorm2d"):
        segnext.fuse(model)
