"""The operators of fused models against float64 on odd shapes: values, layouts, threads, bad arguments."""

from __future__ import annotations

import pytest
import torch
from checks import poisoned
from inference import MAKE, PACKED_DTYPES, SHAPES, Draw, call, channels_last, check, conv_act, group_norm_relu, product
from operators import IMAGE_LAYOUTS, assert_same, compiled
from torch import Tensor
from torch.utils._pytree import tree_map

import segnext_kernels as kernels
from segnext_kernels._pack import unpack

OPERATORS = tuple(MAKE)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
packed_dtypes = pytest.mark.parametrize("dtype", PACKED_DTYPES, ids=str)


@pytest.mark.parametrize("operator", OPERATORS)
@packed_dtypes
@pytest.mark.parametrize("layout", IMAGE_LAYOUTS)
@shapes
def test_agrees_with_float64(operator, dtype, layout, shape, backend):
    check(operator, MAKE[operator](shape, dtype), dtype, layout, backend)


@packed_dtypes
@pytest.mark.parametrize("layout", IMAGE_LAYOUTS)
@pytest.mark.parametrize("options", [(3, 2, "gelu"), (3, 1, "relu"), (1, 2, "none"), (5, 3, "none")], ids=str)
@shapes
def test_conv_act_options(dtype, layout, options, shape, backend):
    check("conv_act", conv_act(shape, dtype, *options), dtype, layout, backend)


@packed_dtypes
@shapes
def test_group_norm_relu_without_residual(dtype, shape, backend):
    check("group_norm_relu", group_norm_relu(shape, dtype, residual=False), dtype, "channels_last", backend)


@pytest.mark.parametrize("operator", OPERATORS[:4])
@packed_dtypes
def test_no_images(operator, dtype, backend):
    case = MAKE[operator]((0, 8, 5, 5, 16), dtype)
    assert call(operator, case, backend=backend).shape == case[2].shape


@pytest.mark.parametrize("operator", OPERATORS[:4])
@packed_dtypes
@compiled
def test_images_without_pixels(operator, dtype, backend):
    x, rest, truth = MAKE[operator]((2, 8, 1, 5, 16), dtype)
    rest = [r[:, :, :0] if isinstance(r, Tensor) and r.shape == x.shape else r for r in rest]
    assert call(operator, (x[:, :, :0], rest, None), backend=backend).shape == truth[:, :, :0].shape


@pytest.mark.parametrize("operator", OPERATORS)
@packed_dtypes
@compiled
def test_same_bits_for_every_thread_count(operator, dtype, backend, set_threads):
    case, answers = MAKE[operator]((3, 48, 23, 29, 200), dtype), []
    for threads in (1, 2, 3, 7):
        set_threads(threads)
        answers.append(call(operator, case, backend=backend))
    for answer in answers[1:]:
        assert_same([answer], answers[:1])


@pytest.mark.parametrize("depth", [1, 16, 33, 128, 130, 1500])
@pytest.mark.parametrize("size", [1e-25, 1.0, 1e12], ids=str)
@compiled
def test_float32_products_lose_what_float32_arithmetic_loses(depth, size, backend):
    """Whatever arithmetic a processor offers: half a unit in the last place of every term, in random directions."""
    draw = Draw(torch.float32)
    x, weight = (draw(1, depth, 9, 11) * size).float().double(), draw(40, depth)
    y = kernels.conv_act(x.float(), kernels.pack(weight, torch.float32), torch.zeros(40), 1, 1, "none")
    terms = product(x.square(), weight.square()).sqrt()
    assert ((y - product(x, weight)).abs() <= 8 * 2.0**-24 * max(depth, 4) ** 0.5 * terms).all()
    assert ((y - product(x, weight)) / terms).mean().abs() <= 2.0**-24


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@packed_dtypes
@compiled
def test_what_is_not_finite_stays_so(dtype, value, backend):
    x, rest, truth = conv_act((1, 33, 5, 7, 40), dtype)
    x[0, 7, 2, 3] = value
    finite = kernels.conv_act(x, *rest).isfinite()
    assert not finite[0, :, 2, 3].any() and finite.sum() == truth.numel() - 40


@pytest.mark.parametrize("operator", OPERATORS)
@packed_dtypes
@compiled
def test_nothing_outside_the_arguments_is_read(operator, dtype, backend):
    for shape in SHAPES[2:6]:
        x, rest = channels_last(MAKE[operator](shape, dtype))
        dirty = tree_map(lambda leaf: poisoned(leaf) if isinstance(leaf, Tensor) else leaf, (x, rest))
        function = getattr(kernels, operator)
        assert_same([function(dirty[0], *dirty[1])], [function(x, *rest)])


@pytest.mark.parametrize("operator", OPERATORS)
@compiled
def test_compiles_without_graph_breaks(operator, backend):
    x, rest, _ = MAKE[operator](SHAPES[4], torch.float32)
    function = torch.compile(getattr(kernels, operator), backend="aot_eager", fullgraph=True)
    assert_same([function(x, *rest)], [getattr(kernels, operator)(x, *rest)])


@pytest.mark.parametrize("operator", OPERATORS)
@compiled
def test_registration(operator, backend):
    x, rest = channels_last(MAKE[operator](SHAPES[4], torch.float32))
    utilities = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.segnext_kernels, operator).default, (x, *rest), test_utils=utilities)


@pytest.mark.parametrize("operator", OPERATORS)
@compiled
def test_a_gradient_is_refused(operator, backend):
    x, rest = channels_last(MAKE[operator](SHAPES[4], torch.float32))
    (x[0] if isinstance(x, list) else x).requires_grad_()
    with pytest.raises(NotImplementedError, match=f"{operator} serves inference"):
        getattr(kernels, operator)(x, *rest)
    with torch.no_grad():
        assert not getattr(kernels, operator)(x, *rest).requires_grad


@pytest.mark.parametrize("size", [(1, 1), (33, 7), (150, 27), (64, 64)], ids=str)
@packed_dtypes
def test_pack_can_be_undone(size, dtype):
    weight = torch.randn(size)
    assert torch.equal(unpack(kernels.pack(weight, dtype), *size), weight.to(dtype).float())


BAD = [
    ("conv_act", lambda x, w, b, k, s, a: (x.double(), w, b, k, s, a), TypeError, "x must be float32 or bfloat16"),
    ("conv_act", lambda x, w, b, k, s, a: (x[0], w, b, k, s, a), ValueError, r"x must be \[N, C, H, W\]"),
    ("conv_act", lambda x, w, b, k, s, a: (x, w, b, 2, s, a), ValueError, "kernel_size must be odd"),
    ("conv_act", lambda x, w, b, k, s, a: (x, w, b, k, 0, a), ValueError, "stride at least 1"),
    ("conv_act", lambda x, w, b, k, s, a: (x, w, b, k, s, "tanh"), ValueError, "activation must be one of none, gelu, relu"),
    ("conv_act", lambda x, w, b, k, s, a: (x, w[:, 1:], b, k, s, a), ValueError, "weight, packed, must be"),
    ("conv_act", lambda x, w, b, k, s, a: (x, w.bfloat16(), b, k, s, a), TypeError, "must have x's dtype"),
    ("conv_act", lambda x, w, b, k, s, a: (x, w, b.half(), k, s, a), TypeError, "must be a float32 tensor"),
    ("spatial_attention", lambda x, w: (x, w[1:]), ValueError, "21 tensors"),
    ("spatial_attention", lambda x, w: (x, [*w[:20], w[20][1:]]), ValueError, "scale must be"),
    ("mlp", lambda x, *w: (x, *w[:2], w[2][..., 1:], *w[3:]), ValueError, "depthwise must be"),
    ("mlp", lambda x, *w: (x, *w[:4], w[0], w[5]), ValueError, "fc2, packed, must be"),
    ("group_norm_relu", lambda x, w, b, g, e, r: (x, w, b, 4, e, r), ValueError, "groups must divide the 17 channels"),
    ("group_norm_relu", lambda x, w, b, g, e, r: (x, w, b, g, e, r[1:]), ValueError, "residual must be"),
    ("resize_concat_conv", lambda m, w, b: (m, w[1:], b), ValueError, "as many weights as maps"),
    ("resize_concat_conv", lambda m, w, b: ([m[0][:1], *m[1:]], w, b), ValueError, "one batch size"),
]


@pytest.mark.parametrize(("operator", "spoil", "kind", "message"), BAD)
def test_bad_arguments_are_named(operator, spoil, kind, message):
    x, rest, _ = MAKE[operator](SHAPES[4], torch.float32)
    with pytest.raises(kind, match=f"{operator}: .*{message}"):
        getattr(kernels, operator)(*spoil(x, *rest))
