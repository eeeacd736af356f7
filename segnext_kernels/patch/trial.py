"""Tries whether a module's own method and the fused one compute the same."""

from __future__ import annotations

import inspect
import pickle
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from .kinds import Kind, fused_class
from .twin import random_twin, twin, unlike


def difference(kind: type[Kind], module: nn.Module) -> str | None:
    """In what the plain and the fused method differ when twins of the module run them, None if they agree."""
    own, fused = (_arguments(method) for method in (getattr(type(module), kind.method), kind.fused))
    if own != fused:
        return f"its {kind.method} takes {_shown(own)}, the fused one {_shown(fused)}"
    with ExitStack() as stack:  # whatever surrounds the call of patch
        stack.enter_context(_random_numbers_of_its_own())
        stack.enter_context(torch.inference_mode(False))  # which turns gradients on too
        stack.enter_context(torch.autocast("cpu", enabled=False))
        stack.enter_context(torch.device("cpu"))
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)  # there is so little to do that threads would mostly wait for each other
        try:
            return _difference(kind, module)
        except Exception as error:  # it is somebody else's code that runs here
            return f"its {kind.method} could not be tried ({type(error).__name__}: {error})"


def _difference(kind: type[Kind], module: nn.Module) -> str | None:
    _seed(0)
    original = random_twin(module)
    first, *others = kind.trials(original, torch.float64)
    for training, arguments in ((False, first), (True, first), *((False, other) for other in others)):
        original.train(training)
        plain, fused = twin(original), twin(original)
        fused.__class__ = fused_class(kind, type(original))
        expected, drawn = _run(plain, kind.method, arguments)
        found, drawn_by_fused = _run(fused, kind.method, arguments)
        if drawn != drawn_by_fused:
            return f"its {kind.method} draws or sets random numbers, which the fused one would not"
        kept = unlike(plain, fused, _same)
        if kept:
            return f"its {kind.method} sets {', '.join(kept)}, which the fused one would not"
        for what, a, b in zip(("outputs", "gradients"), found, expected, strict=True):
            if not _same(a, b):
                mode = "training" if training else "evaluation"
                return f"its {kind.method} computes something else: the {what} differ in {mode}"
    arguments = kind.trials(original.float(), torch.float32)[0]
    plain, fused = twin(original), twin(original)
    fused.__class__ = fused_class(kind, type(original))
    if _under_autocast(plain, kind.method, arguments) != _under_autocast(fused, kind.method, arguments):
        return f"its {kind.method} does something else under autocast"
    return None


def _run(module: nn.Module, method: str, arguments: tuple) -> tuple[tuple[list, list], tuple]:
    """Outputs and, in training, gradients, and the state of random numbers afterwards; dropout draws the same every time."""
    _seed(1)
    outputs, structure = tree_flatten(getattr(module, method)(*arguments))
    gradients: tuple[Tensor, ...] = ()
    if module.training:
        total = sum(y.square().sum() for y in outputs if isinstance(y, Tensor) and y.requires_grad)
        gradients = torch.autograd.grad(total, [arguments[0], *module.parameters()], materialize_grads=True)
    return ([structure, *outputs], list(gradients)), _random_state()


def _under_autocast(module: nn.Module, method: str, arguments: tuple) -> tuple[list, bool]:
    """The outputs' dtypes, and whether anything is rounded to bfloat16: a method can turn autocast off."""
    with torch.no_grad():
        ((_, *exact), _), _ = _run(module, method, arguments)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ((_, *rounded), _), _ = _run(module, method, arguments)
    tensors = [(a, b) for a, b in zip(exact, rounded, strict=True) if isinstance(b, Tensor)]
    return [b.dtype for _, b in tensors], not all(_same(a.float(), b.float()) for a, b in tensors)


def _same(found: object, expected: object) -> bool:
    """Equal, tensors up to rounding. Objects that don't say when they are equal are, if of one type; so are modules, whose
    insides are compared by themselves."""
    if found is expected or (isinstance(found, nn.Module) and isinstance(expected, nn.Module)):
        return True
    if type(found) is not type(expected):
        return False
    if isinstance(expected, Tensor):
        rounding = 1e-8 if expected.dtype == torch.float64 else 1e-5
        largest = expected.detach().double().nan_to_num(0, 0, 0).abs().amax().item() if expected.numel() else 0
        return (
            found.shape == expected.shape
            and found.dtype == expected.dtype
            and torch.allclose(found.double(), expected.double(), rounding, rounding * max(1, largest), equal_nan=True)
        )
    if isinstance(expected, np.ndarray):
        return np.array_equal(found, expected)
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(_same(found[key], expected[key]) for key in expected)
    if isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(map(_same, found, expected))
    return type(expected).__eq__ is object.__eq__ or found == expected


def _arguments(method: Callable) -> list[tuple]:
    """Name, kind and default of all but the module itself."""
    return [(p.name, p.kind, p.default) for p in list(inspect.signature(method).parameters.values())[1:]]


def _shown(arguments: list[tuple]) -> str:
    parameters = [inspect.Parameter(name, kind, default=default) for name, kind, default in arguments]
    return str(inspect.Signature(parameters))


@contextmanager
def _random_numbers_of_its_own() -> Iterator[None]:
    python, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(python)
    np.random.set_state(of_numpy)


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def _random_state() -> tuple:
    return bytes(torch.default_generator.get_state().numpy()), random.getstate(), pickle.dumps(np.random.get_state())
