"""Peak memory of each contender, in a process of its own."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from subprocess import CalledProcessError

import torch

from segnext import speed
from segnext.model import SIZES, Config

from . import output
from .case import Case, forget_inputs
from .environment import ROOT, environment, heading, missing
from .measure import Runner
from .models import complexity, labels_case
from .operators import msca_strips_case, upsample_cross_entropy_case
from .training import training_case


@dataclass(frozen=True)
class Problem:
    """A case in one direction.

    Args:
        small: the same on little data, which loads libraries and starts threads before anything is measured.
        config: of the model whose weights don't count.
    """

    case: Case
    small: Case
    direction: str
    config: Config | None = None

    @property
    def labels(self) -> list[str]:
        """The contenders but for compiled ones, since compiling leaves memory behind."""
        return [contender.label for contender in self.case.present() if not contender.compiled]

    @property
    def weights(self) -> int:
        """Bytes in float32."""
        return 4 * complexity(self.config, (64, 64), False)[0] if self.config else 0


def _problems() -> tuple[Problem, ...]:
    dtype, classes = torch.float32, 150
    t, t_19 = SIZES["t"], replace(SIZES["t"], num_classes=19)
    return (
        Problem(msca_strips_case(64, 128, 128, dtype, batch=16), msca_strips_case(64, 8, 8, dtype), "step"),
        Problem(
            upsample_cross_entropy_case(classes, (64, 64), (512, 512), dtype, batch=2),
            upsample_cross_entropy_case(classes, (2, 2), (4, 4), dtype),
            "step",
        ),
        Problem(
            training_case("train_t", t, (512, 512), dtype, batch=2), training_case("train_t", t, (64, 64), dtype, 2), "step", t
        ),
        Problem(
            labels_case("segnext_t_labels", t_19, (1024, 2048), dtype),
            labels_case("segnext_t_labels", t_19, (64, 64), dtype),
            "forward",
            t_19,
        ),
    )


PROBLEMS = {problem.case.name: problem for problem in _problems()}


def select(name: str) -> Problem:
    """The problem of that name, or whose name alone begins so."""
    found = [problem for key, problem in PROBLEMS.items() if key.startswith(name)]
    if len(found) != 1:
        raise ValueError(f"there is no memory case {name!r}; there are {', '.join(PROBLEMS)}")
    return found[0]


def peak(problem: Problem, label: str) -> int:
    """Bytes that one contender needs beyond its inputs, its weights and the given gradient of the output.

    Taken from the process's resident memory, so that scratch memory which PyTorch's allocator doesn't see counts too; memory
    freed earlier and kept by malloc would hide some of it, so malloc gives it back first, and see :func:`peak_apart`. What
    building the contender leaves behind counts, what it needs meanwhile doesn't. Linux only.
    """
    case, direction, weights = problem.case, problem.direction, problem.weights
    y, *_ = Runner(problem.small, problem.small.contender(label)).prepare(direction)()
    contender = case.contender(label)
    contender.build()  # the shared weights and the exported file stay
    give_back()
    before = speed.resident("VmRSS")
    runner = Runner(case, contender)
    if direction != "forward" and case.gradients:
        runner.grad_out = case.grad_out(runner.inputs[0] if y.dim() else y)  # an image becomes an image, or one number
    forget_inputs()
    held = sum(tensor.nbytes for tensor in (*runner.inputs, runner.grad_out) if tensor is not None) + weights
    give_back()
    speed.reset_peak()
    results = runner.prepare(direction)()
    after = speed.resident("VmHWM")
    del results
    return after - before - held


def give_back() -> None:
    """Gives the system the memory that was freed and that malloc keeps."""
    gc.collect()
    getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)


def peak_apart(problem: Problem, label: str, threads: int) -> int:
    """:func:`peak` in a new process."""
    options = ["--threads", threads, "--case", problem.case.name, "--contender", label]
    return in_new_process(["-m", "bench", "memory", *map(str, options)])


def in_new_process(arguments: list[str]) -> int:
    """The number that Python with these arguments prints, see :func:`segnext.speed.in_new_process`."""
    return int(speed.in_new_process(arguments, returning=True, cwd=ROOT))


def run(problems: list[Problem], threads: int) -> Iterator[dict[str, object]]:
    """Yields the environment, missing peers, and the bytes of every contender of every problem so far, after each of them."""
    rows, absent = [], missing(p.case for p in problems)
    figures = {"environment": environment(), "missing_peers": absent, "rows": rows}
    for p in problems:
        for label in p.labels:
            row = {"case": p.case.name, "direction": p.direction, "contender": label, "ours": p.case.contender(label).ours}
            try:
                rows.append(row | {"bytes": peak_apart(p, label, threads)})
            except CalledProcessError as error:  # what the process said is in the terminal
                absent[f"{label} of {p.case.name}"] = f"its process ended with {error.returncode}"
            yield figures


def markdown(figures: dict[str, object]) -> str:
    """A table for every case, with every contender's part of the least that a peer needs."""
    parts = [*heading(figures), "Peak memory beyond inputs and weights."]
    for name in dict.fromkeys(row["case"] for row in figures["rows"]):
        rows = [row for row in figures["rows"] if row["case"] == name]
        least = min((row["bytes"] for row in rows if not row["ours"]), default=None)
        lines = [
            [r["contender"], f"{r['bytes'] / 2**20:.0f}", "" if least is None else f"{r['bytes'] / least:.2f}"] for r in rows
        ]
        header = ["contender", "MiB", "part of the peers' least"]
        parts.append(f"### {name}, {rows[0]['direction']}\n\n{output.table(header, lines)}")
    return "\n\n".join(parts)
