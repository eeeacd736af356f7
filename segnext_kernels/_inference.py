"""How the operators that serve inference alone are called."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import _select


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
    if backend is None and _ready(operator, args[0]):
        try:
            return kernel(*args)
        except RuntimeError:
            pass
    args = validate(*args)
    if _select.select(operator, backend, _first(args[0])) == "reference":
        return reference(*args)
    if torch.is_grad_enabled() and _first(args[0]).requires_grad:
        raise NotImplementedError(
            f"{operator} serves inference and has no derivative: call it under torch.no_grad(), or train the unfused model"
        )
    return kernel(*args)


def _first(x: Tensor | list[Tensor]) -> Tensor:
    return x if isinstance(x, Tensor) else x[0]


def _ready(operator: str, x: object) -> bool:
    x = x[0] if isinstance(x, list) and x else x
    if not isinstance(x, Tensor) or torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled()):
        return False
    return _select.why_not("cpu", operator, x) is None
