"""Fixtures of the tests of operators: the backend under test and the number of threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

# Processes that share the processors (pytest -n) have their part of them each, and so have those that they start.
if count := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(count))))  # read when torch is imported

import torch

os.environ["TRITON_INTERPRET"] = str(int(not torch.cuda.is_available()))  # read when Triton is imported

import pytest
from operators import require

from segnext_kernels import _select, _triton

del os.environ["TRITON_INTERPRET"]
ON_GPU = torch.cuda.is_available()  # there test_gpu.py runs Triton's kernels; elsewhere its interpreter does, on the CPU
if _triton.failure is None and not ON_GPU:
    import triton_interpreter

    triton_interpreter.enable()
    _select._why_not_interpreted = lambda x: None  # it is mended
_triton.interpreted = False  # it is slow: only tests that ask for the backend "triton" have it serve


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, set_threads) -> str:
    """Every backend in turn; one that is not built is skipped with its own reason (shown by ``-ra``)."""
    if request.param == "triton":
        if ON_GPU:
            pytest.skip("test_gpu.py runs Triton's kernels on the GPU; where none is visible they are interpreted")
        monkeypatch.setattr(_triton, "interpreted", True)
    require(request.param)
    if request.param == "cpu":
        set_threads(2)  # whatever the processes have: the kernels share their work out
    return request.param


# The files that take longest: two thirds of all the time
SLOW = ("cuda_kernels", "triton_nmf", "train", "export", "memory_safety", "triton_stencils", "notebook", "distributed")
SLOW += ("triton_build", "nmf", "fuse", "triton_upsample")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """They come first, so that in the end no process waits for another one's (``make test`` has a process take whole files)."""
    order = {f"test_{name}.py": place for place, name in enumerate(SLOW)}
    items.sort(key=lambda item: order.get(item.path.name, len(SLOW)))


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """``torch.set_num_threads``, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def one_thread(set_threads) -> None:
    """Of tiny operators on a busy machine the threads' meetings take longer than the work."""
    set_threads(1)
