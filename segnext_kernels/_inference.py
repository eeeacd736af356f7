"""How the operators that serve inference alone are called."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import _select, _validate
from ._register import first_image, no_derivative, without_autocast


def call(operator: str, backend: str | None, validate: Callable, reference: Callable, *args) -> Tensor:
    """The answer of the backend that serves the call.

    A fused model calls dozens of these with the same good weights, and checking them in Python takes longer than some of the
    kernels. The kernels check what they need themselves; so they are asked first, and where they refuse, ``validate`` says in
    the words of the public function what is wrong, or brings the arguments into the layout that they take.

    Args:
        validate: ``(*args) -> args`` checks all arguments and returns them as the kernels take them.
        reference: the operator in plain PyTorch.
        args: of the operator; the first is an image or a list of images.
    """
    kernel = getattr(torch.ops.segnext_kernels, operator)
    if backend is None and _ready(operator, args):
        try:
            with torch._C._AutoDispatchBelowAutograd():  # for nothing of it needs a gradient
                return kernel(*args)
        except RuntimeError:
            pass
    args = without_autocast(validate, args)
    if _select.select(operator, backend, first_image(args[0])) == "reference":
        return without_autocast(reference, args)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in _tensors(args)):
        raise no_derivative(operator)
    return kernel(*args)


def _ready(operator: str, args: tuple) -> bool:
    """Whether the kernel can be asked before anything is checked. A call that is recorded must not fail, and where a tensor is
    on meta or stands in for another nothing would be refused."""
    x = first_image(args[0])
    if type(x) not in (Tensor, nn.Parameter):
        return False
    differentiated = torch.is_grad_enabled()
    for tensor in _tensors(args):
        if not tensor.is_cpu or (differentiated and tensor.requires_grad):
            return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    return not _validate.transformed() and _select.why_not("cpu", operator, x) is None


def _tensors(args: tuple) -> list[Tensor]:
    """Those among the arguments, and in lists of them."""
    found = []
    for arg in args:
        if isinstance(arg, Tensor):
            found.append(arg)
        elif isinstance(arg, (list, tuple)):
            found += [one for one in arg if isinstance(one, Tensor)]
    return found
