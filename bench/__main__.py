"""``python -m bench report`` times the cases, ``scaling`` a model on growing problems, ``memory`` compares peak memory,
``loop`` tells what training and evaluating cost beside the model, and ``cuda-static`` and ``triton-static`` read what is
compiled for GPUs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from tqdm import tqdm

import segnext_kernels
from segnext import speed
from segnext.checkpoint import check_folder
from segnext.cli.options import positive, seconds

from . import cases, ceilings, cuda_static, loop, memory, output, report, scaling, triton_static
from .case import DIRECTIONS, Case, Contender, run_on
from .environment import missing
from .measure import measure


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        if arguments.threads:
            torch.set_num_threads(arguments.threads)
        if arguments.device == "cpu" and (unbuilt := segnext_kernels.build_info()["missing"].get("cpu")):
            raise ValueError(f"there are no kernels to measure: {unbuilt}")
        if arguments.out:  # before hours of measuring
            check_folder(arguments.out)
        arguments.run(arguments)
    except (ValueError, OSError) as problem:
        print(f"bench: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bench: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(required=True)
    timing = commands.add_parser("report", help="time the cases and print Markdown")
    timing.add_argument("--case", default="*", metavar="PATTERN", help="only cases with this in the name, e.g. 'msca*float32'")
    timing.add_argument(
        "--without", default=[], nargs="+", metavar="PATTERN", help="contenders to leave out, e.g. '*torch.compile*'"
    )
    timing.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="which cases, and where (default: cpu)")
    timing.set_defaults(run=_report)
    growth = commands.add_parser("scaling", help="time of SegNeXt-T against image size, batch and threads")
    growth.set_defaults(run=_scaling)
    for command in (timing, growth):
        command.add_argument("--seconds", type=seconds, default=3.0, help="time for the rounds of one case in one direction")
    space = commands.add_parser("memory", help="peak memory of operators, a training step and a prediction")
    space.add_argument("--case", default="", metavar="NAME", help="only this one, e.g. msca_strips")
    space.add_argument("--contender", metavar="LABEL", help="measure this one here and print bytes")
    space.set_defaults(run=_memory)
    around = commands.add_parser("loop", help="what training and evaluating cost beside the model")
    around.add_argument(
        "--rounds", type=positive, default=12, help="steps of training for each line; evaluation takes a quarter, at least 3"
    )
    around.set_defaults(run=_loop)
    static = commands.add_parser(
        "cuda-static", help="registers, spills, occupancy and instructions of the CUDA kernels, without a GPU"
    )
    static.set_defaults(run=_cuda_static)
    ahead = commands.add_parser(
        "triton-static", help="the same of the Triton kernels, which it compiles for GPUs that are not there, and bytes moved"
    )
    ahead.add_argument("--case", default="*", metavar="PATTERN", help="only operators of this name, e.g. 'upsample*'")
    ahead.add_argument("--target", default="*", metavar="PATTERN", help="only GPUs of this name, e.g. 'sm_90'")
    ahead.set_defaults(run=_triton_static)
    for command in (static, ahead):
        command.set_defaults(threads=None, device=None)
        command.add_argument("--out", type=Path, metavar="DIR", help="also write Markdown here")
    for command in (growth, space, around):
        command.set_defaults(device="cpu")
    for command in (timing, growth, space, around):
        command.add_argument("--threads", type=positive, help="for PyTorch's intra-operator parallelism, and other runtimes")
        command.add_argument("--out", type=Path, metavar="DIR", help="also write Markdown, JSON and plots here")
    return parser


def _report(arguments: argparse.Namespace) -> None:
    chosen = cases.select(arguments.case, arguments.device)
    known = [contender for case in chosen for contender in case.contenders]
    for pattern in arguments.without:
        if not any(_is_called(contender, [pattern]) for contender in known):
            raise ValueError(f"--without {pattern}: no contender is called so")
    if arguments.device != "cpu":
        if not torch.cuda.is_available():
            raise ValueError("there is no GPU that torch can use")
        run_on(arguments.device)
        torch.backends.cudnn.benchmark = True  # PyTorch's convolutions in their best form, and our Triton kernels
    contenders = {case.name: _contenders(case, arguments.without) for case in chosen}
    turns = sorted(((case, direction) for case in chosen for direction in case.directions), key=_place)
    limits, absent = ceilings.measure(min(arguments.seconds, 1.0), {case.dtype for case in chosen}), missing(chosen)
    absent |= {c.label: "left out by --without" for c in known if _is_called(c, arguments.without)}
    table, progress = [], tqdm(turns)
    try:
        for case, direction in progress:
            progress.set_description(f"{case.name} {direction}")
            results = measure(case, direction, arguments.seconds, contenders[case.name], absent)
            table += report.rows(results, limits)
            if arguments.out:  # after every case, since all of them take long
                output.write_json(arguments.out / "report.json", report.as_json(table, limits, absent))
    finally:  # what there is, where it was interrupted
        progress.close()
        if table:
            figures = report.as_json(table, limits, absent)
            print(text := report.markdown(figures))
            _write(arguments.out, "report", figures, text)
            _plot(arguments.out, lambda folder: report.plots(table, folder))


def _contenders(case: Case, without: list[str]) -> tuple[Contender, ...]:
    left = tuple(contender for contender in case.present() if not _is_called(contender, without))
    if not any(c.ours for c in left):
        raise ValueError(f"--without {' '.join(without)} leaves nothing of ours to report for {case.name}")
    return left


def _is_called(contender: Contender, patterns: list[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns for name in (contender.name, contender.label))


def _place(turn: tuple[Case, str]) -> tuple[object, ...]:
    """Operators before models, and next to each other what the report shows in one table."""
    case, direction = turn
    return case.model, case.family, DIRECTIONS.index(direction), case.dtype != torch.float32


def _scaling(arguments: argparse.Namespace) -> None:
    for figures in scaling.run(scaling.grid(), arguments.seconds):
        _write(arguments.out, "scaling", figures, text := scaling.markdown(figures))
    print(text)
    _plot(arguments.out, lambda folder: scaling.plot(figures, folder / "scaling.png"))


def _memory(arguments: argparse.Namespace) -> None:
    if not speed.CLEAR_REFS.exists():
        raise ValueError(f"peak memory is taken from {speed.CLEAR_REFS}, which this system does not have")
    if arguments.contender:
        if not arguments.case or arguments.out:
            raise ValueError("--contender needs a --case, and writes no --out")
        print(memory.peak(memory.select(arguments.case), arguments.contender))
        return
    problems = [memory.select(arguments.case)] if arguments.case else list(memory.PROBLEMS.values())
    for figures in memory.run(problems, torch.get_num_threads()):
        _write(arguments.out, "memory", figures, text := memory.markdown(figures))
    print(text)


def _loop(arguments: argparse.Namespace) -> None:
    for figures in loop.run(arguments.rounds):
        _write(arguments.out, "loop", figures, text := loop.markdown(figures))
    print(text)


def _cuda_static(arguments: argparse.Namespace) -> None:
    binary = cuda_static.library()
    if binary is None:
        raise ValueError(f"there are no CUDA kernels to read: {segnext_kernels.build_info()['missing'].get('cuda')}")
    text = cuda_static.markdown(cuda_static.kernels(binary))
    print(text)
    if arguments.out:
        output.write(arguments.out / "cuda-static.md", text + "\n")


def _triton_static(arguments: argparse.Namespace) -> None:
    if reason := segnext_kernels.build_info()["missing"].get("triton"):
        raise ValueError(f"there are no Triton kernels to compile: {reason}")
    text = triton_static.report(arguments.case, arguments.target)
    print(text)
    if arguments.out:
        output.write(arguments.out / "triton-static.md", text + "\n")


def _write(folder: Path | None, name: str, figures: dict, text: str) -> None:
    """The Markdown and the figures if there is a folder."""
    if folder is not None:
        output.write(folder / f"{name}.md", text + "\n")
        output.write_json(folder / f"{name}.json", figures)


def _plot(folder: Path | None, plot: Callable[[Path], None]) -> None:
    """The plots if there is a folder, and matplotlib."""
    if folder is None:
        return
    if output.can_plot():
        plot(folder)
    else:
        print(f"bench: {output.NO_PLOTS}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
