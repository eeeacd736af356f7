"""Tries whether a module's own method and the fused one compute the same."""

from __future__ import annotations

import copy
from collections import OrderedDict
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from .kinds import HOOKS, Kind, fused_class


def difference(kind: type[Kind], module: nn.Module) -> str | None:
    """In what the plain and the fused method differ when a twin of the module runs them, None if they agree."""
    with ExitStack() as stack:  # whatever surrounds the call of patch, and with random numbers of its own
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.inference_mode(False))  # which turns gradients on too; autocast leaves float64 alone
        stack.enter_context(torch.device("cpu"))
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)  # there is so little to do that threads would mostly wait for each other
        try:
            torch.default_generator.manual_seed(0)
            twin = _twin(module)
            arguments = kind.arguments(twin)
            return _difference(kind, twin.eval(), arguments) or _difference(kind, twin.train(), arguments)
        except Exception as error:  # it is somebody else's code that runs here
            return f"its {kind.method} could not be tried ({type(error).__name__}: {error})"


def _difference(kind: type[Kind], twin: nn.Module, arguments: tuple) -> str | None:
    """The same for the mode that the twin is in."""
    plain, before = type(twin), dict(vars(twin))
    expected = _run(twin, kind.method, arguments)
    kept = [name for name, value in vars(twin).items() if value is not before.get(name)]
    if kept:
        return f"its {kind.method} sets {', '.join(kept)}, which the fused one would not"
    twin.__class__ = fused_class(kind, plain)
    found = _run(twin, kind.method, arguments)
    twin.__class__ = plain
    for what, a, b in zip(("outputs", "gradients"), found, expected, strict=True):
        if not _agree(a, b):
            mode = "training" if twin.training else "evaluation"
            return f"its {kind.method} computes something else: the {what} differ in {mode}"
    return None


def _twin(module: nn.Module) -> nn.Module:
    """The module in float64 on the CPU, without hooks and with random parameters; it shares no tensor with the original."""
    twin = copy.copy(module)
    twin._parameters = {name: None if p is None else _random_parameter(p.shape) for name, p in module._parameters.items()}
    twin._buffers = {name: None if b is None else _copied(b) for name, b in module._buffers.items()}
    twin._modules = {name: None if child is None else _twin(child) for name, child in module._modules.items()}
    for hooks in HOOKS:
        setattr(twin, hooks, OrderedDict())
    return twin


def _random_parameter(shape: torch.Size) -> nn.Parameter:
    fan_in = max(1, shape[1:].numel())
    return nn.Parameter(torch.randn(shape, dtype=torch.float64) / fan_in**0.5)


def _copied(buffer: Tensor) -> Tensor:
    return buffer.detach().to("cpu", torch.float64 if buffer.is_floating_point() else buffer.dtype, copy=True)


def _run(module: nn.Module, method: str, arguments: tuple) -> tuple[list, list[Tensor]]:
    """The outputs and, in training, the gradients; dropout draws the same at every run."""
    torch.default_generator.manual_seed(1)
    outputs, structure = tree_flatten(getattr(module, method)(*arguments))
    gradients: tuple[Tensor, ...] = ()
    if module.training:
        total = sum(y.square().sum() for y in outputs if isinstance(y, Tensor) and y.requires_grad)
        gradients = torch.autograd.grad(total, [arguments[0], *module.parameters()], materialize_grads=True)
    return [structure, *outputs], list(gradients)


def _agree(found: list, expected: list) -> bool:
    return len(found) == len(expected) and all(map(_same, found, expected))


def _same(found: object, expected: object) -> bool:
    """Equal, tensors up to rounding."""
    if not (isinstance(found, Tensor) and isinstance(expected, Tensor)):
        return found == expected
    rounding = 1e-8 if expected.dtype == torch.float64 else 1e-5
    return found.shape == expected.shape and torch.allclose(found.double(), expected.double(), rounding, rounding)
