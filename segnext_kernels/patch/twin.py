"""Copies of a module to try its methods on, so that nothing of the original changes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .._modules import HOOKS


def random_twin(module: nn.Module) -> nn.Module:
    """The module in float64 on the CPU with random parameters and buffers: what is neutral now can be loaded later."""
    copied = twin(module, _random_or_copied)
    for buffer in copied.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)  # positive, as variances are
    return copied


def twin(
    module: nn.Module, change: Callable[[Tensor], Tensor] | None = None, memo: dict[int, object] | None = None
) -> nn.Module:
    """The module without hooks; it shares no module, tensor or container with the original, which may be whatever inherits
    from a module, even what cannot be deepcopied. What has two places in the module is one thing in the copy too.

    Args:
        change: makes the copy's tensors, clones by default.
        memo: what has been copied, by the original's id.
    """
    change, memo = change or _clone, {} if memo is None else memo
    if id(module) not in memo:
        copied = memo[id(module)] = object.__new__(type(module))
        inside = vars(copied)  # not by setattr, which modules override
        inside["_modules"] = {
            name: None if child is None else twin(child, change, memo) for name, child in module._modules.items()
        }
        for name, value in vars(module).items():
            if name in HOOKS:
                inside[name] = OrderedDict()
            elif name != "_modules":
                inside[name] = _copied(value, change, memo)
    return memo[id(module)]


def unlike(a: nn.Module, b: nn.Module, same: Callable[[object, object], bool]) -> list[str]:
    """The names of the attributes, parameters and buffers that differ between two twins or their children."""
    found, others = [], dict(b.named_modules())
    for path, module in a.named_modules():
        left, right = _state(module), _state(others[path]) if path in others else {}
        names = [*left, *(name for name in right if name not in left)]
        differing = [name for name in names if name not in left or name not in right or not same(left[name], right[name])]
        found += [f"{path}.{name}" if path else name for name in differing]
    return found


def _state(module: nn.Module) -> dict[str, object]:
    own = {name: value for name, value in vars(module).items() if name not in ("_modules", "_parameters", "_buffers")}
    return own | module._parameters | module._buffers


def _copied(value: object, change: Callable[[Tensor], Tensor], memo: dict[int, object]) -> object:
    """A tensor or container of its own; anything else is shared."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, nn.Module):  # in an attribute that is no child, such as a list
        return twin(value, change, memo)
    if isinstance(value, Tensor):
        copied = change(value)
    elif type(value) in (dict, OrderedDict):  # others may not be what they inherit from
        copied = type(value)((key, _copied(item, change, memo)) for key, item in value.items())
    elif type(value) in (list, tuple, set):
        copied = type(value)(_copied(item, change, memo) for item in value)
    else:
        return value
    memo[id(value)] = copied
    return copied


def _clone(tensor: Tensor) -> Tensor:
    copied = tensor.detach().clone()
    return nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied


def _random_or_copied(tensor: Tensor) -> Tensor:
    if isinstance(tensor, nn.Parameter):
        fan_in = max(1, tensor.shape[1:].numel())
        return nn.Parameter(torch.randn(tensor.shape, dtype=torch.float64) / fan_in**0.5)
    dtype = torch.float64 if tensor.is_floating_point() else tensor.dtype
    if tensor.is_meta:
        return torch.ones(tensor.shape, dtype=dtype)
    return tensor.detach().to("cpu", dtype, copy=True)
