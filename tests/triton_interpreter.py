"""Mends Triton's interpreter where it differs from every GPU, in bfloat16.

It cuts float32 off instead of rounding it, and multiplies matrices of the bits. Arithmetic element by element is wrong as well;
the kernels do that in float32. It also spends more time than the kernels take on patching the whole language anew whenever a
function calls another, on listing all dtypes for each value, on checking and wrapping the same few shapes for each value and
its type, and on whether integers overflow, which it then tells nobody.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

_cast, _dot, _call = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot, InterpretedFunction.__call__
_numpy_dtype, _numpy_dtypes = interpreter._get_np_dtype, {}
_patched = set()  # modules
_block_type, _tensor = tl.block_type.__init__, tl.tensor.__init__
_block_types, _shapes = {}, {}  # what these gave a block of a shape


def enable() -> None:
    """Interprets the kernels of this process."""
    triton.knobs.propagate_env = False  # the processes that tests start have the kernels that are compiled
    triton.knobs.runtime.interpret = True
    for name in ("cast_impl", "create_fp_ext", "create_fp_trunc"):
        setattr(InterpreterBuilder, name, cast)
    InterpreterBuilder.create_dot = dot
    InterpretedFunction.__call__ = call
    options = interpreter.interpreter_builder.options
    assert not options.debug  # then overflows would be told
    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)
    interpreter._get_np_dtype = numpy_dtype
    tl.block_type.__init__ = block_type
    tl.tensor.__init__ = tensor


def cast(builder: InterpreterBuilder, source: TensorHandle, target: tl.dtype) -> TensorHandle:
    kinds = source.dtype.scalar, target.scalar
    if kinds == (tl.float32, tl.bfloat16):
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
        return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)
    if kinds == (tl.bfloat16, tl.float32):
        return TensorHandle((source.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
    return _cast(builder, source, target)


def dot(builder: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *others) -> TensorHandle:
    """Exact products of bfloat16, added up in float32, as tensor cores do it."""
    a, b = (cast(builder, operand, tl.float32) if operand.dtype.scalar == tl.bfloat16 else operand for operand in (a, b))
    return _dot(builder, a, b, *others)


def numpy_dtype(dtype: tl.dtype) -> np.dtype:
    if dtype.name not in _numpy_dtypes:
        _numpy_dtypes[dtype.name] = _numpy_dtype(dtype)
    return _numpy_dtypes[dtype.name]


def block_type(self: tl.block_type, element_ty: tl.dtype, shape: Sequence[int | tl.constexpr]) -> None:
    key = element_ty.name, *(side.value if isinstance(side, tl.constexpr) else side for side in shape)
    if key not in _block_types:
        _block_type(self, element_ty, shape)
        _block_types[key] = self.shape, self.numel, self.name
    self.element_ty = element_ty
    self.shape, self.numel, self.name = _block_types[key]


def tensor(self: tl.tensor, handle: TensorHandle, type: tl.dtype) -> None:
    shape = (*type.shape,) if type.is_block() else ()  # the language's own tuples are slow to compare
    if shape not in _shapes:
        _tensor(self, handle, type)
        _shapes[shape] = self.shape, self.numel
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = _shapes[shape]


def call(function: InterpretedFunction, *args, **kwargs) -> object:
    """One of our functions, whose language the launch has patched already, or of the language's own, patched for good at the
    first call of a module's."""
    module = function.fn.__module__
    if module in _patched or module.startswith("segnext_kernels."):
        return function.rewrite()(*args, **kwargs)
    _patched.add(module)
    return _call(function, *args, **kwargs)
