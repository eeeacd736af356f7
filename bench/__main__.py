"""``python -m bench report`` times the cases, ``python -m bench memory`` compares peak memory."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from . import cases, memory, report
from .measure import measure


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        arguments.run(arguments)
    except ValueError as problem:
        print(f"bench: {problem}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(required=True)
    timing = commands.add_parser("report", help="time the cases and print Markdown")
    timing.add_argument("--case", default="*", metavar="PATTERN", help="only cases with this in the name, e.g. 'msca*float32'")
    timing.add_argument("--seconds", type=float, default=3.0, help="time for the rounds of one case in one direction")
    timing.add_argument("--without", default=[], nargs="+", metavar="NAME", help="contenders to leave out, e.g. torch.compile")
    timing.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    timing.set_defaults(run=_report)
    space = commands.add_parser("memory", help="peak memory of msca_strips, forward and backward")
    space.add_argument("--shape", type=int, nargs=4, default=(16, 64, 128, 128), metavar=("N", "C", "H", "W"))
    space.add_argument("--contender", choices=memory.CONTENDERS, help="measure this one here and print bytes")
    space.set_defaults(run=_memory)
    for command in (timing, space):
        command.add_argument("--threads", type=int, help="for PyTorch's intra-operator parallelism")
    return parser


def _report(arguments: argparse.Namespace) -> None:
    turns = [(case, direction) for case in cases.select(arguments.case) for direction in case.work]
    turns.sort(key=lambda turn: (turn[0].operator, turn[1] == "backward"))
    table, progress = [], tqdm(turns)
    for case, direction in progress:
        progress.set_description(f"{case.name} {direction}")
        contenders = tuple(c for c in case.contenders if c.name not in arguments.without)
        table += report.rows(measure(case, direction, arguments.seconds, contenders))
    print(report.markdown(table))
    if arguments.json:
        partial = arguments.json.with_name(arguments.json.name + ".partial")
        partial.write_text(json.dumps(report.as_json(table), indent=1))
        os.replace(partial, arguments.json)


def _memory(arguments: argparse.Namespace) -> None:
    if arguments.contender:
        print(memory.peak(arguments.shape, arguments.contender))
    else:
        print(memory.table(arguments.shape, torch.get_num_threads()))


if __name__ == "__main__":
    sys.exit(main())
