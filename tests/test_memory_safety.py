"""The CPU kernels under AddressSanitizer and UBSan, as plain functions on NumPy arrays (sanitized.py says on which), and the
operators where new memory is not zero."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import cuda_run
import pytest
from operators import compiled

HERE = Path(__file__).parent
CSRC = HERE.parent / "csrc"
COMPILER = shutil.which("g++")  # whatever CXX says: its own libasan.so is asked for

FILLED = """
import checks, torch
assert torch.empty(4096, dtype=torch.uint8).eq(0x5A).all(), "malloc does not fill"
checks.check_all_operators()
print("agreed")
"""

# Scratch memory of sizes that no call has any more, then of another one, which must be kept for the next call all the same
SCRATCH = """
#include "cpu/image.h"
int main() {
  using segnext::FreeBlocks;
  for (double size = 64; size < 1 << 20; size *= 2.1) FreeBlocks::give(FreeBlocks::take(size));
  for (int i = 0; i < 2; ++i) FreeBlocks::give({::operator new(30 << 20, std::align_val_t{64}), 30 << 20});
  const auto block = FreeBlocks::take(4 << 20);
  FreeBlocks::give(block);
  void* other = ::operator new(block.size, std::align_val_t{64});  // which would get what was freed
  return FreeBlocks::take(4 << 20).data == block.data && other != block.data ? 0 : 1;
}
"""

sanitizers = pytest.mark.skipif(
    COMPILER is None or platform.system() != "Linux", reason="needs g++ with its sanitizers, on Linux"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Of the module raw_kernels, its kernels built with sanitizers for this processor; with -O0 no access is optimized away,
    and it is built in half the time."""
    folder = tmp_path_factory.mktemp("sanitized")
    includes = subprocess.run(
        [sys.executable, "-m", "pybind11", "--includes"], check=True, capture_output=True, text=True
    ).stdout.split()
    command = [COMPILER, "-O0", "-g1", "-std=c++20", "-fPIC", "-march=native", "-w", f"-I{CSRC}", *includes]
    module = folder / "raw_kernels.o"
    subprocess.run([*command, "-c", HERE / "raw_kernels.cpp", "-o", module], check=True)
    sanitizers = [flag for flag in cuda_run.SANITIZERS["address"] if "sanitize" in flag]
    # The module comes last, so that of functions that all have the kernels' are taken.
    sources = [*sorted((CSRC / "cpu").glob("*.cpp")), module]
    subprocess.run([*command, *sanitizers, "-shared", *sources, "-o", folder / "raw_kernels.so"], check=True)
    return folder


def run(*arguments) -> subprocess.CompletedProcess[str]:
    library = subprocess.run(
        [COMPILER, "-print-file-name=libasan.so"], check=True, capture_output=True, text=True
    ).stdout.strip()
    environment = {**os.environ, "LD_PRELOAD": library, "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, HERE / "sanitized.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@sanitizers
def test_kernels_stay_in_their_memory(folder):
    done = run(folder)
    assert (done.returncode, done.stdout.strip()) == (0, "clean"), done.stderr[-4000:]


@sanitizers
def test_an_overrun_would_be_reported(folder):
    done = run(folder, "planted")
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc fills memory")
@compiled
def test_no_memory_is_taken_for_zero(backend):
    """New memory is filled with 0x5A, large numbers in every dtype, so that what is read before it is written shows."""
    tunables = "glibc.malloc.tcache_count=0"  # blocks from the cache are not filled
    environment = {**os.environ, "PYTHONPATH": str(HERE), "MALLOC_PERTURB_": "165", "GLIBC_TUNABLES": tunables}
    done = subprocess.run([sys.executable, "-c", FILLED], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout.strip()) == (0, "agreed"), done.stderr[-4000:]


@pytest.mark.skipif(COMPILER is None, reason="needs g++")
def test_scratch_memory_of_the_latest_sizes_is_kept(tmp_path):
    command = [COMPILER, "-O0", "-std=c++20", "-w", f"-I{CSRC}", "-x", "c++", "-", "-o", tmp_path / "scratch"]
    subprocess.run(command, check=True, input=SCRATCH, text=True)
    assert subprocess.run([tmp_path / "scratch"]).returncode == 0
