"""The one place where operators are registered with PyTorch: schema, fake, autograd and autocast."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from types import ModuleType

import torch
from torch.utils._pytree import tree_map

from . import _load, _triton
from ._validate import AUTOCAST_DEVICES, autocasts, transformed

NAMESPACE = "segnext_kernels"
library = torch.library.Library(NAMESPACE, "DEF")


def register(
    schema: str,
    backward_schema: str | None,
    *,
    fake: Callable,
    backward_fake: Callable | None = None,
    setup_context: Callable,
    backward: Callable,
    autocast: Callable | None = None,
    triton: ModuleType | None = None,
) -> None:
    """Registers an operator and its backward operator; their kernels come from the compiled libraries, and from Triton.

    Args:
        schema: of the forward operator, without the namespace.
        backward_schema: of the backward operator; it has no derivative of its own and says so. None where another operator's
            serves, which was registered before.
        fake, backward_fake: shapes, dtypes and strides of the outputs.
        setup_context, backward: as in ``torch.library.register_autograd``; ``backward`` gets the operators' namespace before.
        autocast: ``(dtype, *args) -> args`` casts the arguments to autocast's dtype; None where they are taken as they are.
        triton: has ``forward`` and ``backward`` with the schemas' arguments; they make the same operators in a namespace of
            their own.
    """
    libraries = [_define(schema, fake)]
    if triton is not None:
        libraries.append(_triton.define(schema, triton.forward, fake))
    for lib in libraries:
        own = partial(backward, getattr(torch.ops, lib.ns))
        torch.library.register_autograd(f"{lib.ns}::{_name(schema)}", own, setup_context=setup_context, lib=lib)
        for device in AUTOCAST_DEVICES if autocast is not None else ():
            _register_autocast(lib, _name(schema), device, autocast)
    if backward_schema is None:
        return
    _define(backward_schema, backward_fake)
    if triton is not None:
        _triton.define(backward_schema, triton.backward, backward_fake)
    for lib in libraries:
        refuse = partial(_no_double_backward, _name(schema).partition("_projected")[0])
        torch.library.register_autograd(f"{lib.ns}::{_name(backward_schema)}", refuse, lib=lib)


def like_image(x, *args):
    """The fake of an operator whose result is like its image, in channels_last."""
    return torch.empty_like(x, memory_format=torch.channels_last)


def register_inference(schema: str, reference: Callable, fake: Callable = like_image, triton: ModuleType | None = None) -> None:
    """Registers an operator that serves inference alone: its backward, which programs that were traced or exported can come to,
    refuses. ``_inference.call`` does so before.

    Args:
        fake: shapes, dtypes and strides of the result.
        reference: takes the schema's arguments; serves programs that were exported where there are kernels, and run where for
            the device there are none. The public functions choose it themselves.
    """
    _define(schema, fake)
    torch.library.register_autograd(f"{NAMESPACE}::{_name(schema)}", partial(_no_derivative, _name(schema)), lib=library)
    library.impl(_name(schema), partial(_instead_of_kernels, _name(schema), reference), "CompositeExplicitAutograd")
    if triton is not None:
        _triton.define(schema, triton.forward, fake)


def operator(name: str, backend: str) -> Callable:
    """The operator by which a backend other than the reference serves."""
    return getattr(getattr(torch.ops, _triton.NAMESPACE if backend == "triton" else NAMESPACE), name)


def _define(schema: str, fake: Callable) -> torch.library.Library:
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"{NAMESPACE}::{_name(schema)}", fake, lib=library)
    return library


def _name(schema: str) -> str:
    return schema[: schema.index("(")]


def _no_double_backward(name: str, ctx, *grads):
    raise NotImplementedError(
        f"{name} has no second derivative in the fused kernels: call it with backend='reference' for double backward, or"
        " unpatch the model"
    )


def without_autocast(function: Callable, args: tuple):
    """Calls what serves inference alone, which does not cast: under autocast, too, dtypes must fit, and references compute in
    float32."""
    x = first_image(args[0])
    if isinstance(x, torch.Tensor) and autocasts(x):
        with torch.autocast(x.device.type, enabled=False):
            return function(*args)
    return function(*args)


def first_image(x: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
    """The image, or the first of a list of them; what is neither stays."""
    return x[0] if isinstance(x, (list, tuple)) and x else x


def _instead_of_kernels(name: str, reference: Callable, x: torch.Tensor | list[torch.Tensor], *args) -> torch.Tensor:
    device = first_image(x).device.type
    lacking = _load.failure if device == "cpu" and _load.failure else f"its kernels are not for {device}"
    warnings.warn(f"segnext_kernels: {name} runs in plain PyTorch, which is slower: {lacking}", stacklevel=1)
    return without_autocast(reference, (x, *args))


def _no_derivative(name: str, ctx, *grads):
    raise no_derivative(name)


def no_derivative(name: str) -> NotImplementedError:
    """What to raise where a gradient is asked for."""
    return NotImplementedError(
        f"{name} serves inference and has no derivative: call it under torch.no_grad(), or train the unfused model"
    )


def _register_autocast(lib: torch.library.Library, name: str, device: str, cast: Callable) -> None:
    operator = getattr(getattr(torch.ops, lib.ns), name).default

    def autocast_kernel(*args):
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            return operator(*cast(dtype, *args))

    lib.impl(name, autocast_kernel, f"Autocast{device.upper()}")


def run_reference(reference: Callable, autocast: Callable, x: torch.Tensor, *args) -> torch.Tensor:
    """Calls a reference as the operator would be: arguments cast once under autocast, the result in x's layout."""
    if autocasts(x):
        device = x.device.type
        x, *args = autocast(torch.get_autocast_dtype(device), x, *args)
        with torch.autocast(device, enabled=False):
            return like_layout(reference(x, *args), x)
    return like_layout(reference(x, *args), x)


def cast_tensor(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``tensor.to(dtype)``; where that does nothing, Dynamo stumbles over the result once its strides change."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def cast_floating(value, dtype: torch.dtype):
    """Casts every float32, float16 and bfloat16 tensor in a nest of arguments, as autocast does (float64 is left alone)."""

    def cast(leaf):
        eligible = isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.dtype != torch.float64
        return cast_tensor(leaf, dtype) if eligible else leaf

    return tree_map(cast, value)


def cast_filters(filters, dtype: torch.dtype):
    """Casts as :func:`cast_floating`, but for filters that are all float32: kernels take them beside 16 bits as they are."""
    return filters if all(tensor.dtype == torch.float32 for tensor in filters) else cast_floating(filters, dtype)


def is_batch_of_gradients(tensor: torch.Tensor) -> bool:
    """Whether backward is mapped over several gradients at once (``is_grads_batched``)."""
    return not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(tensor)


def gradient_of(weight: torch.Tensor, zero: bool = False) -> torch.Tensor:
    """For the gradient of a filter or the like: in contiguous order and, if the weight is so too, with its very strides. Those
    of dimensions of length 1 are free, and DistributedDataParallel wants them as the parameter has them."""
    make = torch.zeros_like if zero else torch.empty_like
    return make(weight, memory_format=torch.preserve_format if weight.is_contiguous() else torch.contiguous_format)


def like_layout(tensor: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """``tensor`` with the strides of ``model`` (same shape): itself where they agree already, else one copy."""
    if is_batch_of_gradients(tensor):
        return tensor.contiguous()  # no layout can be asked for
    if transformed() or tensor.stride() == model.stride():
        return tensor
    return torch.empty_like(model, dtype=tensor.dtype).copy_(tensor)
