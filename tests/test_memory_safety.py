"""The CPU kernels under AddressSanitizer and UBSan, as plain functions on NumPy arrays (sanitized.py says on which)."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parent / "csrc"
COMPILER = shutil.which(os.environ.get("CXX", "g++"))

pytestmark = pytest.mark.skipif(
    COMPILER is None or platform.system() != "Linux", reason="needs g++ with its sanitizers, on Linux"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Of the module raw_kernels, built with sanitizers for this processor."""
    folder = tmp_path_factory.mktemp("sanitized")
    includes = subprocess.run(
        [sys.executable, "-m", "pybind11", "--includes"], check=True, capture_output=True, text=True
    ).stdout.split()
    sources = [HERE / "raw_kernels.cpp", *sorted((CSRC / "cpu").glob("*.cpp"))]
    flags = ["-O1", "-g1", "-std=c++20", "-shared", "-fPIC", "-march=native", "-w"]
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    output = ["-o", folder / "raw_kernels.so"]
    subprocess.run([COMPILER, *flags, *sanitizers, f"-I{CSRC}", *includes, *sources, *output], check=True)
    return folder


def run(*arguments) -> subprocess.CompletedProcess[str]:
    library = subprocess.run(
        [COMPILER, "-print-file-name=libasan.so"], check=True, capture_output=True, text=True
    ).stdout.strip()
    environment = {**os.environ, "LD_PRELOAD": library, "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run([sys.executable, HERE / "sanitized.py", *arguments], capture_output=True, text=True, env=environment)


def test_kernels_stay_in_their_memory(folder):
    done = run(folder)
    assert (done.returncode, done.stdout.strip()) == (0, "clean"), done.stderr[-4000:]


def test_an_overrun_would_be_reported(folder):
    done = run(folder, "planted")
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr
