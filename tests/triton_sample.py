"""Compiles a sample of the Triton kernels for GPUs that are not there; test_triton_build.py runs it in its own process.

``python -m bench triton-static`` compiles everything. Here every target has every kernel; over the targets every kernel has
every dtype and both layouts, and nmf's have the ranks and rows with most in registers. What is left out for one target is
compiled for another, so that every kind of launch and every configuration has its turn.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, replace

import torch

from bench import triton_static as static

half, brain, single = torch.float16, torch.bfloat16, torch.float32
# For every target the dtype, and whether channels (rows) lie together
KINDS = {"sm_80": (single, False), "sm_90": (brain, True), "sm_100": (half, True), "gfx942": (brain, False)}
# Those of which a target has one configuration: up to half a minute to compile, or far from filling the registers
BY_TURNS = {"strips", "gradients"} | {"activate", "add_losses", "keep_log_sum_exps", "highest"}
# Rows and rank: those of B and L, and above 64
HIGH = {"sm_80": (brain, 512, 64), "sm_90": (half, 1024, 64), "sm_100": (single, 512, 64), "gfx942": (brain, 1024, 64)}
HIGHER = {"sm_80": (single, 40, 65), "sm_90": (brain, 512, 128), "sm_100": (half, 512, 100), "gfx942": (single, 512, 128)}
# Rows of which a step holds most in registers, and GPUs that hold nothing
HELD = [("sm_80", brain, 128), ("sm_80", brain, 256), ("sm_80", half, 256), ("gfx942", single, 256)]
HELD += [("sm_90", half, 128), ("sm_90", brain, 512), ("sm_100", brain, 256)]
# Where torch allows TF32
ALLOWED = [("sm_80", single, 128), ("sm_90", single, 256), ("sm_100", single, 512)]

Jobs = list[tuple[static.Launch, str]]


def small() -> Jobs:
    """All launches at the sizes of SegNeXt-T."""
    jobs = []
    for turn, (target, kind) in enumerate(KINDS.items()):
        for call in static.calls(*kind, whole=False).values():
            for configurations in static.record(call, target):
                if configurations[0].kernel in BY_TURNS:
                    configurations = [configurations[turn % len(configurations)]]
                jobs += [(configuration, target) for configuration in configurations]
    return jobs


def high() -> Jobs:
    """Of each of nmf's kernels every second kind of launch, the others on that target with the other rank."""
    jobs = []
    for shift, sizes in enumerate((HIGH, HIGHER)):
        for turn, (target, (dtype, rows, rank)) in enumerate(sizes.items(), shift):
            kinds = defaultdict(list)  # by kernel
            for configurations in static.record(decomposition(dtype, rows, rank, KINDS[target][1], "exact"), target):
                same = kinds[configurations[0].kernel]
                if configurations not in same:
                    same.append(configurations)
            for same in kinds.values():
                for configurations in same[turn % min(2, len(same)) :: 2]:
                    jobs.append((configurations[turn // 2 % len(configurations)], target))
    return jobs


def held() -> Jobs:
    jobs = []
    for precision, sizes in (("tf32", ALLOWED), ("none", HELD)):
        torch.backends.cuda.matmul.fp32_precision = precision
        for target, dtype, rows in sizes:
            launches = static.distinct(decomposition(dtype, rows, 16, False, "one_step"), target)
            jobs += [(launch, target) for launch in launches if launch.kernel == "step"]
    return jobs


def decomposition(dtype: torch.dtype, rows: int, rank: int, last: bool, gradient: str) -> Callable[[], None]:
    return lambda: static.decomposition((2, rows, 4096), rank, dtype, last, gradients=(gradient,))


if __name__ == "__main__":
    jobs = [(replace(launch, programs=0), target) for launch, target in small() + high() + held()]
    found = static.compile_all(list(dict.fromkeys(jobs)))
    print(json.dumps([asdict(c) | {"fits": c.fits} for c in found]))
