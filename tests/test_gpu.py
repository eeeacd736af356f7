"""The CUDA kernels on a GPU: ``make gpu-test``. Everything that can be seen without one is in test_cuda_kernels.py."""

from __future__ import annotations

from dataclasses import replace

import checks
import pytest
import torch
from operators import (
    BRANCH_SIZES,
    EMPTY_IMAGES,
    FUNCTIONS,
    IMAGES,
    Sample,
    arranged,
    assert_same,
    check,
    dwconv_gelu_sample,
    error,
    grad_like,
    image_layouts,
    msca_strips_sample,
    results,
    tolerance,
)

from segnext_kernels import _load, _select, explain

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SAMPLES = {"msca_strips": msca_strips_sample, "dwconv_gelu": dwconv_gelu_sample}
operators = pytest.mark.parametrize("operator", SAMPLES)
dtypes = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)


def sample_of(operator: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str = "cuda") -> Sample:
    sample = SAMPLES[operator](shape).to(dtype)
    return replace(sample, leaves=tuple(leaf.to(device) for leaf in sample.leaves))


def test_the_kernels_serve():
    assert _load.cuda_failure is None
    for operator in SAMPLES:
        assert explain(operator, sample_of(operator, (1, 3, 5, 4)).x)["cuda"] == "serves"
    other = explain("msca_strips", torch.ones(1, 2, 3, 4, device="cuda"), branch_sizes=(3, 5))["cuda"]
    assert other == f"the compiled kernels have branch sizes {BRANCH_SIZES}, got (3, 5)"


@operators
@pytest.mark.parametrize("shape", [*IMAGES, (2, 24, 70, 70), (16, 64, 64, 64), *EMPTY_IMAGES], ids=str)
@dtypes
@image_layouts
def test_values_and_gradients(operator, shape, dtype, layout):
    sample = arranged(sample_of(operator, shape, dtype), layout)
    check(sample, "cuda", grad_like(sample.x.cpu()).cuda())


@operators
@image_layouts
def test_what_every_operator_must_do(operator, layout):
    sample = arranged(sample_of(operator, (2, 17, 13, 9)), layout)
    checks.check_saved_tensors(sample, "cuda")
    checks.check_nothing_needed(sample, "cuda")
    checks.check_fake(sample, "cuda")
    y, grad_x, *_ = results(sample, "cuda")
    assert y.stride() == grad_x.stride() == sample.x.stride()
    x, *filters = sample.leaves
    weights = (x, filters) if operator == "msca_strips" else (x, *filters)
    checks.check_registration(operator, weights, (torch.ones_like(x), *weights, True, True))


@operators
@image_layouts
def test_the_same_bits_from_run_to_run(operator, layout):
    sample = arranged(sample_of(operator, (8, 64, 64, 64)), layout)
    grad_out = torch.randn_like(sample.x)
    want = results(sample, "cuda", grad_out)
    for _ in range(5):
        assert_same(results(sample, "cuda", grad_out), want)


@operators
def test_one_compiled_graph(operator):
    samples = [sample_of(operator, shape) for shape in ((2, 5, 9, 12), (3, 5, 8, 31), (4, 5, 40, 7))]

    def function(*leaves):
        return FUNCTIONS[operator](*leaves)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for sample in samples:
        torch.testing.assert_close(compiled(*sample.leaves), sample("cuda"))


@operators
@dtypes
def test_autocast(operator, dtype):
    sample = sample_of(operator, (2, 17, 13, 9))
    with torch.autocast("cuda", dtype=dtype):
        y = sample("cuda")
    assert_same([y], [sample.to(dtype)("cuda")])


@operators
def test_the_current_stream_is_used(operator):
    """Work on another stream waits for what that stream does before."""
    sample, stream = sample_of(operator, (8, 64, 64, 64)), torch.cuda.Stream()
    want = sample("cuda")
    x = torch.full_like(sample.x, torch.nan)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.copy_(sample.x)
        y = sample.with_x(x)("cuda")
    stream.synchronize()
    assert_same([y], [want])


@operators
@image_layouts
def test_graphs_capture_forward_and_backward(operator, layout):
    sample = arranged(sample_of(operator, (2, 17, 40, 70)), layout)
    leaves = tuple(leaf.detach().requires_grad_() for leaf in sample.leaves)
    grad_out = torch.randn_like(sample.x)

    def step():
        y = replace(sample, leaves=leaves)("cuda")
        return [y, *torch.autograd.grad(y, leaves, grad_out)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        leaves[0].mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    assert_same([t.detach() for t in captured], [t.detach() for t in step()])


@operators
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_device_of_x_is_used(operator):
    first, second = (sample_of(operator, (2, 17, 13, 9), device=f"cuda:{i}") for i in (0, 1))
    with torch.cuda.device(0):
        y = second("cuda")
    assert y.device.index == 1
    assert_same([y.cpu()], [first("cuda").cpu()])


@operators
@image_layouts
def test_offsets_beyond_32_bits(operator, layout):
    if torch.cuda.get_device_properties(0).total_memory < 20e9:
        pytest.skip("needs 20 GB of GPU memory")
    small = sample_of(operator, (1, 16, 512, 512), torch.float16)
    shape = (1, 8208, 512, 512)
    fmt = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x = torch.zeros(shape, dtype=torch.float16, device="cuda").to(memory_format=fmt)
    x[:, -16:] = small.x
    filters = [leaf.repeat(8208 // 16, *[1] * (leaf.dim() - 1)) for leaf in small.leaves[1:]]
    y = replace(small, leaves=(x, *filters))("cuda")
    assert error(y[:, -16:], small.exact()[0]) <= tolerance(torch.float16)


def test_float64_goes_to_the_reference():
    x = torch.ones(1, 2, 3, 4, dtype=torch.float64, device="cuda")
    assert _select.select("msca_strips", None, x) == "reference"
