"""The CUDA and the Triton kernels on a GPU: ``make gpu-test``.

What can be seen without one is in test_cuda_kernels.py and test_triton_*.py. Triton compiles every kernel it is asked for, up
to half a minute each, so that its kernels get fewer shapes here; the values of all others are compared by its interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import checks
import pytest
import torch
import upsample
from operators import (
    BRANCH_SIZES,
    EMPTY_IMAGES,
    FUNCTIONS,
    GPU_DTYPES,
    GRADIENTS,
    IMAGES,
    Sample,
    arrange,
    arranged,
    assert_same,
    check,
    dwconv_gelu_sample,
    error,
    gpu_dtypes,
    grad_like,
    image_layouts,
    msca_strips_sample,
    nmf_sample,
    results,
    scale_add_sample,
    tolerance,
)
from torch import Tensor

from segnext_kernels import _load, _select, _triton, explain, scale_add, upsample_argmax, upsample_cross_entropy
from segnext_kernels.nn import PointwiseConv2d

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

float32, bfloat16, float16 = GPU_DTYPES
IMAGE_OPERATORS = {"msca_strips": msca_strips_sample, "dwconv_gelu": dwconv_gelu_sample}
SAMPLES = IMAGE_OPERATORS | {"scale_add": scale_add_sample}
SERVED = [("cuda", operator) for operator in IMAGE_OPERATORS] + [("triton", operator) for operator in (*SAMPLES, "nmf")]
image_operators = pytest.mark.parametrize("operator", IMAGE_OPERATORS)
served = pytest.mark.parametrize(("backend", "operator"), SERVED)

# Odd; cut into channels, strips and columns; all of 16 bytes
TRITON_IMAGES = [((2, 17, 5, 37), float32), ((1, 64, 12, 24), bfloat16), ((2, 24, 70, 70), float16)]
TRITON_IMAGES += [((4, 64, 64, 64), float32), ((1, 2, 3, 300), bfloat16), ((16, 32, 64, 64), bfloat16)]
# [B, D, N, R] and steps: one element, odd, R above D, a high rank, those of T and of L
MATRICES = [((1, 1, 1, 1, 2), float32), ((2, 33, 5, 17, 2), bfloat16), ((1, 70, 513, 100, 3), float16)]
MATRICES += [((2, 256, 4096, 16, 6), dtype) for dtype in GPU_DTYPES]
MATRICES += [((1, 1024, 4096, 64, 6), dtype) for dtype in (float32, bfloat16)]


def sample_of(operator: str, shape: tuple[int, ...], dtype: torch.dtype = float32, device: str = "cuda") -> Sample:
    return SAMPLES[operator](shape).to(dtype).on(device)


def a_sample(operator: str, dtype: torch.dtype = float32, layout: str = "contiguous") -> Sample:
    """One of the operator's, large enough for many blocks; of tensors alone."""
    if operator == "scale_add":
        sample = scale_add_sample((4, 64, 64, 64), dropped=False).to(dtype).on("cuda")
        return replace(sample, leaves=(*(arrange(leaf, layout) for leaf in sample.leaves[:2]), sample.leaves[2]))
    if operator == "nmf":
        return arranged(nmf_sample(2, 64, 1000, 16, 3).to(dtype).on("cuda"), layout.replace("channels_last", "transposed"))
    return arranged(sample_of(operator, (4, 64, 64, 64), dtype), layout)


@pytest.fixture
def autotuned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)


def test_the_kernels_serve():
    assert _load.cuda_failure is None and _triton.failure is None and not _triton.interpreted
    for operator in IMAGE_OPERATORS:
        found = explain(operator, sample_of(operator, (1, 3, 5, 4)).x)
        assert (found["cuda"], found["triton"]) == ("serves", "could serve")
    other = explain("msca_strips", torch.ones(1, 2, 3, 4, device="cuda"), branch_sizes=(3, 5))["cuda"]
    assert other == f"the compiled kernels have branch sizes {BRANCH_SIZES}, got (3, 5)"
    for operator in ("nmf", "scale_add", "upsample_argmax", "upsample_cross_entropy"):
        assert explain(operator, torch.ones(1, 2, 3, 4, device="cuda")[0 if operator == "nmf" else ...])["triton"] == "serves"


@image_operators
@pytest.mark.parametrize("shape", [*IMAGES, (2, 24, 70, 70), (16, 64, 64, 64), *EMPTY_IMAGES], ids=str)
@gpu_dtypes
@image_layouts
def test_values_and_gradients(operator, shape, dtype, layout):
    sample = arranged(sample_of(operator, shape, dtype), layout)
    check(sample, "cuda", grad_like(sample.x))


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@image_operators
@pytest.mark.parametrize("dtype", [bfloat16, float16], ids=str)
@image_layouts
def test_float32_filters_beside_16_bits(backend, operator, dtype, layout):
    sample = a_sample(operator, layout=layout)
    sample = sample.with_x(sample.x.to(dtype))
    check(sample, backend, grad_like(sample.x))


@pytest.mark.parametrize("operator", SAMPLES)
@pytest.mark.parametrize(("shape", "dtype"), TRITON_IMAGES, ids=str)
@image_layouts
def test_values_and_gradients_of_triton(operator, shape, dtype, layout):
    sample = arranged(sample_of(operator, shape, dtype), layout)
    check(sample, "triton", grad_like(sample.x))


@pytest.mark.parametrize(("shape", "dtype"), MATRICES, ids=str)
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_nmf(shape, dtype, gradient, layout):
    if layout == "transposed" and gradient == "one_step":
        pytest.skip("the layout has its turn with the exact gradient")
    sample = arranged(nmf_sample(*shape, gradient).to(dtype).on("cuda"), layout)
    check(sample, "triton", grad_like(sample.x))


@pytest.mark.parametrize("shape", [(2, 256, 1000, 16, 6), (2, 512, 1000, 64, 6)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_nmf_with_rounded_factors(shape, layout):
    """An element is off by four roundings at most instead of its own."""
    sample = arranged(nmf_sample(*shape).to(bfloat16).on("cuda"), layout)
    got, want = replace(sample, options=sample.options | {"round_factors": True})("triton").double(), sample.exact()[0]
    assert not torch.equal(got, sample("triton").double())
    assert ((got - want).abs() - 2 * torch.finfo(bfloat16).eps * want.abs()).max() <= 2e-5 * want.abs().max()


def test_nmf_as_torch_allows_tf32(monkeypatch):
    """TF32 has 10 bits, so that it shows and is still near."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32")
    sample = nmf_sample(2, 256, 1000, 16, 6).to(float32).on("cuda")
    assert tolerance(float32) < error(sample("triton"), sample.exact()[0]) < 2e-3


@pytest.mark.parametrize(("shape", "size"), [*upsample.CASES, ((2, 150, 64, 64), (512, 512)), *upsample.EMPTY], ids=str)
@image_layouts
def test_upsampled_logits(shape, size, layout):
    dtype = GPU_DTYPES[sum(size) % 3]
    logits, target = upsample.draw_logits(shape, dtype, layout).cuda(), upsample.draw_target(shape, size).cuda()
    upsample.check_labels(logits, size, "triton")
    if target.numel() and logits.numel():
        weight = torch.linspace(0.1, 1, shape[1], device="cuda") if size[0] % 2 else None
        upsample.check_loss(logits, target, weight, "triton")


@served
@image_layouts
def test_what_every_operator_must_do(backend, operator, layout):
    sample = a_sample(operator, layout=layout)
    checks.check_layout(sample, backend)
    checks.check_saved_tensors(sample, backend)
    checks.check_nothing_needed(sample, backend)
    checks.check_fake(sample, backend)
    checks.check_poison(sample, backend)
    if operator != "scale_add":  # whose gradient of x is that of the result
        checks.check_no_double_backward(sample, backend)


@image_operators
@image_layouts
def test_registration(operator, layout):
    x, *filters = arranged(sample_of(operator, (2, 17, 13, 9)), layout).leaves
    weights = (x, filters) if operator == "msca_strips" else (x, *filters)
    checks.check_registration(operator, weights, (torch.ones_like(x), *weights, True, True))


@served
@image_layouts
def test_the_same_bits_from_run_to_run(backend, operator, layout):
    sample = a_sample(operator, layout=layout)
    grad_out = torch.randn_like(sample.x)
    want = results(sample, backend, grad_out)
    for _ in range(5):
        assert_same(results(sample, backend, grad_out), want)


@pytest.mark.parametrize("operator", [*SAMPLES, "nmf"])
def test_tuned_kernels(operator, autotuned):
    """Triton's kernels in the fastest of their configurations."""
    sample = a_sample(operator, bfloat16)
    check(sample, "triton", grad_like(sample.x))


@image_operators
def test_one_compiled_graph(operator):
    samples = [sample_of(operator, shape) for shape in ((2, 5, 9, 12), (3, 5, 8, 31), (4, 5, 40, 7))]

    def function(*leaves):
        return FUNCTIONS[operator](*leaves)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for sample in samples:
        torch.testing.assert_close(compiled(*sample.leaves), sample("cuda"))


@pytest.mark.parametrize("operator", [*SAMPLES, "nmf"])
def test_torch_compile_sees_through_triton(operator):
    """Forward and backward, launched by Inductor."""
    sample = a_sample(operator)
    leaves = tuple(leaf.detach().requires_grad_() for leaf in sample.leaves)
    grad_out = grad_like(sample.x)

    def function(*leaves):
        return FUNCTIONS[operator](*leaves, **sample.options, backend="triton")

    torch._dynamo.reset()
    y = torch.compile(function, fullgraph=True)(*leaves)
    got = [y.detach(), *torch.autograd.grad(y, leaves, grad_out)]
    for value, want in zip(got, results(sample, "triton", grad_out), strict=True):
        torch.testing.assert_close(value, want, rtol=0, atol=tolerance(float32) * float(want.abs().max()))


def test_torch_compile_of_upsampled_logits():
    logits, target = upsample.draw_logits((2, 19, 16, 16), float32).cuda(), upsample.draw_target((2, 19), (64, 64)).cuda()
    leaf = logits.requires_grad_()

    @torch.compile(fullgraph=True)
    def function(z):
        return upsample_cross_entropy(z, target, backend="triton"), upsample_argmax(z.detach(), (64, 64), backend="triton")

    torch._dynamo.reset()
    loss, labels = function(leaf)
    (grad,) = torch.autograd.grad(2.5 * loss, leaf)
    want, want_grad = upsample.loss_and_gradient(logits, target, backend="triton")
    torch.testing.assert_close((loss.detach(), grad), (want, want_grad))
    assert_same([labels], [upsample_argmax(logits.detach(), (64, 64), backend="triton")])


# But for scale_add, which promotes as PyTorch does
@pytest.mark.parametrize(("backend", "operator"), [(b, o) for b, o in SERVED if o != "scale_add"])
@pytest.mark.parametrize("dtype", [bfloat16, float16], ids=str)
def test_autocast(backend, operator, dtype):
    checks.check_autocast(a_sample(operator), backend, dtype)


@served
def test_the_current_stream_is_used(backend, operator):
    """Work on another stream waits for what that stream does before."""
    sample, stream = a_sample(operator), torch.cuda.Stream()
    want = sample(backend)
    x = torch.full_like(sample.x, torch.nan)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.copy_(sample.x)
        y = sample.with_x(x)(backend)
    stream.synchronize()
    assert_same([y], [want])


@served
@image_layouts
def test_graphs_capture_forward_and_backward(backend, operator, layout):
    sample = a_sample(operator, layout=layout)
    leaves = tuple(leaf.detach().requires_grad_() for leaf in sample.leaves)
    grad_out = torch.randn_like(sample.x)

    def step():
        y = replace(sample, leaves=leaves)(backend)
        return [y, *torch.autograd.grad(y, leaves, grad_out)]

    captured, graph = capture(step)
    with torch.no_grad():
        leaves[0].mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    assert_same([t.detach() for t in captured], [t.detach() for t in step()])


@image_operators
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_device_of_x_is_used(operator):
    first, second = (sample_of(operator, (2, 17, 13, 9), device=f"cuda:{i}") for i in (0, 1))
    with torch.cuda.device(0):
        y = second("cuda")
    assert y.device.index == 1
    assert_same([y.cpu()], [first("cuda").cpu()])


@pytest.mark.parametrize(("backend", "operator"), [(b, o) for b, o in SERVED if o in IMAGE_OPERATORS])
@image_layouts
def test_offsets_beyond_32_bits(backend, operator, layout):
    if torch.cuda.get_device_properties(0).total_memory < 20e9:
        pytest.skip("needs 20 GB of GPU memory")
    small = sample_of(operator, (1, 16, 512, 512), float16)
    shape = (1, 8208, 512, 512)
    fmt = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x = torch.empty(shape, dtype=float16, device="cuda", memory_format=fmt).zero_()
    x[:, -16:] = small.x
    filters = [leaf.repeat(8208 // 16, *[1] * (leaf.dim() - 1)) for leaf in small.leaves[1:]]
    y = replace(small, leaves=(x, *filters))(backend)
    assert error(y[:, -16:], small.exact()[0]) <= tolerance(float16)


@image_layouts
def test_offsets_of_scale_add_beyond_32_bits(layout):
    if torch.cuda.get_device_properties(0).total_memory < 20e9:
        pytest.skip("needs 20 GB of GPU memory")
    fmt = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x = torch.empty((1, 8208, 512, 512), dtype=float16, device="cuda", memory_format=fmt).zero_()
    x[:, -16:] = torch.randn(1, 16, 512, 512, device="cuda")
    y = scale_add(x, x, torch.full((8208,), 0.5, dtype=float16, device="cuda"), backend="triton")
    assert error(y[:, -16:], 1.5 * x[:, -16:].double()) <= tolerance(float16)


@pytest.mark.parametrize("bias", [True, False])
@gpu_dtypes
@image_layouts
def test_pointwise_convolutions(layout, dtype, bias):
    """Values, gradients and the layout of PyTorch's, whether they are products or not."""
    ours = PointwiseConv2d(48, 24, bias).to("cuda", dtype)
    x = arranged(sample_of("msca_strips", (3, 48, 9, 14), dtype), layout).x.requires_grad_()
    plain = [leaf.detach().double().requires_grad_() for leaf in (x, *ours.parameters())]
    y, want = ours(x), torch.nn.functional.conv2d(*plain)
    grad_out = grad_like(y)
    assert y.stride() == torch.nn.functional.conv2d(x, ours.weight).stride()
    got = [y, *torch.autograd.grad(y, (x, *ours.parameters()), grad_out)]
    for value, right in zip(got, [want, *torch.autograd.grad(want, plain, grad_out.double())], strict=True):
        assert value.shape == right.shape and error(value, right) <= (2e-3 if dtype == float32 else 4 * tolerance(dtype))


def test_float64_goes_to_the_reference():
    x = torch.ones(1, 2, 3, 4, dtype=torch.float64, device="cuda")
    assert _select.select("msca_strips", None, x) == "reference"


def capture(call: Callable[[], list[Tensor]]) -> tuple[list[Tensor], torch.cuda.CUDAGraph]:
    """What a call made in a CUDA graph returns, and the graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    return captured, graph
