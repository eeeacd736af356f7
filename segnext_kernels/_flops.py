"""What torch's FlopCounterMode counts for the operators: what it counts for their references in plain PyTorch.

``scale_add`` and the two operators that upsample have none by its rules, which count convolutions and matrix products alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode, flop_registry, register_flop_formula

from . import _register, _triton
from ._select import INFERENCE_OPERATORS
from .dwconv_gelu.reference import dwconv_gelu
from .msca_strips.reference import msca_strips
from .nmf.reference import nmf


def _forward(reference: Callable, *args) -> Callable[[], object]:
    """What counts: the reference on the arguments."""
    return partial(reference, *args)


def _backward(reference: Callable, grad_out: Tensor, tensors: Sequence[Tensor], needed: Sequence[bool]) -> Callable[[], object]:
    """What counts: the gradients of those tensors that need one, after a forward that does not."""
    leaves = [tensor.requires_grad_(needs) for tensor, needs in zip(tensors, needed, strict=True)]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    if not wanted:
        return lambda: None
    y = reference(*leaves)
    return partial(torch.autograd.grad, y, wanted, grad_out.to(y.dtype), allow_unused=True)


def _of_msca_strips(grad_out, x, weights, need_x, need_weights):
    needed = [need_x, *[need_weights] * len(weights)]
    return _backward(lambda x, *weights: msca_strips(x, weights), grad_out, [x, *weights], needed)


def _of_dwconv_gelu(grad_out, x, weight, bias, need_x, need_weights):
    return _backward(dwconv_gelu, grad_out, [x, weight, bias], [need_x, need_weights, need_weights])


def _of_nmf(grad_out, x, bases, factors, steps, gradient, need_x, need_bases):
    return _backward(lambda x, bases: nmf(x, bases, steps, gradient), grad_out, [x, bases], [need_x, need_bases])


def _of_nmf_projected(grad_out, x, bases, projection, factors, steps, gradient, *needed):
    return _backward(lambda x, bases, p: nmf(x, bases, steps, gradient, p), grad_out, [x, bases, projection], needed)


COUNTED = {
    "msca_strips": partial(_forward, msca_strips),
    "msca_strips_backward": _of_msca_strips,
    "dwconv_gelu": partial(_forward, dwconv_gelu),
    "dwconv_gelu_backward": _of_dwconv_gelu,
    "nmf": lambda x, bases, steps, gradient, *_: _forward(nmf, x, bases, steps, gradient),
    "nmf_and_factors": partial(_forward, nmf),
    "nmf_backward": _of_nmf,
    "nmf_projected": lambda x, bases, projection, steps, gradient, *_: _forward(nmf, x, bases, steps, gradient, projection),
    "nmf_projected_backward": _of_nmf_projected,
}
for _name in INFERENCE_OPERATORS:
    COUNTED[_name] = partial(_forward, getattr(import_module(f".{_name}.reference", __package__), _name))


def _count(prepare: Callable[..., Callable[[], object]], args: tuple) -> int:
    counted = prepare(*tree_map_only(Tensor, lambda tensor: torch.empty_like(tensor, device="meta").detach(), args))
    with FlopCounterMode(display=False) as counter:
        counted()
    return counter.get_total_flops()


def _formula(prepare: Callable[..., Callable[[], object]], *args, out_val=None) -> int:
    with ThreadPoolExecutor(1) as thread:  # where neither the caller's counter nor what it does below autograd holds
        return thread.submit(_count, prepare, args).result()


for _name, _prepare in COUNTED.items():
    for _space in (_register.NAMESPACE, _triton.NAMESPACE):
        _operator = getattr(getattr(torch.ops, _space), _name, None)
        if _operator is not None and _operator not in flop_registry:
            register_flop_formula(_operator, get_raw=True)(partial(_formula, _prepare))
