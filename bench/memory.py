"""Peak memory of msca_strips forward and backward, ours and plain PyTorch's, each in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch

from .cases import msca_strips_case
from .measure import Runner

ROOT = Path(__file__).parents[1]
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
CONTENDERS = ("fused contiguous", "fused channels_last", "PyTorch contiguous", "PyTorch channels_last")


def _resident(field: str) -> int:
    return int(re.search(rf"{field}:\s+(\d+) kB", STATUS.read_text())[1]) * 1024


def peak(shape: Sequence[int], label: str) -> int:
    """Bytes that forward and backward of one contender need beyond its inputs and the given gradient of the output.

    Taken from the process's resident memory, so that scratch memory which PyTorch's allocator doesn't see counts too; memory
    freed earlier and kept by malloc would hide some of it, see :func:`peak_apart`. Linux only.
    """
    batch, channels, height, width = shape
    case = msca_strips_case(channels, height, width, torch.float32, batch)
    contender = next(c for c in case.contenders if c.label == label)
    Runner(msca_strips_case(channels, 8, 8, torch.float32), contender).prepare_backward()()  # loads libraries, starts threads
    runner = Runner(case, contender)
    runner.grad_out = case.grad_out(runner.inputs[0])
    CLEAR_REFS.write_text("5")  # the peak starts again at what is resident now
    before = _resident("VmRSS")
    gradients = runner.prepare_backward()()
    after = _resident("VmHWM")
    del gradients
    return after - before


def peak_apart(shape: Sequence[int], label: str, threads: int) -> int:
    """:func:`peak` in a new process, whose malloc gives every freed block of some size back at once."""
    command = [sys.executable, "-m", "bench", "memory", "--threads", threads, "--contender", label, "--shape", *shape]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    return int(subprocess.run([*map(str, command)], check=True, stdout=subprocess.PIPE, cwd=ROOT, env=environment).stdout)


def table(shape: Sequence[int], threads: int) -> str:
    """Markdown: the peak of every contender for a float32 image, and its part of the least that plain PyTorch needs."""
    image = 4 * prod(shape)
    peaks = {label: peak_apart(shape, label, threads) for label in CONTENDERS}
    least = min(peaks[c] for c in CONTENDERS if c.startswith("PyTorch"))
    lines = [
        f"msca_strips, forward and backward, float32, {'x'.join(map(str, shape))}, {threads} threads: peak memory beyond x"
        f" ({image / 2**20:.0f} MiB), filters and grad_out",
        "",
        "| contender | MiB | times x | part of PyTorch's least |",
        "| --- | ---: | ---: | ---: |",
    ]
    lines += [f"| {c} | {p / 2**20:.0f} | {p / image:.1f} | {p / least:.2f} |" for c, p in peaks.items()]
    return "\n".join(lines)
