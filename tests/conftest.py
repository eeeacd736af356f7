"""Fixtures of the tests of operators: the backend under test and the number of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from segnext_kernels import _select


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend in turn; one that is not built is skipped with its own reason (shown by ``-ra``)."""
    reason = _select.why_not(request.param, "nmf", torch.empty(1, 1, 1))
    if reason is not None:
        pytest.skip(f"backend {request.param!r}: {reason}")
    return request.param


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """``torch.set_num_threads``, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
