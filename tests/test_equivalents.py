"""What every docstring says after "Equivalent to::", run and compared with the operator, in the names of its arguments."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from operators import error
from torch import Tensor

import segnext_kernels as sk
from segnext_kernels._select import OPERATORS

CHANNELS, SIZE = 16, (9, 11)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def matrix(outputs: int, inputs: int) -> Tensor:
    """The weight of a 1x1 convolution."""
    return random(outputs, inputs, 1, 1) / inputs**0.5


def strips() -> list[Tensor]:
    kernels = [(5, 5), *(kernel for k in (7, 11, 21) for kernel in ((1, k), (k, 1)))]
    return [tensor for kernel in kernels for tensor in (random(CHANNELS, 1, *kernel) / 5, random(CHANNELS))]


def image(channels: int = CHANNELS, size: tuple[int, int] = SIZE) -> Tensor:
    return random(2, channels, *size)


def bases() -> Tensor:
    return random(2, CHANNELS, 4).abs()


def conv_act() -> tuple[dict, dict]:
    weight = random(8, CHANNELS, 3, 3)
    shared = dict(x=image(), bias=random(8), stride=2, kernel_size=3)
    return shared | dict(weight=sk.pack(weight), activation="gelu"), shared | dict(W=weight)


def dwconv_gelu() -> tuple[dict, dict]:
    shared = dict(x=image(), weight=random(CHANNELS, 1, 3, 3), bias=random(CHANNELS))
    return shared, shared


def group_norm_relu() -> tuple[dict, dict]:
    shared = dict(x=image(), weight=random(CHANNELS), bias=random(CHANNELS), groups=4, eps=1e-3, residual=2 * image())
    return shared, shared


def hamburger() -> tuple[dict, dict]:
    inside, outside = matrix(CHANNELS, CHANNELS), matrix(CHANNELS, CHANNELS)
    shared = dict(x=image(), bias=random(CHANNELS), bases=bases(), steps=3, groups=4, eps=1e-3)
    shared |= dict(norm_weight=random(CHANNELS), norm_bias=random(CHANNELS) / 2)
    return shared | dict(ham_in=sk.pack(inside), ham_out=outside[:, :, 0, 0]), shared | dict(W_in=inside, W_out=outside)


def mlp() -> tuple[dict, dict]:
    wide = 3 * CHANNELS
    first, second = matrix(wide, CHANNELS), matrix(CHANNELS, wide)
    shared = dict(x=image(), bias1=random(wide), depthwise=random(wide, 1, 3, 3), depthwise_bias=random(wide) / 2)
    shared |= dict(bias2=random(CHANNELS), norm_weight=random(CHANNELS), norm_bias=random(CHANNELS) / 2, eps=1e-3)
    return shared | dict(fc1=sk.pack(first), fc2=sk.pack(second)), shared | dict(W1=first, W2=second)


def msca_strips() -> tuple[dict, dict]:
    shared = dict(x=image(), weights=strips())
    return shared, shared


def nmf() -> tuple[dict, dict]:
    shared = dict(x=image().flatten(2).abs(), steps=3, projection=random(CHANNELS, CHANNELS))
    return shared | dict(bases=bases()), shared | dict(B=bases())


def resize_concat_conv() -> tuple[dict, dict]:
    matrices = [matrix(8, CHANNELS), matrix(8, 5)]
    shared = dict(maps=[image(), image(5, (3, 4))], bias=random(8))
    return shared | dict(weights=[sk.pack(weight) for weight in matrices]), shared | dict(W=matrices)


def scale_add() -> tuple[dict, dict]:
    shared = dict(x=image(), y=2 * image(), scale=random(CHANNELS), keep=torch.tensor([0.0, 1.25]))
    return shared, shared


def spatial_attention() -> tuple[dict, dict]:
    first, gate, last = (matrix(CHANNELS, CHANNELS) * factor for factor in (1, 2, 3))
    biases, scale = [random(CHANNELS) / factor for factor in (1, 2, 3)], random(CHANNELS)
    packed = [sk.pack(weight) for weight in (first, gate, last)]
    weights = [packed[0], biases[0], *strips(), packed[1], biases[1], packed[2], biases[2], scale]
    names = dict(W1=first, b1=biases[0], strips=strips(), W3=gate, b3=biases[1], W2=last, b2=biases[2], scale=scale)
    return dict(x=image(), weights=weights), dict(x=image()) | names


def upsample_argmax() -> tuple[dict, dict]:
    shared = dict(logits=image(), size=(40, 31))
    return shared, shared


def upsample_cross_entropy() -> tuple[dict, dict]:
    target = torch.randint(CHANNELS + 1, (2, 40, 31), generator=torch.Generator().manual_seed(0))
    shared = dict(logits=image(), target=target, weight=random(CHANNELS).abs(), ignore_index=CHANNELS)
    return shared, shared


MAKERS = (conv_act, dwconv_gelu, group_norm_relu, hamburger, mlp, msca_strips, nmf, resize_concat_conv, scale_add)
MAKERS += (spatial_attention, upsample_argmax, upsample_cross_entropy)


def test_every_operator_is_here():
    assert sorted(make.__name__ for make in MAKERS) == sorted(OPERATORS)


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_the_docstring_is_true(make: Callable[[], tuple[dict, dict]]):
    """All arguments have a value of their own, so that none can be mistaken for another."""
    operator = getattr(sk, make.__name__)
    block = re.search(r"Equivalent to::\n\n((?: {4}.*\n|\n)+)", inspect.getdoc(operator))[1]
    arguments, names = make()
    scope = dict(torch=torch, F=F, C=CHANNELS, dwconv_gelu=sk.dwconv_gelu, msca_strips=sk.msca_strips, nmf=sk.nmf) | names
    exec(inspect.cleandoc(block), scope)
    result = scope[re.findall(r"^ *(\w+) = ", block, re.MULTILINE)[-1]]
    got = operator(**arguments)
    assert got.shape == result.shape
    assert torch.equal(got, result) if got.dtype == torch.int64 else error(got, result.double()) < 1e-5
