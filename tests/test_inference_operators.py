"""The operators of fused models against float64 on odd shapes: values, layouts, threads, bad arguments."""

from __future__ import annotations

import pytest
import torch
from checks import poisoned
from inference import MAKE, PACKED_DTYPES, SHAPES, Draw, call, channels_last, check, conv_act, group_norm_relu, mlp, product
from operators import IMAGE_LAYOUTS, arrange, assert_same, compiled
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

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
@pytest.mark.parametrize("layout", IMAGE_LAYOUTS)
@pytest.mark.parametrize("options", [(1, 2, "none"), (3, 2, "gelu"), (5, 1, "none")], ids=str)
@pytest.mark.parametrize("shape", [(2, 1, 3, 270, 70), (1, 9, 4, 260, 40)], ids=str)
def test_conv_act_of_long_rows(dtype, layout, options, shape, backend):
    check("conv_act", conv_act(shape, dtype, *options), dtype, layout, backend)


@packed_dtypes
@shapes
def test_group_norm_relu_without_residual(dtype, shape, backend):
    check("group_norm_relu", group_norm_relu(shape, dtype, residual=False), dtype, "channels_last", backend)


@packed_dtypes
@shapes
def test_mlp_with_the_norm_that_ends_a_stage(dtype, shape, backend):
    check("mlp", mlp(shape, dtype, norm=True), dtype, "channels_last", backend)


@pytest.mark.parametrize("operator", OPERATORS)
@packed_dtypes
def test_no_images(operator, dtype, backend):
    case = MAKE[operator]((0, 8, 5, 5, 16), dtype)
    assert call(operator, case, backend=backend).shape == case[2].shape


@pytest.mark.parametrize("operator", OPERATORS[:5])
@packed_dtypes
def test_images_without_pixels(operator, dtype, backend):
    x, rest, truth = MAKE[operator]((2, 8, 1, 5, 16), dtype)
    rest = [r[:, :, :0] if isinstance(r, Tensor) and r.shape == x.shape else r for r in rest]
    assert call(operator, (x[:, :, :0], rest, None), backend=backend).shape == truth[:, :, :0].shape
    x, rest, truth = MAKE[operator]((2, 8, 5, 1, 16), dtype)
    rest = [r[..., :0] if isinstance(r, Tensor) and r.shape == x.shape else r for r in rest]
    assert call(operator, (x[..., :0], rest, None), backend=backend).shape == truth[..., :0].shape


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
    for leaf in filter(torch.is_floating_point, leaves(x, rest)):
        leaf.requires_grad_()
        with pytest.raises(NotImplementedError, match=f"{operator} serves inference"):
            getattr(kernels, operator)(x, *rest)
        with torch.no_grad():
            for served in (None, backend):
                assert not getattr(kernels, operator)(x, *rest, backend=served).requires_grad
        leaf.requires_grad_(False)


@pytest.mark.parametrize("operator", OPERATORS)
@compiled
def test_calls_are_recorded_as_they_are_served(operator, backend):
    """Contiguous images are copied to channels_last, in what is traced too."""
    x, rest, _ = MAKE[operator](SHAPES[4], torch.float32)
    images, function = list(x) if isinstance(x, list) else [x], getattr(kernels, operator)

    def run(*images: Tensor) -> Tensor:
        return function(list(images) if isinstance(x, list) else images[0], *rest)

    expected = [run(*(2 * image for image in images))]
    doubled = [2 * image for image in images]
    assert_same([torch.jit.trace(run, images, check_trace=False)(*doubled)], expected)
    assert_same([make_fx(run)(*images)(*doubled)], expected)


@pytest.mark.parametrize("operator", OPERATORS)
@compiled
def test_weights_of_any_strides(operator, backend):
    x, rest = channels_last(MAKE[operator](SHAPES[4], torch.float32))
    strided = tree_map(lambda leaf: arrange(leaf, "sliced") if isinstance(leaf, Tensor) else leaf, rest)
    assert_same([getattr(kernels, operator)(x, *strided)], [getattr(kernels, operator)(x, *rest)])


@pytest.mark.parametrize("size", [(1, 1), (33, 7), (150, 27), (64, 64)], ids=str)
@packed_dtypes
def test_pack_can_be_undone(size, dtype):
    weight = torch.randn(size)
    assert torch.equal(unpack(kernels.pack(weight, dtype), *size), weight.to(dtype).float())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_float32_strips_beside_bfloat16(backend):
    x, weights, *_ = MAKE["spatial_attention"](SHAPES[4], torch.bfloat16)
    (weights,) = weights
    kept = [*weights[:2], *(strip.float() for strip in weights[2:16]), *weights[16:]]
    got, want = (kernels.spatial_attention(x, w, backend=backend) for w in (kept, weights))
    assert weights[2].dtype == torch.bfloat16 and torch.equal(got, want)


BAD = [
    ("conv_act", lambda x, w, b, k, s, a: (x.double(), w, b, k, s, a), TypeError, "x must be float32 or bfloat16"),
    ("conv_act", lambda x, w, b, k, s, a: (x[0], w, b, k, s, a), ValueError, r"x must be \[N, C, H, W\]"),
    ("conv_act", lambda x, w, b, k, s, a: (x, w, b, 2, s, a), ValueError, "kernel_size must be odd"),
    ("conv_act", lambda x, w, b, k, s, a: (x, w, b, k, 0, a), ValueError, "stride at least 1"),
    ("conv_act", lambda x, w, b, k, s, a: (x, w, b, 1.0, s, a), TypeError, "kernel_size must be an int, got float"),
    ("conv_act", lambda x, w, b, k, s, a: (x, w, b, k, None, a), TypeError, "stride must be an int, got NoneType"),
    ("conv_act", lambda x, w, b, k, s, a: (x, w, b, True, s, a), TypeError, "kernel_size must be an int, got bool"),
    ("conv_act", lambda x, w, b, k, s, a: (x, w, b, k, s, "tanh"), ValueError, "activation must be one of none, gelu, relu"),
    (
        "conv_act",
        lambda x, w, b, k, s, a: (x, w[:, 1:], b, k, s, a),
        ValueError,
        r"weight, packed \(segnext_kernels.pack\), must be",
    ),
    ("conv_act", lambda x, w, b, k, s, a: (x, w.bfloat16(), b, k, s, a), TypeError, "must have x's dtype"),
    ("conv_act", lambda x, w, b, k, s, a: (x, w, b.half(), k, s, a), TypeError, "must be a float32 tensor"),
    ("spatial_attention", lambda x, w: (x, w[1:]), ValueError, "21 tensors"),
    ("spatial_attention", lambda x, w: (x, 3), TypeError, "weights must be a list or tuple of tensors, got int"),
    ("spatial_attention", lambda x, w: (x, [w[0], w[1][1:], *w[2:]]), ValueError, "the bias of W1 must be"),
    ("spatial_attention", lambda x, w: (x, [*w[:4], w[4][..., 1:-1], *w[5:]]), ValueError, r"weights\[6\] must be"),
    ("spatial_attention", lambda x, w: (x, [*w[:20], w[20][1:]]), ValueError, "scale must be"),
    ("mlp", lambda x, *w: (x, *w[:2], w[2][..., 1:], *w[3:]), ValueError, "depthwise must be"),
    ("mlp", lambda x, *w: (x, *w[:4], w[0], *w[5:]), ValueError, r"fc2, packed \(segnext_kernels.pack\), must be"),
    ("mlp", lambda x, *w: (x, w[0][:0], w[1][:0], w[2][:0], w[3][:0], *w[4:]), ValueError, "fc1 must have at least one output"),
    ("mlp", lambda x, *w: (x, *w[:6], w[5], None), ValueError, "norm_weight and norm_bias must be given together"),
    ("mlp", lambda x, *w: (x, *w[:6], w[5], w[5][1:]), ValueError, "norm_bias must be"),
    ("mlp", lambda x, *w: (x, *w[:6], w[5].double(), w[5]), TypeError, "norm_weight must be a float32 tensor"),
    ("mlp", lambda x, *w: (x, *w[:8], "1e-6"), TypeError, "eps must be a number, got str"),
    ("mlp", lambda x, *w: (x, *w[:8], True), TypeError, "eps must be a number, got bool"),
    ("group_norm_relu", lambda x, w, b, g, e, r: (x, w, b, True, e, r), TypeError, "groups must be an int, got bool"),
    ("group_norm_relu", lambda x, w, b, g, e, r: (x, w, b, "8", e, r), TypeError, "groups must be an int, got str"),
    ("group_norm_relu", lambda x, w, b, g, e, r: (x, w, b, g, None, r), TypeError, "eps must be a number, got NoneType"),
    ("group_norm_relu", lambda x, w, b, g, e, r: (x, w, b, 4, e, r), ValueError, "groups must divide the 17 channels"),
    ("group_norm_relu", lambda x, w, b, g, e, r: (x, w, b, g, e, r[1:]), ValueError, "residual must be"),
    ("hamburger", lambda x, w, b, bases, *r: (x, w, b, bases[:, 1:], *r), ValueError, r"bases must be \[B, D, R\] = \[2, 17, "),
    ("hamburger", lambda x, w, b, bases, *r: (x, w, b, bases.double(), *r), TypeError, "bases must be torch.float32 for x of"),
    ("hamburger", lambda x, w, b, bases, s, *r: (x, w, b, bases, 1.5, *r), TypeError, "steps must be an int, got float"),
    (
        "hamburger",
        lambda x, w, b, bases, s, *r: (x, w, b, bases, -1, *r),
        ValueError,
        "steps must be between 0 and .*, got -1",
    ),
    ("hamburger", lambda x, w, b, bases, s, out, *r: (x, w, b, bases, s, out[:, 1:], *r), ValueError, "ham_out must be"),
    ("hamburger", lambda *args: (*args[:8], 4, *args[9:]), ValueError, "groups must divide the 17 channels, got 4"),
    ("hamburger", lambda *args: (*args[:-1], 1), TypeError, "round_factors must be a bool, got int"),
    ("resize_concat_conv", lambda m, w, b: (m[0], w, b), TypeError, "maps must be a list or tuple of tensors, got Tensor"),
    ("resize_concat_conv", lambda m, w, b: (m, w[1:], b), ValueError, "as many weights as maps"),
    ("resize_concat_conv", lambda m, w, b: ([m[0][:1], *m[1:]], w, b), ValueError, "one batch size"),
]


@pytest.mark.parametrize(("operator", "spoil", "kind", "message"), BAD)
def test_bad_arguments_are_named(operator, spoil, kind, message):
    x, rest, _ = MAKE[operator](SHAPES[4], torch.float32)
    with pytest.raises(kind, match=f"{operator}: .*{message}"):
        getattr(kernels, operator)(*spoil(x, *rest))


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("served", [None, "reference"])
def test_every_tensor_is_checked(operator, served):
    """For its dtype, its shape and its device, by the reference too, in the words of the operator."""
    x, rest, _ = MAKE[operator](SHAPES[4], torch.float32)
    flat, structure = tree_flatten((x, rest))
    spoil = {
        TypeError: lambda tensor: tensor.to(torch.int32),
        ValueError: lambda tensor: tensor[1:],
        (TypeError, ValueError): lambda tensor: tensor.to("meta"),
    }
    for place in (i for i, leaf in enumerate(flat) if isinstance(leaf, Tensor) and i > 0):
        for kind, change in spoil.items():
            x, rest = tree_unflatten([*flat[:place], change(flat[place]), *flat[place + 1 :]], structure)
            with pytest.raises(kind, match=f"^{operator}: "):
                getattr(kernels, operator)(x, *rest, backend=served)


@pytest.mark.parametrize("operator", OPERATORS)
@packed_dtypes
def test_other_shapes_with_as_many_elements_are_refused(operator, dtype):
    """As those of weights that nobody packed; x is as the kernels take it, so that they are asked first."""
    x, rest = channels_last(MAKE[operator]((1, 64, 8, 8, 64), dtype))
    flat, structure = tree_flatten(rest)
    for place in (i for i, leaf in enumerate(flat) if isinstance(leaf, Tensor)):
        others = [flat[place][None], flat[place].flatten(), flat[place][:, None]]
        for other in (other for other in others if other.shape != flat[place].shape):
            spoiled = tree_unflatten([*flat[:place], other, *flat[place + 1 :]], structure)
            with pytest.raises((TypeError, ValueError), match=f"^{operator}: "):
                getattr(kernels, operator)(x, *spoiled)


@pytest.mark.parametrize("operator", OPERATORS)
def test_none_for_a_tensor_is_refused(operator, capfd):
    """In silence but for the error: a kernel that asks what is no tensor for its device has libtorch print where it was."""
    x, rest = channels_last(MAKE[operator](SHAPES[4], torch.float32))
    flat, structure = tree_flatten(rest)
    optional = 4 if operator == "group_norm_relu" else None  # the residual
    for place in (i for i, leaf in enumerate(flat) if isinstance(leaf, Tensor) and i != optional):
        with pytest.raises((TypeError, ValueError), match=f"^{operator}: "):
            getattr(kernels, operator)(x, *tree_unflatten([*flat[:place], None, *flat[place + 1 :]], structure))
    assert capfd.readouterr().err == ""


@packed_dtypes
def test_no_inputs_are_refused(dtype):
    """Of nothing there is no sum, which the reference says in its own way."""
    x, weight = torch.zeros(1, 0, 3, 3, dtype=dtype), torch.zeros(1, 0, 32, dtype=dtype)
    weight = weight if dtype == torch.float32 else torch.zeros(1, 0, 32, 2, dtype=dtype)
    with pytest.raises(ValueError, match="conv_act: weight must have at least one input"):
        kernels.conv_act(x, weight, torch.zeros(5))
    with pytest.raises(RuntimeError, match="weight has no inputs"):
        torch.ops.segnext_kernels.conv_act(x, weight, torch.zeros(5), 1, 1, "none")


@packed_dtypes
def test_weights_that_are_not_packed_are_refused(dtype):
    x, weight = torch.randn(1, 64, 4, 4, dtype=dtype), torch.randn(64, 64, 1, 1, dtype=dtype)
    with pytest.raises(ValueError, match=r"conv_act: weight, packed \(segnext_kernels.pack\), must be"):
        kernels.conv_act(x.contiguous(memory_format=torch.channels_last), weight, torch.zeros(64))


def test_sizes_that_overflow_are_refused():
    x, (weight, bias, *_) = channels_last(conv_act((1, 32, 4, 4, 32), torch.float32))
    with pytest.raises(ValueError, match=r"conv_act: weight, packed \(segnext_kernels.pack\), must be"):
        kernels.conv_act(x, weight, bias, 2**63 - 1)
    x, rest = channels_last(MAKE["hamburger"]((1, 32, 4, 4, 32), torch.float32))
    with pytest.raises(ValueError, match="hamburger: steps must be between 0 and 1048576"):
        kernels.hamburger(x, *rest[:3], 2**63 - 1, *rest[4:])


@pytest.mark.parametrize("operator", OPERATORS)
def test_vmap(operator):
    x, rest, _ = MAKE[operator](SHAPES[4], torch.float32)
    batched = [leaf for leaf in (*(x if operator == "resize_concat_conv" else [x]), *rest) if isinstance(leaf, Tensor)]
    batched = [leaf for leaf in batched if leaf.dim() >= 3 and len(leaf) == 2]  # images, and the bases that belong to them

    def one(images):
        swapped = {id(leaf): image[None] for leaf, image in zip(batched, images, strict=True)}
        return getattr(kernels, operator)(*tree_map(lambda leaf: swapped.get(id(leaf), leaf), (x, *rest)))[0]

    expected = getattr(kernels, operator)(x, *rest)
    torch.testing.assert_close(torch.func.vmap(one)(batched), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("operator", OPERATORS)
def test_autocast_changes_nothing(operator, backend):
    x, rest, _ = MAKE[operator](SHAPES[4], torch.float32)
    expected = getattr(kernels, operator)(x, *rest, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same([getattr(kernels, operator)(x, *rest, backend=backend)], [expected])


def test_autocast_does_not_mix_dtypes():
    x, rest = channels_last(group_norm_relu(SHAPES[4], torch.float32))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="residual must have x's dtype"):
        kernels.group_norm_relu(x, *rest[:4], rest[4].bfloat16())


@pytest.mark.parametrize("weight", [None, torch.ones(3), torch.ones(3, 3, 1, 9)], ids=["None", "1", "1x9"])
def test_pack_names_what_is_wrong(weight):
    with pytest.raises((TypeError, ValueError), match="^pack: weight must be "):
        kernels.pack(weight)


def leaves(x, rest) -> list[Tensor]:
    return [leaf for leaf in tree_leaves((x, rest)) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("operator", OPERATORS)
@compiled
def test_a_recorded_call_has_no_gradient_either(operator, backend):
    """Programs that were traced or exported call the operators themselves."""
    x, rest = channels_last(MAKE[operator](SHAPES[4], torch.float32))
    inputs = leaves(x, ())[0].requires_grad_()
    y = getattr(torch.ops.segnext_kernels, operator)(x, *rest)
    with pytest.raises(NotImplementedError, match=f"{operator} serves inference"):
        torch.autograd.grad(y.sum(), inputs)


@pytest.mark.parametrize("operator", OPERATORS)
@packed_dtypes
@compiled
def test_a_recorded_call_takes_any_strides(operator, dtype, backend):
    x, rest = channels_last(MAKE[operator](SHAPES[4], dtype))
    function = getattr(torch.ops.segnext_kernels, operator)
    for layout in ("sliced", "transposed", "contiguous"):
        assert_same([function(tree_map(lambda image: arrange(image, layout), x), *rest)], [function(x, *rest)])  # noqa: B023


@pytest.mark.parametrize("served", ["reference", None])
def test_no_outputs(served):
    x, weight, bias = torch.rand(1, 8, 4, 5), kernels.pack(torch.empty(0, 8)), torch.empty(0)
    assert kernels.conv_act(x, weight, bias, backend=served).shape == (1, 0, 4, 5)
    assert kernels.resize_concat_conv([x, x], [weight, weight], bias, backend=served).shape == (1, 0, 4, 5)
