"""How models are trained and tested: the paper's seven settings, and one for small sets of one's own, as data."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from .checkpoint import plain, replacing
from .errors import SegnextError

Pair = tuple[int, int]
LEAST_SIDE = 8  # pixels of what a network may be told to be shown


class RecipeError(SegnextError, ValueError):
    """A recipe, or options of a command, that cannot be found, read, or followed; the message names the field."""


def _is(kind: type) -> Callable[[object], bool]:
    return lambda value: isinstance(value, kind) and isinstance(value, bool) == (kind is bool)


def _two(is_one: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, tuple) and len(value) == 2 and all(map(is_one, value))


_KINDS = {  # the annotations of the fields: what is one, and what it is called
    "int": (_is(Integral), "a whole number"),
    "float": (_is(Real), "a number"),
    "str": (_is(str), "text"),
    "bool": (_is(bool), "true or false"),
    "Pair": (_two(_is(Integral)), "two whole numbers"),
    "tuple[float, float]": (_two(_is(Real)), "two numbers"),
}


def _about(text: str, default: Any) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Recipe:
    """One training and its evaluation. Every field is an option of ``segnext train``, whose --help explains it."""

    dataset: str = _about("format of the data set; `segnext data list` names them", "folder")
    train: str = _about("split to train on", "train")
    val: str | None = _about("split to evaluate on; none for no evaluation", "val")
    size: str = _about("of the model: t, s, b, l", "t")
    head: str = _about("of the model: ham, msca", "ham")
    rank: int | None = _about("of the Ham head's decomposition; none for that of the weights, or the paper's", None)
    encoder: str | None = _about(
        "weights that the encoder starts from: imagenet for the hosted ones of the model's size, a file, or none", "imagenet"
    )
    weights: str | None = _about(
        "whole model to start from instead, hosted or a file; its classifier is replaced where the classes are others", None
    )
    batch: int = _about("pictures in a step, over all processes and accumulated steps", 16)
    iterations: int | None = _about("length of the training in steps", 160_000)
    seconds: float | None = _about("length of the training by the clock, instead of --iterations", None)
    crop: Pair | None = _about("HxW that the network is trained on; none for what suits the pictures", (512, 512))
    scale: Pair | None = _about(
        "LONGxSHORT: pictures are resized to fit, as large as they can, into these two sides; none for what suits them, in"
        " evaluation for the recipe's own",
        (2048, 512),
    )
    ratio: tuple[float, float] = _about(
        "LOW,HIGH: in training the scale is multiplied by a random number from this range", (0.5, 2.0)
    )
    max_share: float = _about("of one class in a crop; another is tried, up to ten times", 0.75)
    distort: bool = _about("brightness, contrast, saturation and hue at random", True)
    lr: float = _about("peak learning rate of the encoder", 6e-5)
    head_lr: float = _about("the head's learning rate, as a multiple of the encoder's", 10.0)
    betas: tuple[float, float] = _about("of AdamW", (0.9, 0.999))
    weight_decay: float = _about("of AdamW, of all but the norms", 0.01)
    warmup: float = _about("steps in which the learning rate rises linearly, or below 1 their share of the training", 1500)
    warmup_start: float = _about("share of the learning rate that the warm-up begins with", 1e-6)
    power: float = _about("of the polynomial in which the learning rate then falls to 0", 1.0)
    dropout: float = _about("in the head", 0.1)
    drop_path: float | None = _about("stochastic depth of the last block; none for the paper's", None)
    balance: float = _about("classes weigh in the loss as their share of the pixels to the power of minus this", 0.0)
    sync_norm: bool = _about("batch norms see the batch of all processes", True)
    precision: str = _about(
        "float32, or autocast to bfloat16 or float16; auto: bfloat16 where it is multiplied faster", "float32"
    )
    compile: bool = _about("train through torch.compile", False)
    deterministic: bool = _about("the same bits at every run on GPUs too, which is slower there", False)
    seed: int = _about("of weights, order, augmentation and dropout", 0)
    log_every: int = _about("steps between lines of train.csv", 50)
    save_every: int = _about("steps between checkpoints to resume from", 1000)
    evaluate_every: int = _about("steps between evaluations", 8000)
    window: Pair | None = _about("HxW of the sliding window in evaluation; none for the whole picture", None)
    stride: Pair | None = _about("HxW between windows", None)
    multiple: int = _about("in evaluation both sides of the resized picture are rounded up to a multiple of this", 1)

    def __post_init__(self) -> None:
        for declared in fields(self):
            kind, optional, _ = declared.type.partition(" | None")
            value, (fits, called) = plain(getattr(self, declared.name)), _KINDS[kind]
            object.__setattr__(self, declared.name, value)
            if not fits(value) and not (optional and value is None):
                raise RecipeError(f"{declared.name} must be {called}{' or none' if optional else ''}, got {value!r}")
        if (self.seconds is None) == (self.iterations is None):
            raise RecipeError(f"give iterations or seconds, one of them: got {self.iterations} and {self.seconds}")
        if self.seconds is not None and not 0 <= self.warmup < 1:
            raise RecipeError(f"a training by the clock needs a warm-up below 1, its share of the training: got {self.warmup}")
        if not 0 <= self.warmup_share < 1:
            raise RecipeError(f"a warm-up of {self.warmup} is not shorter than the training of {self.iterations} steps")
        if (self.window is None) != (self.stride is None):
            raise RecipeError(f"window and stride go together: got {self.window} and {self.stride}")
        if self.window is not None and any(s > w for s, w in zip(self.stride, self.window, strict=True)):
            raise RecipeError(f"a stride of {self.stride} leaves gaps between windows of {self.window}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise RecipeError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and not all(0 < one < math.inf for one in (value if isinstance(value, tuple) else (value,))):
                raise RecipeError(f"{name} must be positive, got {value}")
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not all(low <= one < high for one in (value if isinstance(value, tuple) else (value,))):
                raise RecipeError(f"{name} must be at least {low} and below {high:g}, got {value}")
        if self.ratio[0] > self.ratio[1]:
            raise RecipeError(f"ratio must be a low and a high number, got {self.ratio}")

    @property
    def warmup_share(self) -> float:
        """The warm-up's share of the training."""
        return self.warmup if self.warmup < 1 else self.warmup / self.iterations

    def lr_factor(self, progress: float) -> float:
        """The learning rate's share of its peak at ``progress`` 0..1 of the training.

        Source: mmsegmentation's LinearLR, then PolyLR.
        """
        share = self.warmup_share
        if progress < share:
            return self.warmup_start + (1 - self.warmup_start) * progress / share
        return max(0.0, (1 - progress) / (1 - share)) ** self.power


_CHOICES = {
    "size": ("t", "s", "b", "l"),
    "head": ("ham", "msca"),
    "precision": ("auto", "float32", "bfloat16", "float16"),
}
_RANGES = {
    "dropout": (0, 1), "drop_path": (0, 1), "betas": (0, 1), "warmup_start": (0, 1), "seed": (0, 2**63),
    "weight_decay": (0, math.inf), "balance": (0, math.inf), "multiple": (1, 1025),
    "scale": (LEAST_SIDE, 1 << 16), "window": (LEAST_SIDE, 1 << 16),
}  # fmt: skip
_POSITIVE = (
    "rank", "batch", "iterations", "seconds", "crop", "scale", "ratio", "max_share", "lr", "head_lr", "power", "log_every",
    "save_every", "evaluate_every", "window", "stride", "multiple",
)  # fmt: skip

SHOWN = ("scale", "multiple", "window", "stride")  # how evaluation shows pictures; models and checkpoints call it so, too


def shown(of: Any) -> dict[str, Any]:
    """How evaluation shows pictures, by a recipe or to a model."""
    return {name: getattr(of, name) for name in SHOWN}


def show_as(model: Any, of: Any) -> None:
    """Has a model shown pictures as a recipe or another model has it."""
    for name, value in shown(of).items():
        setattr(model, name, value)


def asked_of_shown(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """What was asked for among ``SHOWN``: a scale of none is that of the checkpoint or recipe, no window has no stride."""
    asked = {name: value for name, value in (given or {}).items() if name != "scale" or value is not None}
    return asked | {"stride": None} if asked.get("window", ...) is None else asked


_VOC = Recipe(dataset="pascal-voc", train="trainaug", iterations=80_000)
_CONTEXT = Recipe(
    dataset="pascal-context-59", iterations=80_000, crop=(480, 480), scale=(520, 520), window=(480, 480), stride=(320, 320)
)

# Each is one training, or several of which each begins with the weights of the one before.
RECIPES: dict[str, tuple[Recipe, ...]] = {
    "ade20k": (Recipe(dataset="ade20k", multiple=32),),
    "cityscapes": (
        Recipe(
            dataset="cityscapes", batch=8, crop=(1024, 1024), scale=(2048, 1024), window=(1024, 1024), stride=(768, 768)
        ),
    ),
    "coco-stuff": (Recipe(dataset="coco-stuff", iterations=80_000, multiple=32),),
    "pascal-voc": (_VOC, replace(_VOC, train="trainval", val=None)),
    "pascal-voc-coco": (
        Recipe(dataset="coco-voc", iterations=600_000),
        replace(_VOC, train="trainval", val=None, iterations=40_000),
    ),
    "pascal-context": (_CONTEXT,),
    "pascal-context-60": (replace(_CONTEXT, dataset="pascal-context-60"),),
    "isaid": (
        Recipe(dataset="isaid", crop=(896, 896), scale=(896, 896), window=(896, 896), stride=(512, 512)),
    ),
    "folder": (
        Recipe(
            batch=8, iterations=4000, crop=None, scale=None, lr=1e-4, warmup=0.05, balance=0.3, precision="auto",
            log_every=20, save_every=200, evaluate_every=500,
        ),
    ),
    "scratch": (
        Recipe(
            encoder=None, batch=8, iterations=8000, crop=None, scale=None, ratio=(0.75, 1.5), lr=2e-3, head_lr=1.0, warmup=0.05,
            drop_path=0.0, balance=0.3, precision="auto", log_every=20, save_every=200, evaluate_every=500,
        ),
    ),
}  # fmt: skip


def recipes(name: str) -> tuple[Recipe, ...]:
    """A recipe's trainings, by its name or from a file that :func:`write` wrote.

    Raises:
        RecipeError: there is no such recipe, or the file is none.
    """
    if name in RECIPES:
        return RECIPES[name]
    if Path(name).suffix != ".json":
        raise RecipeError(f"there is no recipe {name!r}; there are {', '.join(RECIPES)}, or a .json file that a run wrote")
    return read(Path(name))[0]


def evaluation_recipe(name: str) -> Recipe:
    """The training of a recipe whose data and test mode its model is evaluated with: the last, on "val" if it names no split.

    Raises:
        RecipeError: as :func:`recipes`.
    """
    last = recipes(name)[-1]
    return replace(last, val=last.val or "val")


def table() -> str:
    """The recipes, a line for each training."""
    rows = [("recipe", "data", "trained on", "crop", "batch", "steps", "test")]
    for name, stages in RECIPES.items():
        for stage in stages:
            crop = "of the data" if stage.crop is None else _dimensions(stage.crop)
            rows.append((name, stage.dataset, stage.train, crop, str(stage.batch), f"{stage.iterations:,}", _test_mode(stage)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def _test_mode(recipe: Recipe) -> str:
    if recipe.val is None:
        return "none"
    if recipe.window is not None:
        return f"windows of {_dimensions(recipe.window)}, stride {recipe.stride[0]}"
    short = "" if recipe.scale is None else f", short side {recipe.scale[1]}"
    return f"whole{short}" + (f", multiple of {recipe.multiple}" if recipe.multiple > 1 else "")


def _dimensions(pair: Pair) -> str:
    return f"{pair[0]}x{pair[1]}"


def write(path: Path, stages: tuple[Recipe, ...], **beside: Any) -> None:
    """Writes a recipe and what else a run was started with as JSON, whole or not at all."""
    with replacing(path) as file:
        file.write(json.dumps({"recipe": [asdict(stage) for stage in stages], **beside}, indent=1).encode())


def read(path: str | os.PathLike[str]) -> tuple[tuple[Recipe, ...], dict[str, Any]]:
    """What :func:`write` wrote: the recipe's trainings, and the rest.

    Raises:
        RecipeError: the file cannot be read, or holds no recipe.
    """
    try:
        beside = json.loads(Path(path).read_text())
        stages = tuple(from_dict(stage) for stage in beside.pop("recipe"))
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecipeError(f"{path} is no recipe: {error}") from error
    if not stages:
        raise RecipeError(f"{path} is no recipe: it holds no training")
    return stages, beside


def require_fields(kind: type, values: Mapping[str, Any], name: str) -> None:
    """Raises a RecipeError, in which ``kind`` is called ``name``, for values of which this dataclass has no fields."""
    if unknown := values.keys() - {field.name for field in fields(kind)}:
        raise RecipeError(f"{name} has no {', '.join(sorted(unknown))}")


def from_dict(values: Mapping[str, Any]) -> Recipe:
    """A recipe from what ``dataclasses.asdict`` made of it, also after JSON, which has no tuples."""
    require_fields(Recipe, values, "a recipe")
    return Recipe(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
