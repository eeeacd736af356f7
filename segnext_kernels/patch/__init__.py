"""patch: gives the slow modules of an existing model the fused operators, in place; unpatch takes them away."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from .._select import explain
from ..nn import AttentionModule
from .kinds import MLP, NMF, Attention, Kind, OfficialNMF, fused_class, kind_of
from .losses import LossByFeat, Losses
from .trial import difference

KINDS = (Attention, MLP, NMF, OfficialNMF, LossByFeat, Losses)


@dataclass(frozen=True)
class Patched:
    """What :func:`patch` did; ``print`` shows it.

    Attributes:
        swapped: the operator that each swapped module runs on now, by the module's name in the model ("" is the model itself).
        left: why a module was left alone that resembles one that can be swapped, by its name.
        uncompiled: why no compiled kernel serves a swapped module in its present dtype and place, where it gains little, by its
            name.
    """

    swapped: dict[str, str]
    left: dict[str, str]
    uncompiled: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [
            f"swapped: {len(self.swapped)}",
            *_grouped(self.swapped),
            f"left alone: {len(self.left)}",
            *_grouped(self.left),
        ]
        if self.uncompiled:
            lines += [f"swapped, but still in plain PyTorch: {len(self.uncompiled)}", *_grouped(self.uncompiled)]
        return "\n".join(lines)


def patch(model: nn.Module) -> Patched:
    """Makes the modules of a model that are slow in plain PyTorch run on the fused operators, in place.

    They are found by their structure, whatever their classes are called: SegNeXt's attention and others built like it (any odd
    strips), the middle of its MLP, the Hamburger's NMF, and a decode head's resize and cross-entropy, as in the official code
    and in mmsegmentation. Outputs, losses and gradients stay the same up to rounding; parameters, names, state_dict, hooks,
    device and dtype are untouched.

    Equivalent to::

        attention.forward = lambda x: conv3(msca_strips(x, weights)) * x
        mlp.forward = lambda x: drop(fc2(drop(dwconv_gelu(fc1(x), weight, bias))))
        nmf2d.forward = lambda x: nmf(x.flatten(2), nmf2d._build_bases(...), steps).view(x.shape)
        head.loss_by_feat = ...  # upsample_cross_entropy(logits, labels), scaled as the head does; accuracy by upsample_argmax

    Structure says what a module might be; what it is gets tried: copies with random parameters run in float64 on the CPU,
    plain and fused, in evaluation and in training, and outputs and gradients must agree, also for a high and a wide image,
    large values and a NaN; so must what they set and draw of random numbers, and what they do under autocast. A module is left
    alone where something differs, where it holds hooks that would no longer run, and where it is compiled. What a module does
    for sizes and values that were not tried is not seen.

    The convolutions and losses in a swapped module are no longer called: before hooking, pruning, quantising or replacing them,
    or changing their attributes or the module's own, and before tracing, scripting or exporting the model to ONNX, call
    :func:`unpatch`; also before pickling it whole for somewhere without this package (the state_dict needs none). (What is
    refused otherwise: hooks, replaced convolutions and activations, losses with other attributes, and what a decomposition is
    told; a loss, or a wrapper of the MLP's convolution, of another class with the same attributes is not noticed.) The compiled
    kernels have no second derivative.

    Args:
        model: it is changed. Patch it before ``torch.compile``.

    Returns:
        What was swapped, and what was left alone and why.

    Raises:
        TypeError: the model is no module.

    Source:
        ``AttentionModule``, ``Mlp`` and ``NMF2D`` of the official code; ``MSCAAttention``, ``Mlp``, ``NMF2D``,
        ``BaseDecodeHead`` and ``CrossEntropyLoss`` of mmsegmentation 1.2.2.
    """
    _check("patch", model)
    found = [(name, module, *_judged(module)) for name, module in _modules(model)]
    swapped = [(name, module, kind) for name, module, kind, reason in found if kind is not None and reason is None]
    for _, module, kind in swapped:
        # Not a function in the instance: pickle would lose it, and in a shallow copy of the module, such as those that
        # DataParallel makes, it would use the parameters of the first.
        module.__class__ = fused_class(kind, type(module))
    return Patched(
        {name: kind.operator for name, _, kind in swapped},
        {name: reason for name, _, _, reason in found if reason is not None},
        {name: reason for name, module, kind in swapped if (reason := _uncompiled(model, module, kind)) is not None},
    )


def unpatch(model: nn.Module) -> list[str]:
    """Undoes :func:`patch`, in a copy or a part of the patched model too.

    Args:
        model: it is changed.

    Returns:
        The names of the modules that run on their own code again.

    Raises:
        TypeError: the model is no module.
        RuntimeError: since ``patch`` a module got another class, as ``fully_shard`` gives it, or another forward, as
            activation checkpointing of some libraries; nothing is changed.
    """
    _check("unpatch", model)
    fused = [(name, module) for name, module in model.named_modules() if _kinds(module)]
    for name, module in fused:
        if kind_of(type(module)) is None:
            raise RuntimeError(
                f"unpatch: {name or 'the model'} was made a {type(module).__name__} after it was patched: undo that first"
            )
        method = kind_of(type(module)).method
        if method in vars(module):
            raise RuntimeError(
                f"unpatch: the {method} of {name or 'the model'} was replaced after it was patched: undo that first"
            )
    for _, module in fused:
        module.__class__ = type(module).__base__
    return [name for name, _ in fused]


def _uncompiled(model: nn.Module, module: nn.Module, kind: type[Kind]) -> str | None:
    """Why plain PyTorch serves the fused method of a module, None if a kernel does."""
    known = (x for x in itertools.chain(module.parameters(), model.parameters()) if not nn.parameter.is_lazy(x))
    x = next(known, torch.empty(0)).detach()
    answers = explain(kind.operator, x, **kind.details(module))
    kernels = ("cpu",) if x.device.type == "cpu" else ("cuda", "triton")
    return "; ".join(dict.fromkeys(answers[name] for name in kernels)) if answers["reference"] == "serves" else None


def _check(function: str, model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be a torch.nn.Module, got {type(model).__name__}")


def _grouped(entries: dict[str, str]) -> Iterator[str]:
    """One line for all modules of which the same is said."""
    for text in dict.fromkeys(entries.values()):
        names = [name or "the model itself" for name, own in entries.items() if own == text]
        yield f"  {names[0]} ... {names[-1]} ({len(names)}): {text}" if len(names) > 1 else f"  {names[0]}: {text}"


def _modules(module: nn.Module, name: str = "", seen: set[nn.Module] | None = None) -> Iterator[tuple[str, nn.Module]]:
    """``named_modules``, but for what is inside of compiled ones."""
    seen = set() if seen is None else seen
    if module in seen:
        return
    seen.add(module)
    yield name, module
    if _compiled(module) is None:
        for child_name, child in module.named_children():
            yield from _modules(child, f"{name}.{child_name}" if name else child_name, seen)


def _kinds(module: nn.Module) -> list[type[Kind]]:
    """Those of a patched module's class and of the classes that it is made from."""
    return [kind for cls in type(module).__mro__ if (kind := kind_of(cls)) is not None]


def _compiled(module: nn.Module) -> str | None:
    if isinstance(module, torch.jit.ScriptModule):
        return "it is compiled by TorchScript"
    if isinstance(module, torch.fx.GraphModule):
        return "it is a graph of torch.fx"
    if "_orig_mod" in module._modules or module._compiled_call_impl is not None:
        return "it is compiled: patch before torch.compile"
    return None


def _judged(module: nn.Module) -> tuple[type[Kind] | None, str | None]:
    """The kind that the module resembles, if any, and why it is left alone nevertheless."""
    try:
        kind = next((kind for kind in KINDS if kind.resembles(module)), None)
        return kind, _compiled(module) or (None if kind is None else _why_not(kind, module))
    except Exception as error:  # attributes of a module can be somebody else's code
        return None, f"it could not be looked at ({type(error).__name__}: {error})"


def _why_not(kind: type[Kind], module: nn.Module) -> str | None:
    if _kinds(module) or type(module) is AttentionModule:
        return "it is fused already"
    if kind.method in vars(module):
        return f"its {kind.method} was replaced in the instance"
    return kind.why_not(module) or difference(kind, module)
