"""What was changed in a module since it was patched, and would be ignored."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from .._modules import why_must_be_called


def require_unchanged(why_not: Callable[[nn.Module], str | None], module: nn.Module) -> None:
    """Refuses a module that patch would not swap any more; ``why_not`` is its kind's."""
    reason = why_not(module)
    if reason is not None:
        raise RuntimeError(
            f"{type(module).__base__.__name__} was changed after it was patched, which the fused operator ignores: {reason}"
            " (call segnext_kernels.unpatch before, and patch again)"
        )


def require_unreplaced(module: nn.Module, *children: nn.Module) -> None:
    """What was checked when the module was patched, as far as it costs nothing at every call."""
    for child in children:
        name, parent = type(child).__name__, type(module).__base__.__name__
        if type(child) not in (nn.Conv2d, nn.GELU):
            raise RuntimeError(
                f"{name} took a place in {parent} after it was patched, where the fused operator would ignore it: call"
                " segnext_kernels.unpatch, replace, and patch again"
            )
        if why_must_be_called(name, child) is not None:
            raise RuntimeError(
                f"{name} in {parent} got hooks, as of pruning, or another forward after it was patched, which the fused"
                " operator would ignore: call segnext_kernels.unpatch before, and patch again"
            )
