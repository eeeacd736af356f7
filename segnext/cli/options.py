"""What sub-commands share, and what the command line's words mean: numbers, sizes, devices, a recipe's fields."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from typing import Any, NoReturn

from ..model import HEADS, SIZES
from ..recipes import LEAST_SIDE, Recipe

MOST_RANK, MOST_WIDTH = 1024, 4096


class Parser(argparse.ArgumentParser):
    """Errors are one line, without the usage, which is a screenful here."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} ({self.prog} --help says more)\n")

    def parse_known_args(self, args=None, namespace=None):
        """With what is left over as an error of this command, not of the one above it."""
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return found, rest


def command(commands, name: str, run: Callable[..., int], summary: str) -> argparse.ArgumentParser:
    """A sub-command that calls ``run`` with its arguments."""
    parser = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
    parser.set_defaults(run=run)
    return parser


def add_weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights", required=True, help="checkpoint file (.pth, .safetensors) or the name of a hosted one, as ade20k-t"
    )


def add_rank(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rank", type=_rank, help="rank of the decomposition, in place of what the checkpoint says")


def add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=count, help="processes that read pictures (default: 2 with a GPU, none on the CPU)")


def add_device(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    chosen = default or "cuda where there is one, or cpu"
    parser.add_argument(
        "--device", type=device, default=default, help=f"as PyTorch names it: cpu, cuda, cuda:1 (default: {chosen})"
    )


def best_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def number(kind: type, text: str):
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is no {'whole ' if kind is int else ''}number") from None


def count(text: str) -> int:
    value = number(int, text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def positive(text: str) -> int:
    value = number(int, text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def _rank(text: str) -> int:
    return _at_most(positive(text), MOST_RANK, "any head has channels")


def short_side(text: str) -> int:
    value = count(text)
    if 0 < value < LEAST_SIDE:
        raise argparse.ArgumentTypeError(f"{text} is neither 0 nor at least {LEAST_SIDE}")
    return value


def width(text: str) -> int:
    return _at_most(count(text), MOST_WIDTH, "a column of a figure may have")


def _at_most(value: int, most: int, what: str) -> int:
    if value > most:
        raise argparse.ArgumentTypeError(f"{value} is more than {what}, {most}")
    return value


def seconds(text: str) -> float:
    value = number(float, text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no length of time")
    return value


def share(text: str) -> float:
    value = number(float, text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def image_size(text: str, least: int = 1) -> tuple[int, int]:
    height, cross, width = text.partition("x")
    if not (cross and height.isdecimal() and width.isdecimal() and min(int(height), int(width)) >= least):
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH, as 128x160, of at least {least} pixels each")
    return int(height), int(width)


def _pair(text: str) -> tuple[int, int]:
    parts = text.split("x")
    if len(parts) != 2 or not all(map(str.isdecimal, parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is not two whole numbers, as 512x512")
    return int(parts[0]), int(parts[1])


def model_weights(text: str) -> tuple[tuple[str, str], str]:
    model, equals, file = text.partition("=")
    size, _, head = model.lower().partition("-")
    if not (equals and file) or size not in SIZES or head not in HEADS:
        raise argparse.ArgumentTypeError(f"{text!r} is not MODEL=FILE, as T-HAM=FILE or B-MSCA=FILE")
    return (size, head), file


def region(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if len(parts) not in (2, 4) or not all(map(str.isdecimal, parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is neither X,Y nor LEFT,TOP,RIGHT,BOTTOM in pixels")
    return tuple(map(int, parts))


def demo_size(text: str) -> tuple[int, int]:
    return image_size(text, least=32)


def export_size(text: str) -> tuple[int, int]:
    return image_size(text, least=33)  # segnext.export.program.LEAST


def device(text: str) -> str:
    import torch

    try:
        chosen = torch.device(text)
        if chosen.type != "cuda":
            torch.empty(0, device=chosen).numpy(force=True)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used: {str(error).splitlines()[0]}") from None
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():  # without beginning to use it
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used: torch sees {torch.cuda.device_count()} GPUs")
    return text


def add_recipe(parser: argparse.ArgumentParser, purpose: str = "train", names: Sequence[str] | None = None) -> None:
    """An option for every field of a recipe, or for those named; what is given ends up in the namespace, the rest doesn't."""
    group = parser.add_argument_group(f"fields of the recipe, to {purpose} otherwise than it says")
    for field in (field for field in fields(Recipe) if names is None or field.name in names):
        flag, help = f"--{field.name.replace('_', '-')}", field.metadata["help"]
        if field.type == "bool":
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=help)
        else:
            kind = field.type.removesuffix(" | None")
            parse = _or_none(_PARSERS[kind]) if kind != field.type else _PARSERS[kind]
            metavar = "LONGxSHORT" if field.name == "scale" else _METAVARS[kind]
            group.add_argument(flag, type=parse, default=argparse.SUPPRESS, metavar=metavar, help=help)


def take(given: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Those options that are among the names, taken out."""
    return {name: given.pop(name) for name in names if name in given}


def overridden(stages: tuple[Recipe, ...], options: dict[str, Any]) -> tuple[Recipe, ...]:
    """The recipe's trainings with the fields that are among the options, which are taken out, in place of theirs.

    A training by the clock has no number of steps, and a warm-up in steps becomes its share of the recipe's; one of a number of
    steps does not end by the clock.
    """
    changes = take(options, [field.name for field in fields(Recipe)])
    if changes.get("seconds") is not None and "iterations" not in changes:
        return tuple(replace(stage, **{"iterations": None, "warmup": stage.warmup_share, **changes}) for stage in stages)
    if changes.get("iterations") is not None:
        changes = {"seconds": None, **changes}
    return tuple(replace(stage, **changes) for stage in stages)


def _or_none(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: None if text == "none" else parse(text)


def _two_numbers(text: str) -> tuple[float, float]:
    parts = [number(float, part) for part in text.split(",")]
    if len(parts) != 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not two numbers, as 0.5,2")
    return parts[0], parts[1]


_PARSERS: dict[str, Callable[[str], Any]] = {
    "str": str,
    "int": lambda text: number(int, text),
    "float": lambda text: number(float, text),
    "Pair": _pair,
    "tuple[float, float]": _two_numbers,
}
_METAVARS = {"str": "NAME", "int": "N", "float": "X", "Pair": "HxW", "tuple[float, float]": "X,X"}
