"""Latency and peak memory of the fused models on this machine; each is measured in a process of its own."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from torch import nn

from .fuse import inference_model
from .model import create

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
SECONDS, CALLS = 2.0, 10  # of timed calls, the longer of the two


@dataclass(frozen=True)
class Speed:
    """seconds: the median call. bytes: of the weights, and the most that a call takes beside them."""

    seconds: float
    bytes: int


def measure(size: str, head: str, image_size: tuple[int, int] = (512, 512), device: str = "cpu") -> Speed:
    """The speed of a model with 150 classes, in float32, on one image: from the normalised image to logits at stride 8.

    Fused on the CPU, with as many threads as torch takes by itself; elsewhere in channels_last. Memory on the CPU is the
    process's, so that what PyTorch's allocator doesn't see counts too (Linux only).
    """
    arguments = ["-m", "segnext.speed", size, head, *map(str, image_size), device]
    seconds = float(in_new_process([*arguments, "latency"]))
    return Speed(seconds, int(in_new_process([*arguments, "memory"], returning=True)))


def in_new_process(arguments: Sequence[str], returning: bool = False, cwd: Path | None = None) -> str:
    """What Python with these arguments prints last.

    Args:
        returning: its malloc gives every freed block of some size back at once, so that memory freed earlier hides nothing of
            what is needed later.
    """
    environ = os.environ | ({"MALLOC_MMAP_THRESHOLD_": "65536"} if returning else {})
    result = subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.PIPE, cwd=cwd, env=environ)
    return result.stdout.split()[-1].decode()


def resident(field: str) -> int:
    """Bytes of this process in memory: "VmRSS" now, "VmHWM" at most since :func:`reset_peak`."""
    return int(re.search(rf"{field}:\s+(\d+) kB", STATUS.read_text())[1]) * 1024


def reset_peak() -> None:
    """The peak starts again at what is resident now."""
    CLEAR_REFS.write_text("5")


def latency(model: nn.Module, images: torch.Tensor) -> float:
    """The median call in seconds."""
    finish = torch.cuda.synchronize if images.is_cuda else lambda: None
    times: list[float] = []
    with torch.inference_mode():
        for _ in range(3):
            model(images)
        finish()
        while sum(times) < SECONDS or len(times) < CALLS:
            start = perf_counter()
            model(images)
            finish()
            times.append(perf_counter() - start)
    return median(times)


def memory(model: nn.Module, images: torch.Tensor) -> int:
    """Bytes of the weights, and the most that a call takes beside them."""
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    with torch.inference_mode():
        model(images[..., :64, :64].contiguous(memory_format=torch.channels_last))  # loads libraries, starts threads
        gc.collect()
        if images.is_cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            model(images)
            return weights + torch.cuda.max_memory_allocated() - before
        before = resident("VmRSS")
        reset_peak()
        model(images)
        return weights + resident("VmHWM") - before


def _main(size: str, head: str, height: str, width: str, device: str, what: str) -> None:
    torch.manual_seed(0)
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(torch.device(device))  # whose times and memory are asked for
    model = inference_model(create(size, head=head).eval(), torch.device(device))
    images = torch.randn(1, 3, int(height), int(width)).to(device, memory_format=torch.channels_last)
    print({"latency": latency, "memory": memory}[what](model, images))


if __name__ == "__main__":
    _main(*sys.argv[1:])
