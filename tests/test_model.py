"""SegNeXt against mmsegmentation's values, and in every size, head, layout and mode."""

from __future__ import annotations

import math
from dataclasses import replace

import golden
import pytest
import small
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import segnext
import segnext_kernels
from segnext.model import HEADS, SIZES, Config
from segnext.mscan import MSCAN, Block, DropPath

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)

# A batch norm takes away again what the bias of the convolution before it adds, so that its true gradient is zero.
ZERO_GRADIENTS = [f"backbone.patch_embed{part}.bias" for part in ("1.proj.0", "1.proj.3", "2.proj", "3.proj", "4.proj")]
# The terms of these sums over all pixels cancel to a hundredth of their size, but their rounding does not: plain PyTorch is off
# by 1.7e-5. With the compiled kernels for AVX-512 on a contiguous input they need no exception; with AVX2 PyTorch sums in
# another order, which comes to 1.4e-5.
STEM_NORM = ("backbone.patch_embed1.proj.1.weight", "backbone.patch_embed1.proj.1.bias")
STEM_NORM_TOLERANCE = {torch.float64: 1e-9, torch.float32: 3e-5}


def relative_error(found: Tensor, expected: Tensor, scale: Tensor | None = None) -> float:
    """The largest difference over the largest value of ``scale``, which is the expected one unless given."""
    scale = expected if scale is None else scale
    return ((found.double() - expected).abs().max() / scale.abs().max()).item()


@DTYPES
@LAYOUTS
def test_golden_evaluation(dtype, layout):
    model = golden.model(dtype).eval()
    images, bases = golden.inputs(dtype)
    images = images.contiguous(memory_format=layout)
    with torch.no_grad():
        found = {f"stage{i}": stage for i, stage in enumerate(model.backbone(images), 1)}
        found["logits"] = model(images, bases)
    for name, value in found.items():
        assert relative_error(value, golden.VALUES[f"eval/{name}"]) < TOLERANCE[dtype], name


@DTYPES
@LAYOUTS
def test_golden_training(dtype, layout):
    model, tolerance = golden.model(dtype), TOLERANCE[dtype]
    images, bases = golden.inputs(dtype)
    logits = model(images.contiguous(memory_format=layout), bases)
    loss = golden.loss(logits)
    loss.backward()
    assert relative_error(logits.detach(), golden.VALUES["train/logits"]) < tolerance
    assert relative_error(loss.detach(), golden.VALUES["train/loss"]) < tolerance
    expected = golden.gradients()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        scale = expected[name.replace("bias", "weight") if name in ZERO_GRADIENTS else name]
        exact = layout == torch.contiguous_format and (segnext_kernels.build_info()["isa"] or "").startswith(("avx512", "amx"))
        limit = STEM_NORM_TOLERANCE[dtype] if name in STEM_NORM and not exact else tolerance
        assert relative_error(gradient, expected[name], scale) < limit, name


@DTYPES
def test_golden_adamw(dtype):
    model = golden.model(dtype)
    images, bases = golden.inputs(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    losses = []
    for _ in golden.VALUES["train/adamw_losses"]:
        loss = golden.loss(model(images, bases))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    assert relative_error(torch.stack(losses), golden.VALUES["train/adamw_losses"]) < TOLERANCE[dtype]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("size", SIZES)
def test_create(size, head):
    with torch.device("meta"):
        model = segnext.create(size, num_classes=19, head=head, in_channels=4, rank=8, gradient="one_step", eval_steps=4)
    expected, given = SIZES[size], {"in_channels": 4, "rank": 8, "gradient": "one_step", "eval_steps": 4}
    assert model.training and model.config == replace(expected, num_classes=19, head=head, **given)
    assert model.backbone.patch_embed1.proj[0].in_channels == 4
    for i, (dim, depth, ratio) in enumerate(zip(expected.channels, expected.depths, expected.mlp_ratios, strict=True), 1):
        blocks = getattr(model.backbone, f"block{i}")
        assert len(blocks) == depth
        assert all(block.mlp.fc1.out_channels == ratio * dim and block.norm1.num_features == dim for block in blocks)
    assert model.decode_head.squeeze.conv.in_channels == sum(expected.channels[1:])
    assert model.decode_head.conv_seg.weight.shape == (19, expected.decoder_channels, 1, 1)
    if head == "ham":
        ham = model.decode_head.hamburger.ham
        assert (ham.rank, ham.gradient, ham.eval_steps) == (8, "one_step", 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": "xl"}, "no size 'xl'.*t, s, b, l"),
        ({"size": "t", "head": "fcn"}, "head must be one of ham, msca, got 'fcn'"),
        ({"size": "t", "num_classes": 0}, "num_classes must be a whole number of at least 1, got 0"),
        ({"size": "t", "in_channels": 0}, "in_channels must be a whole number of at least 1, got 0"),
        ({"size": "t", "rank": 0}, "rank must be a whole number of at least 1, got 0"),
        ({"size": "t", "rank": 2.5}, "rank must be a whole number of at least 1, got 2.5"),
        ({"size": "t", "drop_path": 1.0}, r"drop_path must be a number in \[0, 1\), got 1.0"),
        ({"size": "t", "dropout": -0.1}, r"dropout must be a number in \[0, 1\), got -0.1"),
        ({"size": "t", "bases": "none"}, "bases must be one of fixed, random, got 'none'"),
        ({"size": "t", "gradient": "none"}, "gradient must be one of exact, one_step, got 'none'"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_create_refuses(arguments, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        segnext.create(**arguments)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("image", [(1, 1), (1, 37), (41, 1), (33, 65), (63, 97)], ids=lambda image: "x".join(map(str, image)))
def test_image_sizes(image, head):
    height, width = image
    model, images = small.model(head=head), torch.randn(2, 3, height, width)
    with torch.no_grad():
        stages, logits = model.backbone(images), model(images)
    assert [tuple(stage.shape) for stage in stages] == [
        (2, channels, math.ceil(height / stride), math.ceil(width / stride))
        for channels, stride in zip(small.CONFIG.channels, (4, 8, 16, 32), strict=True)
    ]
    assert logits.shape == (2, 7, math.ceil(height / 8), math.ceil(width / 8))
    labels = model.predict(images)
    upsampled = F.interpolate(logits, image, mode="bilinear", align_corners=False)
    assert labels.shape == (2, height, width) and labels.dtype == torch.int64
    assert (upsampled.amax(1) - upsampled.gather(1, labels[:, None])[:, 0]).max() < 1e-6 * upsampled.abs().max()


@pytest.mark.parametrize("channels", [1, 4])
def test_in_channels(channels):
    model = small.model(in_channels=channels)
    assert model(torch.randn(1, channels, 40, 56)).shape == (1, 7, 5, 7)


@pytest.mark.parametrize("head", HEADS)
def test_images_of_a_batch_are_independent(head):
    model, images = small.model(head=head).double(), torch.randn(3, 3, 45, 50, dtype=torch.float64)
    with torch.no_grad():
        together, alone = model(images), torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-12)


@LAYOUTS
@pytest.mark.parametrize("head", HEADS)
def test_layout_is_kept(layout, head):
    model, images = small.model(head=head), torch.randn(2, 3, 70, 90).contiguous(memory_format=layout)
    seen = []
    for module in model.backbone.modules():
        if not isinstance(module, (MSCAN, nn.ModuleList)):
            module.register_forward_hook(lambda module, args, out: seen.append((type(module).__name__, out)))
    with torch.no_grad():
        seen.append(("logits", model(images)))
    assert [name for name, value in seen if not value.is_contiguous(memory_format=layout)] == []


@pytest.mark.parametrize("head", HEADS)
def test_evaluation_is_deterministic(head):
    model, images = small.model(head=head), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        first = model(images)
        torch.manual_seed(1)
        assert torch.equal(first, model(images))
    assert torch.equal(model.predict(images), model.predict(images))


def test_random_bases_differ_from_call_to_call():
    model, images = small.model(bases="random"), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert not torch.equal(model(images), model(images))


def test_msca_head_takes_no_bases():
    with pytest.raises(ValueError, match="takes no bases"):
        small.model(head="msca")(torch.randn(1, 3, 32, 32), torch.rand(1, 64, 16))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_bfloat16_autocast(head, mode):
    model, images = small.model(head=head, dropout=0.0, drop_path=0.0), torch.randn(2, 3, 64, 64)
    model.train(mode == "train")
    bases = (torch.rand(2, 64, 16),) if head == "ham" else ()
    expected = model(images, *bases)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(images, *bases)
    found.float().square().sum().backward()
    assert found.dtype == torch.bfloat16
    assert relative_error(found.detach(), expected.detach().double()) < 0.05
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_whole_model_in_another_dtype(head, dtype):
    model, images = small.model(head=head), torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        expected, found = model(images), model.to(dtype)(images.to(dtype))
    assert found.dtype == dtype
    assert relative_error(found, expected.double()) < (0.05 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("head", HEADS)
def test_compile_evaluation_with_dynamic_sizes(head):
    model = small.model(head=head, depths=(1, 1, 1, 1))
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for size in [(48, 64), (75, 50)]:
            images = torch.randn(2, 3, *size)
            torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-6)


def test_compile_training():
    model = small.model(depths=(1, 1, 1, 1), drop_path=0.5).train()
    results = []
    for function in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)  # of the images, the bases, the dropped paths and channels
        logits = function(torch.randn(2, 3, 48, 64))
        results.append((logits, *torch.autograd.grad(logits.square().sum(), list(model.parameters()))))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("create", [segnext.create, segnext.encoder])
def test_stochastic_depth_grows_linearly(size, create):
    with torch.device("meta"):
        model = create(size)
    found = [module.p for module in model.modules() if isinstance(module, DropPath)]
    last = 0.3 if size == "l" else 0.1
    assert found == pytest.approx(torch.linspace(0, last, sum(SIZES[size].depths)).tolist())


def test_stochastic_depth_drops_whole_images_and_keeps_the_mean():
    torch.manual_seed(0)
    drop, x = DropPath(0.25), torch.ones(4000, 2, 3, 1)
    y = drop(x)
    assert torch.equal(y, y[:, :1, :1].expand_as(y))
    assert torch.equal(y.unique(), torch.tensor([0.0, 1 / 0.75]))
    assert y.mean().item() == pytest.approx(1, abs=0.03)
    assert drop.eval()(x) is x
    block, images = Block(8, 2, 0.5).train(), torch.randn(64, 8, 3, 3)
    unchanged = (block(images) == images).flatten(1).all(1)
    assert 0 < unchanged.sum() < 64


def test_stochastic_depth_can_be_replaced():
    block, x = Block(8, 2, 0.0).train(), torch.randn(2, 8, 3, 3)
    expected = block(x)
    block.drop_path = nn.Identity()
    torch.testing.assert_close(block(x), expected)
    block.drop_path = nn.Dropout(1.0)
    assert torch.equal(block(x), x)


def test_initialisation_is_the_official_one():
    torch.manual_seed(0)
    model = segnext.create("t")
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
            expected = 0.01 if name == "decode_head.conv_seg" else math.sqrt(2 / fan_out)
            noise = 5 / math.sqrt(2 * module.weight.numel())  # five standard errors
            assert module.weight.std().item() == pytest.approx(expected, rel=noise), name
            assert module.bias is None or not module.bias.any()
        if name.endswith(("norm1", "norm2", ".gn")):
            assert (module.weight == 1).all() and not module.bias.any()
    assert all((value == 1e-2).all() for name, value in model.named_parameters() if "layer_scale" in name)
    assert model.decode_head.dropout.p == 0.1 and isinstance(model.decode_head.dropout, nn.Dropout2d)


def test_encoder_alone():
    encoder = segnext.encoder("t", in_channels=1).eval()
    with torch.no_grad():
        maps = encoder(torch.randn(1, 1, 50, 70))
    assert [tuple(m.shape) for m in maps] == [(1, 32, 13, 18), (1, 64, 7, 9), (1, 160, 4, 5), (1, 256, 2, 3)]
    with pytest.raises(ValueError, match="no size 'tiny'"):
        segnext.encoder("tiny")


def test_config_is_frozen():
    with pytest.raises(AttributeError):
        Config((8, 16, 40, 64), (1, 1, 2, 1)).rank = 4


def test_predict_refuses_a_model_in_training_mode():
    """Whose norms would learn from the images."""
    with pytest.raises(RuntimeError, match=r"predict: the model is in training mode, call its eval\(\) first"):
        small.model().train().predict(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("grad", [False, True])
def test_flops_can_be_counted_by_torch(grad):
    with torch.set_grad_enabled(grad), FlopCounterMode(display=False) as counter:
        small.model()(torch.rand(1, 3, 64, 64))
    assert counter.get_total_flops() > 0
