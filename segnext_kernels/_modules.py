"""Whether a module is what its class says, so that what it computes is known without calling it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def on_images(function: Callable[..., Tensor], x: Tensor, *args) -> Tensor:
    """A function of images [N, C, H, W] and more, of one [C, H, W] too, which convolutions take as well."""
    return function(x[None], *args)[0] if x.dim() == 3 else function(x, *args)


def why_must_be_called(name: str, child: nn.Module) -> str | None:
    """Why a child must go on being called, None if nobody would miss it."""
    if child._forward_hooks or child._forward_pre_hooks or child._backward_hooks or child._backward_pre_hooks:
        return f"{name} has hooks, which would no longer run"
    if "forward" in vars(child):
        return f"the forward of {name} was replaced in the instance"
    return None


def is_untouched(module: nn.Module, kind: type) -> bool:
    """Whether a module is what its class says: not replaced, wrapped or parametrized, and nobody waits for it to be called."""
    return type(module) is kind and why_must_be_called("it", module) is None


def is_depthwise(convolution: nn.Module, kernel_size: tuple[int, int]) -> bool:
    """Whether a module is a depthwise convolution that keeps an image's size, and nobody waits for it to be called."""
    return (
        is_untouched(convolution, nn.Conv2d)
        and convolution.kernel_size == kernel_size
        and convolution.padding == (kernel_size[0] // 2, kernel_size[1] // 2)
        and convolution.stride == convolution.dilation == (1, 1)
        and convolution.padding_mode == "zeros"
        and convolution.in_channels == convolution.groups == convolution.out_channels
        and convolution.bias is not None
    )
