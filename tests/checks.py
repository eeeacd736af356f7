"""What every operator must do, whatever it computes; called by test_image_operators.py and test_nmf.py."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from dataclasses import replace

import inference
import pytest
import torch
import upsample
from operators import (
    DTYPES,
    FUNCTIONS,
    IMAGE_LAYOUTS,
    MATRIX_LAYOUTS,
    Sample,
    arrange,
    arranged,
    assert_same,
    check,
    dwconv_gelu_sample,
    grad_like,
    msca_strips_sample,
    nmf_sample,
    results,
    scale_add_sample,
    tolerance,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from segnext_kernels import _register

POISON = 4096  # elements of NaN on either side, more than any row, block or vector


def check_layout(sample: Sample, backend: str) -> None:
    """y has the strides of x; from the fused kernels the gradient of x too."""
    y, grad_x, *_ = results(sample, backend, grad_like(sample.x))
    assert y.stride() == sample.x.stride()
    if backend != "reference":
        assert grad_x.stride() == sample.x.stride()


def check_grad_out_layouts(sample: Sample, backend: str, layout: str) -> None:
    """The layout of the incoming gradient changes no bit of what goes out."""
    grad_out = arrange(grad_like(sample.x), layout)
    assert_same(results(sample, backend, grad_out), results(sample, backend, grad_out.contiguous()))


def check_other_layouts(sample: Sample, backend: str, layout: str) -> None:
    """The backward operator takes a grad_out in another layout than x's, and changes no bit of what goes out."""
    x, *filters = sample.leaves
    filters = [filters] if sample.operator == "msca_strips" else filters
    backward, grad_out = _register.operator(f"{sample.operator}_backward", backend), grad_like(x)
    other = next(name for name in IMAGE_LAYOUTS if name != layout)
    found, want = (tree_leaves(backward(arrange(grad_out, name), x, *filters, True, True)) for name in (other, layout))
    assert found[0].stride() == x.stride()
    assert_same(found, want)


def check_expanded_grad_out(sample: Sample, backend: str) -> None:
    """``y.sum().backward()`` sends one number expanded to the shape of y."""
    x = sample.x.detach().requires_grad_()
    sample.with_x(x)(backend).sum().backward()
    assert_same([x.grad], [results(sample, backend, torch.ones_like(x))[1]])


def check_needed_gradients(sample: Sample, backend: str, needed: set[int]) -> None:
    """Only the tensors at these indices need a gradient: they get the one they always get, the others none."""
    grad_out = grad_like(sample.x)
    full = results(sample, backend, grad_out)
    leaves = tuple(leaf.detach().requires_grad_(i in needed) for i, leaf in enumerate(sample.leaves))
    y = replace(sample, leaves=leaves)(backend)
    y.backward(grad_out)
    for i, (leaf, grad) in enumerate(zip(leaves, full[1:], strict=True)):
        assert (leaf.grad is not None) == (i in needed), f"tensor {i}"
        if i in needed:
            atol = 1e-5 * float(grad.abs().max()) if backend == "reference" else 0
            torch.testing.assert_close(leaf.grad, grad, rtol=0, atol=atol)


def check_nothing_needed(sample: Sample, backend: str) -> None:
    """Without a gradient to compute y is the same and carries no graph, under inference_mode too."""
    y = sample(backend)
    assert not y.requires_grad
    with torch.inference_mode():
        assert_same([sample(backend)], [y])


def check_saved_tensors(sample: Sample, backend: str) -> None:
    """Nothing but the arguments is kept for backward."""
    leaves = tuple(leaf.detach().requires_grad_() for leaf in sample.leaves)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        replace(sample, leaves=leaves)(backend)
    assert {t.data_ptr() for t in kept} <= {leaf.data_ptr() for leaf in leaves}
    assert len(kept) <= len(leaves)


def check_no_double_backward(sample: Sample, backend: str) -> None:
    """The second derivative of the compiled kernels raises a sentence that names the operator and the way out."""
    leaves = tuple(leaf.detach().requires_grad_() for leaf in sample.leaves)
    y = replace(sample, leaves=leaves)(backend)
    (grad_x,) = torch.autograd.grad(y.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(NotImplementedError, match=f"{sample.operator} has no second derivative.*backend='reference'"):
        grad_x.square().sum().backward()


def check_threads(sample: Sample, set_threads: Callable[[int], None]) -> None:
    """The same bits for every number of threads and from run to run."""
    grad_out = grad_like(sample.x)
    set_threads(1)
    want = results(sample, "cpu", grad_out)
    for threads in (1, 2, 3, 7):
        set_threads(threads)
        assert_same(results(sample, "cpu", grad_out), want)


def poisoned(tensor: Tensor) -> Tensor:
    """The same values and strides, as a view into a buffer that is NaN before and after."""
    buffer = torch.full((tensor.numel() + 2 * POISON,), torch.nan, dtype=tensor.dtype, device=tensor.device)
    view = buffer.as_strided(tensor.shape, tensor.stride(), POISON)
    return view.copy_(tensor)


def check_poison(sample: Sample, backend: str) -> None:
    """Nothing outside the arguments is read: NaN all around them changes no bit."""
    grad_out = grad_like(sample.x)
    grad_out = torch.empty_like(sample.x).copy_(grad_out)
    dirty = replace(sample, leaves=tuple(poisoned(leaf) for leaf in sample.leaves))
    assert_same(results(dirty, backend, poisoned(grad_out)), results(sample, backend, grad_out))


def check_autocast(sample: Sample, backend: str, dtype: torch.dtype) -> None:
    """Under autocast x has autocast's dtype in the operator, float32 filters stay, and float32 leaves get float32 gradients: as
    if x were cast by hand."""
    grad_out = grad_like(sample.x).to(dtype)
    leaves = tuple(leaf.detach().requires_grad_() for leaf in sample.leaves)
    with torch.autocast(sample.x.device.type, dtype=dtype):
        y = replace(sample, leaves=leaves)(backend)
    assert y.dtype == dtype
    grads = torch.autograd.grad(y, leaves, grad_out)
    assert {grad.dtype for grad in grads} == {torch.float32}
    by_hand = results(sample.with_x(sample.x.to(dtype)), backend, grad_out)
    assert_same([y, *grads], [by_hand[0], *(grad.float() for grad in by_hand[1:])])


def check_fake(sample: Sample, backend: str) -> None:
    """Under FakeTensorMode y and the gradients have the shapes, dtypes and strides of real ones."""
    real = results(sample, backend, torch.ones_like(sample.x))
    with FakeTensorMode() as mode:
        fakes = replace(sample, leaves=tuple(mode.from_tensor(leaf) for leaf in sample.leaves))
        fake = results(fakes, backend, torch.ones_like(fakes.x))
    assert [(t.shape, t.dtype, t.stride()) for t in fake] == [(t.shape, t.dtype, t.stride()) for t in real]


def check_meta(sample: Sample) -> None:
    """On the meta device the operator is shape arithmetic."""
    y = replace(sample, leaves=tuple(leaf.to("meta") for leaf in sample.leaves))()
    assert (y.device.type, y.shape, y.dtype) == ("meta", sample.x.shape, sample.x.dtype)


def check_registration(operator: str, forward: tuple, *backward: tuple, backend: str = "cpu") -> None:
    """``torch.library.opcheck`` of both operators: schema, fake, autograd, tracing with dynamic shapes. ``backward``: each an
    example of its arguments."""
    operators = torch.ops.segnext_kernels_triton if backend == "triton" else torch.ops.segnext_kernels
    torch.library.opcheck(getattr(operators, operator).default, forward)
    for example in backward:
        torch.library.opcheck(getattr(operators, f"{operator}_backward").default, example)


def check_compile(samples: list[Sample], backend: str | None, compiler: str) -> None:
    """One graph without breaks serves all these samples, and around the fused operators nothing is compiled again."""

    def function(*leaves: Tensor) -> Tensor:
        return FUNCTIONS[samples[0].operator](*leaves, **samples[0].options, backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=compiler)
    for index, sample in enumerate(samples):
        grad_out = grad_like(sample.x)
        leaves = tuple(leaf.detach().requires_grad_() for leaf in sample.leaves)
        with torch._dynamo.config.patch(error_on_recompile=index > 0 and backend == "cpu"):
            y = compiled(*leaves)
        grads = torch.autograd.grad(y, leaves, grad_out, materialize_grads=True)
        for got, want in zip([y.detach(), *grads], results(sample, backend, grad_out), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=tolerance(want.dtype) * float(want.abs().max()))


def check_gradients_of_float32(function: Callable[..., Tensor], leaves: tuple[Tensor, ...]) -> None:
    """``torch.autograd.gradcheck`` in a random direction, with steps and tolerances for float32."""
    leaves = tuple(leaf.detach().float().requires_grad_() for leaf in leaves)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it would rather have float64
        assert torch.autograd.gradcheck(function, leaves, eps=1e-2, atol=1e-2, rtol=1e-2, fast_mode=True)


def check_all_operators() -> None:
    """Values and gradients of the compiled kernels in a nutshell, for processes that are started in another environment."""
    images = [
        make(shape)
        for make in (msca_strips_sample, dwconv_gelu_sample, scale_add_sample)
        for shape in ((2, 33, 13, 21), (1, 3, 1, 40))
    ]
    matrices = [nmf_sample(2, 45, 70, 17, 6, gradient) for gradient in ("exact", "one_step")]
    samples = [*itertools.product(images, IMAGE_LAYOUTS), *itertools.product(matrices, MATRIX_LAYOUTS)]
    for (sample, layout), dtype in itertools.product(samples, DTYPES):
        sample = arranged(sample.to(dtype), layout)
        check(sample, "cpu", grad_like(sample.x))
    for (operator, make), shape, dtype in itertools.product(
        inference.MAKE.items(), inference.SHAPES[3:8], inference.PACKED_DTYPES
    ):
        inference.check(operator, make(shape, dtype), dtype, "channels_last", "cpu")
    for layout, dtype in itertools.product(IMAGE_LAYOUTS, inference.PACKED_DTYPES):
        long_rows = inference.conv_act((1, 9, 4, 260, 40), dtype, 3, 2, "gelu")
        inference.check("conv_act", long_rows, dtype, layout, "cpu")
    for (shape, size), layout, dtype in itertools.product(upsample.CASES[2:6], IMAGE_LAYOUTS, DTYPES):
        logits = upsample.draw_logits(shape, dtype, layout)
        upsample.check_labels(logits, size, "cpu")
        upsample.check_loss(logits, upsample.draw_target(shape, size), backend="cpu")
