"""Fixtures of the tests of operators: the backend under test and the number of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from operators import require


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend in turn; one that is not built is skipped with its own reason (shown by ``-ra``)."""
    require(request.param)
    return request.param


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """``torch.set_num_threads``, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
