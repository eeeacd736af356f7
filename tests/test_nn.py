"""The modules: the official parameter names, layouts, and the bases that NMF2D starts from."""

from __future__ import annotations

import itertools
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from operators import arrange, error, golden, image_layouts, nmf_sample, normal, tolerance
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import prune

import segnext_kernels.nn
from segnext_kernels import nmf
from segnext_kernels.nn import NMF2D, AttentionModule, DWConvGELU, PointwiseConv2d, _is_matrix_on_gpu, fixed_uniform

ATTENTION = ["conv0", "conv0_1", "conv0_2", "conv1_1", "conv1_2", "conv2_1", "conv2_2", "conv3"]


def images(*shape: int, seed: int = 3) -> torch.Tensor:
    return normal(shape, torch.Generator().manual_seed(seed)).float().relu_()


def test_official_names():
    names = [f"{convolution}.{kind}" for convolution in ATTENTION for kind in ("weight", "bias")]
    assert list(AttentionModule(6).state_dict()) == names
    assert list(DWConvGELU(6).state_dict()) == ["dwconv.weight", "dwconv.bias"]
    assert list(NMF2D(16).state_dict()) == []


def test_official_shapes():
    shapes = {name: list(tensor.shape) for name, tensor in AttentionModule(6).state_dict().items() if "weight" in name}
    assert list(shapes.values()) == [
        [6, 1, 5, 5],
        *([6, 1, *size] for k in (7, 11, 21) for size in ((1, k), (k, 1))),
        [6, 6, 1, 1],
    ]
    assert list(DWConvGELU(6).dwconv.weight.shape) == [6, 1, 3, 3]


@image_layouts
def test_dwconv_gelu_is_the_mlps_middle(layout):
    module = DWConvGELU(17).double()
    plain = nn.Sequential(nn.Conv2d(17, 17, 3, padding=1, groups=17), nn.GELU()).double()
    plain[0].load_state_dict(module.dwconv.state_dict())
    x = arrange(images(2, 17, 9, 11).double(), layout)
    assert error(module(x), plain(x)) <= tolerance(torch.float64)


@image_layouts
@pytest.mark.parametrize("case", ["r3", "r16", "r64"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("gradient", ["exact", "one_step"])
def test_nmf2d_golden(case, training, gradient, layout):
    values = golden(f"nmf/{case}/")
    batch, rows, columns = values["x"].shape
    height = next(h for h in (5, 10, 11) if columns % h == 0)
    steps = int(values["steps"])
    module = NMF2D(values["bases0"].shape[2], steps, steps, gradient=gradient).train(training)
    x = arrange(values["x"].view(batch, rows, height, -1), layout).requires_grad_()
    y = module(x, values["bases0"])
    y.backward(values["grad_out"].view_as(x))
    assert error(y.detach().flatten(2), values["y"]) <= 1e-9
    assert error(x.grad.flatten(2), values[f"grad_x_{gradient}"]) <= 1e-9


@pytest.mark.parametrize("make", [AttentionModule, DWConvGELU, lambda dim: NMF2D(4)], ids=["attention", "dwconv_gelu", "nmf2d"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_channels_last_stays(make, training):
    module, x = make(17).train(training), images(2, 17, 9, 11)
    y = module(x.to(memory_format=torch.channels_last))
    assert y.shape == x.shape
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert module(x).is_contiguous()


@image_layouts
def test_one_pixel_and_sliced_images(layout):
    module = NMF2D(4).eval()
    for x in (images(2, 17, 1, 1), images(2, 17, 1, 9), images(2, 17, 9, 1)):
        x = arrange(x, layout)
        assert error(module(x), module(x.contiguous())) <= tolerance(x.dtype)
    x = arrange(images(2, 17, 9, 22), layout)[..., ::2]
    assert error(module(x), module(x.contiguous())) <= tolerance(x.dtype)


def test_evaluation_is_deterministic():
    x, module = images(2, 17, 9, 11), NMF2D(4).eval()
    y = module(x)
    torch.manual_seed(1)
    assert torch.equal(module(x), y)
    assert torch.equal(NMF2D(4).eval()(x), y)
    state = torch.get_rng_state()
    module(x)
    assert torch.equal(torch.get_rng_state(), state)


def test_evaluation_does_not_depend_on_the_batch():
    x, module = images(3, 17, 9, 11), NMF2D(4).eval()
    assert error(module(x[1:2]), module(x)[1:2]) <= 1e-6
    assert torch.equal(module.initial_bases(x)[0], module.initial_bases(x)[2])


def test_seed_chooses_the_bases():
    x = images(1, 17, 9, 11)
    bases = [NMF2D(4, seed=seed).eval().initial_bases(x) for seed in (0, 0, 1, -1, 2**31)]
    assert torch.equal(bases[0], bases[1])
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(bases[1:], 2))


@pytest.mark.parametrize("bases", ["fixed", "random"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_bases_are_unit_columns(bases, dtype):
    drawn = NMF2D(64, bases=bases).eval().initial_bases(images(2, 512, 2, 2).to(dtype))
    assert drawn.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert drawn.shape == (2, 512, 64)
    torch.testing.assert_close(drawn.norm(dim=1), torch.ones(2, 64, dtype=drawn.dtype), rtol=1e-6, atol=0)
    uniform = drawn[0] / drawn[0].amax(0)  # numbers uniform in [0, 1), up to one factor a column
    assert drawn.min() >= 0
    assert abs(uniform.mean() - 0.5) < 0.02
    assert abs(uniform.std() - 12**-0.5) < 0.02
    correlation = torch.corrcoef(drawn[0].T) - torch.eye(64, dtype=drawn.dtype)
    assert correlation.abs().max() < 0.25


def test_random_bases_are_random():
    x, module = images(2, 17, 9, 11), NMF2D(4, bases="random").eval()
    assert not torch.equal(module(x), module(x))
    drawn = module.initial_bases(x)
    assert not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize("bases", ["fixed", "random"])
def test_training_draws_anew(bases):
    x, module = images(2, 17, 9, 11), NMF2D(4, bases=bases).train()
    assert not torch.equal(module(x), module(x))
    torch.manual_seed(5)
    first = module(x)
    torch.manual_seed(5)
    assert torch.equal(module(x), first)


def test_fixed_bases_are_those_of_every_release():
    """What a model says of a photograph depends on these bits."""
    drawn = {seed: (fixed_uniform(6, seed, torch.device("cpu")) * 2**24).long().tolist() for seed in (0, 7)}
    assert drawn == {
        0: [0, 8835834, 894964, 15560222, 9349905, 10913668],
        7: [8813120, 8985704, 14199288, 558510, 2721144, 7095671],
    }


@pytest.mark.parametrize(("training", "steps"), [(True, 2), (False, 5)], ids=["train", "eval"])
def test_given_bases_and_steps(training, steps):
    module = NMF2D(3, train_steps=2, eval_steps=5).train(training)
    x, bases = nmf_sample(2, 17, 99, 3, steps).to(torch.float32).leaves
    y = module(x.view(2, 17, 9, 11), bases)
    assert error(y.flatten(2), nmf(x, bases, steps)) <= tolerance(torch.float32)
    assert error(y.flatten(2), nmf(x, bases, steps + 2)) > 1e-3


def test_unknown_bases():
    with pytest.raises(ValueError, match="bases must be 'fixed' or 'random', got 'zeros'"):
        NMF2D(4, bases="zeros")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"gradient": "none"}, "gradient must be one of exact, one_step, got 'none'"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"train_steps": -1}, "steps must be between 0 and"),
        ({"eval_steps": 1 << 21}, "steps must be between 0 and"),
    ],
    ids=lambda value: str(*value) if isinstance(value, dict) else "",
)
def test_what_the_operator_would_refuse(arguments, message):
    with pytest.raises(ValueError, match=f"^NMF2D: {message}"):
        NMF2D(**arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    """A block of all three under autocast: the output in its dtype, the parameters' gradients in float32."""
    block = nn.Sequential(AttentionModule(8), DWConvGELU(8), nn.ReLU(), NMF2D(4)).train()
    with torch.autocast("cpu", dtype=dtype):
        y = block(images(2, 8, 7, 9))
    y.float().square().sum().backward()
    assert y.dtype == dtype
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() and p.grad.any() for p in block.parameters())


def test_compile():
    block = nn.Sequential(AttentionModule(8), DWConvGELU(8), nn.ReLU(), NMF2D(4)).eval()
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="inductor")
    for shape in ((2, 8, 7, 9), (3, 8, 12, 5)):
        x = images(*shape)
        assert error(compiled(x).detach(), block(x).detach()) <= 1e-5


@image_layouts
def test_attention_is_msca_times_x(layout):
    module, x = AttentionModule(6).double(), arrange(images(2, 6, 8, 9).double(), layout)
    convolutions = dict(module.named_children())
    a = convolutions["conv0"](x)
    strips = a + sum(convolutions[f"conv{i}_2"](convolutions[f"conv{i}_1"](a)) for i in range(3))
    assert error(module(x), F.conv2d(strips, module.conv3.weight, module.conv3.bias) * x) <= tolerance(torch.float64)


@pytest.mark.parametrize("bias", [True, False])
def test_pointwise_convolution_as_a_product(bias, monkeypatch):
    """As on a GPU: the values, layout and gradients of a convolution."""
    layer = PointwiseConv2d(6, 4, bias)
    x = torch.randn(3, 6, 5, 7).to(memory_format=torch.channels_last).requires_grad_()
    inputs = (x, *layer.parameters())
    want = layer(x)
    monkeypatch.setattr(segnext_kernels.nn, "_is_matrix_on_gpu", lambda x: True)
    got = layer(x)
    assert got.stride() == want.stride() and repr(layer).startswith("PointwiseConv2d(6, 4, kernel_size=(1, 1)")
    grad_out = torch.randn_like(got)
    found = [(y, *torch.autograd.grad(y, inputs, grad_out)) for y in (got, want)]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_pointwise_convolution_as_a_product_under_autocast(monkeypatch):
    layer, x = PointwiseConv2d(6, 4), torch.randn(3, 6, 5, 7).to(memory_format=torch.channels_last)
    found = []
    for as_product in (False, True):
        monkeypatch.setattr(segnext_kernels.nn, "_is_matrix_on_gpu", lambda x, answer=as_product: answer)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        found.append((y, *torch.autograd.grad(y.float().square().sum(), tuple(layer.parameters()))))
    assert [tensor.dtype for tensor in found[1]] == [torch.bfloat16, torch.float32, torch.float32]
    torch.testing.assert_close(*found, rtol=2e-2, atol=2e-2)


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch has no CUDA, and so no tensors of a GPU that is not there")
def test_which_pointwise_convolutions_are_products(monkeypatch):
    """On a GPU those of channels_last in 16 bits; in float32 a convolution may be in TF32 where a product may not."""
    with FakeTensorMode():
        images = {name: torch.empty(2, 6, 5, 7, dtype=getattr(torch, name)) for name in ("float32", "bfloat16", "float16")}
        last = {name: x.to(memory_format=torch.channels_last) for name, x in images.items()}
        on_gpu = {name: x.cuda() for name, x in last.items()}
        assert [name for name, x in on_gpu.items() if _is_matrix_on_gpu(x)] == ["bfloat16", "float16"]
        assert not any(_is_matrix_on_gpu(x) for x in (*last.values(), *(x.cuda() for x in images.values())))
        assert not _is_matrix_on_gpu(on_gpu["bfloat16"][:0]) and not _is_matrix_on_gpu(on_gpu["bfloat16"][0])
        with monkeypatch.context() as patched:  # layouts cannot be asked for there
            patched.setattr(segnext_kernels.nn, "transformed", lambda: True)
            assert not _is_matrix_on_gpu(on_gpu["bfloat16"])
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")
        monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: torch.bfloat16)
        assert _is_matrix_on_gpu(on_gpu["float32"])


def pruned(module: nn.Module, name: str) -> None:
    prune.l1_unstructured(module.get_submodule(name), "weight", 0.5)


def dilated(module: nn.Module, name: str) -> None:
    old = module.get_submodule(name)
    size = [2 * side for side in old.padding]
    new = nn.Conv2d(old.in_channels, old.out_channels, old.kernel_size, padding=size, dilation=2, groups=old.groups)
    module.add_module(name, new)


def reflected(module: nn.Module, name: str) -> None:
    module.get_submodule(name).padding_mode = "reflect"


def normed(module: nn.Module, name: str) -> None:
    nn.utils.parametrizations.weight_norm(module.get_submodule(name))
    module.get_submodule(name).parametrizations.weight.original0.data.mul_(2)


CONVOLUTIONS = [(AttentionModule, "conv0"), (AttentionModule, "conv1_1"), (AttentionModule, "conv2_2"), (DWConvGELU, "dwconv")]


@pytest.mark.parametrize(
    "change",
    [pruned, dilated, reflected, normed, lambda module, name: None],
    ids=["pruned", "dilated", "reflected", "normed", "as made"],
)
@pytest.mark.parametrize("kind, name", CONVOLUTIONS)
def test_convolutions_that_were_changed_are_called(kind, name, change):
    torch.manual_seed(0)
    module, x, calls = kind(6), torch.randn(2, 6, 30, 25), []
    change(module, name)
    found = module(x)
    handle = module.get_submodule(name).register_forward_hook(lambda *args: calls.append(name))
    torch.testing.assert_close(module(x), found, rtol=1e-4, atol=1e-5)
    assert calls == [name]
    handle.remove()
    for _ in range(2):  # pruned filters are made anew at every call
        module(x).sum().backward()
    convolution = module.get_submodule(name)
    if change is dilated:
        convolution.dilation, convolution.padding = (1, 1), tuple(side // 2 for side in convolution.padding)
    elif change is pruned:
        convolution.weight_orig.data.zero_()
    elif change is normed:
        convolution.parametrizations.weight.original0.data.zero_()
    else:
        convolution.weight.data.zero_()
    assert not torch.allclose(module(x), found)


@pytest.mark.parametrize("make", [AttentionModule, DWConvGELU])
def test_one_image_as_convolutions_take_it(make):
    module, x = make(5), images(5, 9, 11)
    assert torch.equal(module(x), module(x[None])[0])


def test_nmf2d_passes_on_whether_factors_are_rounded(monkeypatch):
    decompose = Mock(wraps=nmf)
    monkeypatch.setattr(segnext_kernels.nn, "nmf", decompose)
    for rounded in (False, True):
        NMF2D(3, round_factors=rounded)(images(1, 4, 9, 10))
        assert decompose.call_args.kwargs["round_factors"] is rounded


def test_nmf2d_names_what_it_takes():
    with pytest.raises(ValueError, match=r"NMF2D: x must be \[N, C, H, W\], got shape \[4, 9, 10\]"):
        NMF2D(3)(images(4, 9, 10))
    with pytest.raises(TypeError, match="NMF2D: seed must be an int, got float"):
        NMF2D(3, seed=1.5)


def test_numbers_of_numpy():
    x = torch.rand(1, 8, 3, 3)
    ours, numpys = NMF2D(4, 6, 7, seed=3), NMF2D(np.int64(4), np.int32(6), np.int64(7), seed=np.uint32(3))
    assert numpys.eval()(x).equal(ours.eval()(x))
    assert torch.compile(numpys, fullgraph=True, backend="eager")(x).equal(ours(x))
