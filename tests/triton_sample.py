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
# Rows and rank: those of B and L, and above 64
HIGH = {"sm_80": (brain, 512, 64), "sm_90": (half, 1024, 64), "sm_100": (single, 512, 64), "gfx942": (brain, 1024, 64)}
HIGHER = {"sm_80": (single, 40, 65), "sm_90": (brain, 512, 128), "sm_100": (half, 512, 100), "gfx942": (single, 512, 128)}
# Rows of which a step holds most in registers, and GPUs that hold nothing
HELD = [("sm_80", brain, 128), ("sm_80", brain, 256), ("sm_80", half, 256), ("gfx942", single, 256)]
HELD += [("sm_90", half, 128), ("sm_90", brain, 512), ("sm_100", brain, 256)]
# Where torch allows TF32
ALLOWED = [("sm_80", single, 128), ("sm_90", single, 256), ("sm_100", single, 512)]

Jobs = list[tuple[static.Launch, str]]


def by_turns(call: Callable[[], object], target: str, turn: int) -> Jobs:
    """Of each kernel two kinds of launch, or every second of more, each in one configuration; at the next turn in another."""
    kinds = defaultdict(list)  # by kernel
    for configurations in static.record(call, target):
        same = kinds[configurations[0].kernel]
        if configurations not in same:
            same.append(configurations)
    jobs = []
    for same in kinds.values():
        step = 2 if len(same) > 2 else 1
        for place in range(turn % step, len(same), step):
            configurations = same[place]
            jobs.append((configurations[(turn // step - place) % len(configurations)], target))
    return jobs


def small() -> Jobs:
    """At the sizes of SegNeXt-T."""
    jobs = []
    for turn, (target, kind) in enumerate(KINDS.items()):
        for call in static.calls(*kind, whole=False).values():
            jobs += by_turns(call, target, turn)
    return jobs


def high() -> Jobs:
    """Of nmf at high ranks; a target has the kinds that are left out of one rank with the other."""
    jobs = []
    for shift, sizes in enumerate((HIGH, HIGHER)):
        for turn, (target, (dtype, rows, rank)) in enumerate(sizes.items(), shift):
            jobs += by_turns(decomposition(dtype, rows, rank, KINDS[target][1], "exact"), target, turn)
    return jobs


def held() -> Jobs:
    jobs = []
    for precision, sizes in (("tf32", ALLOWED), ("none", HELD)):
        torch.backends.cuda.matmul.fp32_precision = precision
        for turn, (target, dtype, rows) in enumerate(sizes):
            launches = by_turns(decomposition(dtype, rows, 16, False, "one_step"), target, turn)
            jobs += [(launch, target) for launch, _ in launches if launch.kernel == "step"]
    return jobs


def decomposition(dtype: torch.dtype, rows: int, rank: int, last: bool, gradient: str) -> Callable[[], None]:
    return lambda: static.decomposition((2, rows, 4096), rank, dtype, last, gradients=(gradient,))


if __name__ == "__main__":
    jobs = [(replace(launch, programs=0), target) for launch, target in small() + high() + held()]
    found = static.compile_all(list(dict.fromkeys(jobs)))
    print(json.dumps([asdict(c) | {"fits": c.fits} for c in found]))
