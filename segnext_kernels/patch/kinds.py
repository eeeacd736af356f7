"""Modules that can run a fused method instead of their own: what they look like, what may speak against it, the method."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .._modules import on_images, why_must_be_called
from .._validate import accumulator
from ..dwconv_gelu import dwconv_gelu
from ..msca_strips import msca_strips
from ..nmf import nmf
from .changed import require_unchanged, require_unreplaced

MLP_PARTS = ("fc1", "dwconv", "act", "fc2", "drop")
KIND = "_segnext_kernels_kind"


class Kind:
    """One kind of module that can run a fused method instead of its own.

    Attributes:
        operator: what the fused method runs on.
        method: the name of the method that it replaces.
    """

    operator: str
    method = "forward"

    @staticmethod
    def resembles(module: nn.Module) -> bool:
        """Whether the module looks as if it were of this kind, so that it's worth a sentence if it isn't."""
        raise NotImplementedError

    @staticmethod
    def why_not(module: nn.Module) -> str | None:
        """What in the module's structure the fused method does not have, None if it has all."""
        raise NotImplementedError

    @staticmethod
    def details(module: nn.Module) -> dict[str, object]:
        """What of the module decides on its backend, as :func:`segnext_kernels.explain` takes it."""
        return {}

    @staticmethod
    def trials(twin: nn.Module, dtype: torch.dtype) -> list[tuple]:
        """Readies a twin of the module and returns arguments to try both methods on, each a tensor with gradient first."""
        raise NotImplementedError

    @staticmethod
    def fused(self: nn.Module, *args):
        """The fused method; ``self`` is the module."""
        raise NotImplementedError


def fused_class(kind: type[Kind], plain: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a module's class that runs the fused method; everything else stays the module's own."""
    for made in plain.__subclasses__():  # weak references: a cache would keep both classes for ever
        if kind_of(made) is kind:
            return made
    members = {kind.method: kind.fused, KIND: kind, "__reduce_ex__": _reduce, "__module__": plain.__module__}
    return type(f"Fused{plain.__name__}", (plain,), members)


def kind_of(cls: type) -> type[Kind] | None:
    """The kind whose fused method the class was made for, None for classes that were not made here."""
    return vars(cls).get(KIND)


def _reduce(self: nn.Module, protocol: int) -> tuple:
    # For pickle, copy and deepcopy: a class that was made at run time cannot be found by its name, so it is made again.
    cls, plain = type(self), type(self).__base__
    make, arguments, *rest = plain.__reduce_ex__(self, max(protocol, 2))
    return _made, (kind_of(cls), make, *(plain if argument is cls else argument for argument in arguments)), *rest


def _made(kind: type[Kind], make: Callable[..., nn.Module], *arguments) -> nn.Module:
    module = make(*arguments)
    module.__class__ = fused_class(kind, type(module))
    return module


class Attention(Kind):
    """``AttentionModule`` of the official code, ``MSCAAttention`` of mmsegmentation, and others with their structure.

    The children are, in this order, a depthwise 5x5 convolution, pairs of depthwise strips 1xk and kx1, and a 1x1 convolution,
    which goes on being called, so that it may be anything.
    """

    operator = "msca_strips"

    @staticmethod
    def resembles(module: nn.Module) -> bool:
        kernels = [getattr(child, "kernel_size", None) for child in module.children() if hasattr(child, "groups")]
        kernels = [kernel for kernel in kernels if isinstance(kernel, tuple) and len(kernel) == 2]
        return any(h == 1 < w for h, w in kernels) and any(w == 1 < h for h, w in kernels)

    @staticmethod
    def why_not(module: nn.Module) -> str | None:
        first, *strips, _ = module.named_children()
        if not strips or len(strips) % 2:
            names = ", ".join(name for name, _ in module.named_children())
            return f"its children are {names}, not a 5x5 convolution, pairs of strips 1xk and kx1, and a 1x1 convolution"
        kernels = [(5, 5)]
        for _, row in strips[::2]:
            size = max(row.kernel_size) if isinstance(row, nn.Conv2d) else 1
            kernels += [(1, size), (size, 1)]
        for (name, child), kernel in zip([first, *strips], kernels, strict=True):
            reason = unlike_depthwise(name, child, kernel, getattr(first[1], "in_channels", None))
            if reason is not None:
                return reason
        return None

    @staticmethod
    def details(module: nn.Module) -> dict[str, object]:
        _, *strips, _ = module.children()
        return {"branch_sizes": tuple(max(row.kernel_size) for row in strips[::2])}

    @staticmethod
    def trials(twin: nn.Module, dtype: torch.dtype) -> list[tuple]:
        first, *others = twin.children()
        return images(first.in_channels, max(max(getattr(child, "kernel_size", (1,))) for child in others), dtype)

    @staticmethod
    def fused(self: nn.Module, x: Tensor) -> Tensor:
        *convolutions, mixing = self.children()
        require_unreplaced(self, *convolutions)
        weights = [tensor for convolution in convolutions for tensor in (convolution.weight, bias(convolution))]
        return mixing(on_images(msca_strips, x, weights)) * x


class MLP(Kind):
    """``Mlp`` of the official code, whose ``dwconv`` holds its convolution as ``dwconv.dwconv``, and of mmsegmentation."""

    operator = "dwconv_gelu"

    @staticmethod
    def resembles(module: nn.Module) -> bool:
        return {"fc1", "dwconv", "act", "fc2"} <= {name for name, _ in module.named_children()}

    @staticmethod
    def why_not(module: nn.Module) -> str | None:
        names = [name for name, _ in module.named_children()]
        if sorted(names) != sorted(MLP_PARTS):
            return f"its children are {', '.join(names)}, not {', '.join(MLP_PARTS)}"
        if not isinstance(module.fc1, nn.Conv2d):
            return f"fc1 is {type(module.fc1).__name__}, not Conv2d"
        if type(module.act) is not nn.GELU:
            return f"act is {type(module.act).__name__}, not GELU"
        if module.act.approximate != "none":
            return f"act is GELU by {module.act.approximate}, the fused operator has the erf form"
        beside = [name for name, _ in module.dwconv.named_children() if name != "dwconv"]
        if beside:
            return f"its dwconv holds {', '.join(beside)} as well"
        convolution = inner(module.dwconv)
        return (
            why_must_be_called("act", module.act)
            or why_must_be_called("dwconv", module.dwconv)
            or unlike_depthwise("dwconv", convolution, (3, 3), module.fc1.out_channels)
        )

    @staticmethod
    def trials(twin: nn.Module, dtype: torch.dtype) -> list[tuple]:
        return images(twin.fc1.in_channels, 3, dtype)

    @staticmethod
    def fused(self: nn.Module, x: Tensor) -> Tensor:
        convolution = inner(self.dwconv)
        require_unreplaced(self, convolution, self.act)
        wrapper = self.dwconv  # all of why_not at every call would take as long as a small kernel
        wrapped = wrapper is not convolution and (len(wrapper._modules) > 1 or why_must_be_called("dwconv", wrapper))
        if wrapped or self.act.approximate != "none":
            require_unchanged(MLP.why_not, self)
        x = on_images(dwconv_gelu, self.fc1(x), convolution.weight, bias(convolution))
        return self.drop(self.fc2(self.drop(x)))


class NMF(Kind):
    """``NMF2D`` of mmsegmentation. Its own ``_build_bases`` goes on drawing the bases, from the same random numbers."""

    operator = "nmf"

    @staticmethod
    def resembles(module: nn.Module) -> bool:
        return decomposes(module) and "cuda" not in arguments_of(module._build_bases)

    @staticmethod
    def details(module: nn.Module) -> dict[str, object]:
        return {"rank": module.R}

    @staticmethod
    def why_not(module: nn.Module) -> str | None:
        for name, value in (("S", 1), ("spatial", True), ("inv_t", 1), ("rand_init", True)):
            found = getattr(module, name, value)
            if found != value:
                return f"{name} is {found}, the fused operator has {value}"
        return None

    @staticmethod
    def trials(twin: nn.Module, dtype: torch.dtype) -> list[tuple]:
        # Both methods start from the same bases, and on the CPU, where the official forward never draws them.
        bases, asked, own = torch.rand(2, 6, twin.R, dtype=dtype), [], inspect.signature(twin._build_bases)

        @functools.wraps(twin._build_bases)
        def given(*shape, **place) -> Tensor:
            arguments = own.bind(*shape, **place).arguments
            asked.append({name: value for name, value in arguments.items() if name not in ("device", "cuda")})
            if asked[-1] != asked[0]:
                raise ValueError(f"_build_bases is asked for {asked[0]}, the fused method would ask for {asked[-1]}")
            return bases

        twin._build_bases = given
        positive = [(x.detach().abs().requires_grad_(),) for (x,) in images(6, 3, dtype, batch=2)]
        return [*positive, (*positive[0], True)]

    @staticmethod
    def fused(self: nn.Module, x: Tensor, return_bases: bool = False) -> Tensor:
        return decompose(self, x, self._build_bases(x.shape[0], 1, x.shape[1], self.R, device=x.device))


class OfficialNMF(NMF):
    """``NMF2D`` of the official code: its ``_build_bases`` is told whether the bases should be on a GPU instead of where."""

    @staticmethod
    def resembles(module: nn.Module) -> bool:
        return decomposes(module) and "cuda" in arguments_of(module._build_bases)

    @staticmethod
    def fused(self: nn.Module, x: Tensor, return_bases: bool = False) -> Tensor:
        return decompose(self, x, self._build_bases(x.shape[0], 1, x.shape[1], self.R, cuda=x.is_cuda))


def unlike_depthwise(name: str, child: nn.Module, kernel: tuple[int, int], channels: int | None) -> str | None:
    """What distinguishes a child from the depthwise convolution that a fused operator computes from its weight and bias."""
    if type(child) is not nn.Conv2d:
        return f"{name} is {type(child).__module__}.{type(child).__name__}, not a plain Conv2d"
    if max(kernel) % 2 == 0:
        return f"{name} has the even kernel size {max(kernel)}"
    expected = {
        "kernel_size": kernel,
        "stride": (1, 1),
        "dilation": (1, 1),
        "padding": (kernel[0] // 2, kernel[1] // 2),
        "padding_mode": "zeros",
        "in_channels": channels,
        "out_channels": channels,
        "groups": channels,
    }
    for attribute, value in expected.items():
        found = getattr(child, attribute)
        if found != value and (attribute, found) != ("padding", "same"):
            return f"{name} has {attribute} {found}, the fused operator {value}"
    reason = why_must_be_called(name, child)
    if reason is None and any(type(tensor) not in (nn.Parameter, type(None)) for tensor in (child.weight, child.bias)):
        return f"the weight or bias of {name} is not a plain Parameter"
    return reason


def inner(dwconv: nn.Module) -> nn.Module:
    """The convolution of either layout."""
    return getattr(dwconv, "dwconv", dwconv)


def bias(convolution: nn.Conv2d) -> Tensor:
    return convolution.weight.new_zeros(convolution.out_channels) if convolution.bias is None else convolution.bias


def arguments_of(function: Callable) -> set[str]:
    return set(inspect.signature(function).parameters)


def decomposes(module: nn.Module) -> bool:
    """Whether the module looks like one of the Hamburger's matrix decompositions."""
    return all(hasattr(module, name) for name in ("R", "train_steps", "eval_steps", "local_step", "_build_bases"))


def decompose(module: nn.Module, x: Tensor, bases: Tensor) -> Tensor:
    """The low-rank approximation of x [N, C, H, W] that starts from bases [N, C, R]."""
    require_unchanged(NMF.why_not, module)
    steps = module.train_steps if module.training else module.eval_steps
    return nmf(x.flatten(2), bases.to(accumulator(x.dtype)), steps).view(x.shape)


def images(channels: int, reach: int, dtype: torch.dtype, batch: int = 1) -> list[tuple[Tensor]]:
    """To try a module of images on: a small one, a high one with large values, and a wide one with a NaN; ``reach`` is that of
    its filters."""
    side = max(24, reach + 3)
    shapes = (2, channels, 3, 4), (batch, channels, side, 2), (batch, channels, 2, side)
    small, high, wide = (normal(*shape, dtype=dtype) for shape in shapes)
    high = 1000 * high
    with torch.no_grad():
        wide[0, 0, 0, 0] = torch.nan
    return [(small,), (high,), (wide,)]


def normal(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=dtype).requires_grad_()
