"""What this machine can do: the speed of a large copy and of large matrix products."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from time import perf_counter

import torch
import torch.nn.functional as F

from .case import Work, device

COPY = 256 << 20  # bytes
SIDE = 2048  # of the matrices
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def measure(seconds: float = 1.0, dtypes: Iterable[torch.dtype] = tuple(DTYPES.values())) -> dict[str, float]:
    """The copy in GB/s, read and written bytes both counted, and products in GFLOP/s for each dtype.

    For bfloat16 float32's is measured too, see :func:`share`.

    Args:
        seconds: for each of them, of which the quickest call counts.
        dtypes: those of ``DTYPES`` that are asked for.
    """
    source = torch.ones(COPY, dtype=torch.uint8, device=device())
    target = torch.empty_like(source)
    found = {"copy_gbytes_per_s": 2 * COPY / _quickest(lambda: target.copy_(source), seconds) / 1e9}
    for name, dtype in DTYPES.items():
        if dtype in dtypes or torch.bfloat16 in dtypes:
            found[f"{name}_gflops_per_s"] = 2 * _side() ** 3 / _quickest_product(dtype, seconds) / 1e9
    return found


def share(ceilings: dict[str, float], work: Work, dtype: torch.dtype, seconds: float) -> tuple[float, str]:
    """The least time that the work takes at the machine's ceilings over the time it took, and which ceiling is the nearer.

    More than 1 where the data stay in the caches, which copy faster than memory. For bfloat16 the larger of both dtypes'
    products counts: some processors multiply it more slowly than float32, which it can be widened to.
    """
    reachable = DTYPES if dtype == torch.bfloat16 else ["float32"]
    product = max(ceilings[f"{name}_gflops_per_s"] for name in reachable)
    needs = {
        "memory": work.bytes / (ceilings["copy_gbytes_per_s"] * 1e9),
        "arithmetic": work.flops / (product * 1e9),
    }
    bound = max(needs, key=needs.get)
    return needs[bound] / seconds, bound


def _quickest_product(dtype: torch.dtype, seconds: float) -> float:
    """Of the ways to compute it; one that takes ten times as long as another with small matrices, where a dtype is emulated, is
    not asked for large ones, which would be a minute a call."""
    small = [_quickest(product, 0.0) for product in _products(dtype, _side() // 8)]
    large = zip(_products(dtype, _side()), small, strict=True)
    return min(_quickest(product, seconds) for product, took in large if took < 10 * min(small))


def _products(dtype: torch.dtype, side: int) -> tuple[Callable[[], object], ...]:
    """The same product as two libraries offer it: of matrices, and as a 1x1 convolution in channels_last."""
    a, b = (torch.randn(side, side, device=device()).to(dtype) for _ in range(2))
    x = a.view(1, side, 1, side).permute(0, 3, 1, 2)  # [1, channels, 1, pixels]
    return lambda: torch.mm(a, b), lambda: F.conv2d(x, b[:, :, None, None])


def _side() -> int:
    return 4 * SIDE if device().type == "cuda" else SIDE


@torch.no_grad()
@torch.backends.cudnn.flags(enabled=True, allow_tf32=False)  # which is not float32
def _quickest(call: Callable[[], object], seconds: float) -> float:
    call()
    finish = torch.cuda.synchronize if device().type == "cuda" else lambda: None
    times, end = [], perf_counter() + seconds
    while perf_counter() < end or len(times) < 3:
        finish()
        start = perf_counter()
        call()
        finish()
        times.append(perf_counter() - start)
    return min(times)
