"""``segnext data``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from . import options
from .options import command


def add(commands) -> None:
    parser = commands.add_parser("data", help="data sets: list them, check one, cut one", description="Data sets.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command(commands, "list", _data_list, "the known data sets, with the files that are expected of each")

    check = command(commands, "check", _data_check, "read a whole data set and name every fault in it")
    check.description = (
        "Reads every image and mask of a data set and names each file that is broken, has no partner, another size than its"
        " partner, or labels without a class; then tells how much there is of every class. The exit code is 1 where faults were"
        " found."
    )
    check.add_argument("root", type=Path, metavar="ROOT", help="folder of the data set")
    check.add_argument("--dataset", default="folder", metavar="NAME", help="see segnext data list (default: %(default)s)")
    check.add_argument(
        "--split", action="append", default=[], help="as train; give it again for another (default: all that are there)"
    )
    _add_workers(check)

    cut = command(commands, "cut-isaid", _data_cut_isaid, "cut the large images of iSAID into patches")
    cut.add_argument("source", type=Path, metavar="SOURCE", help="what was downloaded: images and masks under train/ and val/")
    cut.add_argument("out", type=Path, metavar="OUT", help="folder for the patches; those that are there already are left")
    cut.add_argument("--size", type=options.positive, default=896, help="of a patch in pixels (default: %(default)s)")
    cut.add_argument("--stride", type=options.positive, default=512, help="from a patch to the next (default: %(default)s)")
    _add_workers(cut)


def _add_workers(parser: argparse.ArgumentParser) -> None:
    default = min(8, os.cpu_count() or 1)
    parser.add_argument(
        "--workers", type=options.count, default=default, help="processes that read files (default: %(default)s)"
    )


def _data_list() -> int:
    from inspect import getdoc

    from ..data import DATASETS

    for name, kind in DATASETS.items():
        classes = f"{kind.classes} classes" if kind.classes else "any classes"
        print(f"{name}: {classes}; splits {', '.join(kind.splits)}\n\n{getdoc(kind.find)}\n")
    return 0


def _data_check(root: Path, dataset: str, split: list[str], workers: int) -> int:
    from ..data.check import check_splits, summary

    reports = check_splits(dataset, root, split, workers)
    print(summary(reports))
    return 1 if any(report.faults for report in reports.values()) else 0


def _data_cut_isaid(**options) -> int:
    from ..data.isaid import cut_isaid

    written = cut_isaid(**options)
    print(f"wrote {written} patches")
    return 0
