"""Fixtures of the tests of operators: the backend under test and the number of threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported: here its kernels run on the CPU

import pytest
import torch
from operators import require

from segnext_kernels import _triton

del os.environ["TRITON_INTERPRET"]
if _triton.failure is None:
    import triton_interpreter

    triton_interpreter.enable()
_triton.interpreted = False  # it is slow: only tests that ask for the backend "triton" have it serve


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every backend in turn; one that is not built is skipped with its own reason (shown by ``-ra``)."""
    if request.param == "triton":
        monkeypatch.setattr(_triton, "interpreted", True)
    require(request.param)
    return request.param


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """``torch.set_num_threads``, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
