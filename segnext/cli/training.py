"""``segnext train``, ``evaluate`` and ``recipes``."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from .. import recipes
from . import options
from .options import command

RECIPE = "folder"  # unless another is named


def add(commands) -> None:
    train = command(commands, "train", _train, "train on your own pictures, or by one of the paper's recipes")
    train.description = (
        "Trains SegNeXt. The shortest path is --data FOLDER with images/, masks/ and classes.txt, for which the recipe is"
        " `folder`: it starts from ImageNet's encoder, which is fetched once; `scratch` starts from nothing. Several GPUs or"
        " machines: torchrun --nproc-per-node N -m segnext train ..."
    )
    train.add_argument(
        "--recipe",
        metavar="NAME",
        help=f"one of `segnext recipes`, or the recipe.json of an earlier training (default: {RECIPE})",
    )
    train.add_argument(
        "--data",
        nargs="+",
        type=Path,
        metavar="ROOT",
        help="the data set's folder; one for each training of the recipe, or one for all",
    )
    train.add_argument("--out", type=Path, metavar="RUN", help="folder for the training (default: runs/RECIPE-SIZE)")
    train.add_argument("--resume", type=Path, metavar="RUN", help="goes on with the training in this folder, by its own recipe")
    train.add_argument("--workers", type=options.count, help="processes that read pictures (default: 2)")
    train.add_argument(
        "--accumulate",
        type=options.positive,
        help="parts that a process' share of the batch is cut into, where memory is short (default: 1)",
    )
    train.add_argument(
        "--cuda-graph",
        action=argparse.BooleanOptionalAction,
        help="launch forward and backward as one on a GPU alone, which keeps the memory that they need (default: yes)",
    )
    options.add_device(train)
    options.add_recipe(train)

    evaluate = command(commands, "evaluate", _evaluate, "IoU and accuracy of a checkpoint on a labelled data set")
    options.add_weights(evaluate)
    evaluate.add_argument("--data", required=True, type=Path, metavar="ROOT", help="the data set's folder")
    evaluate.add_argument(
        "--recipe", default=RECIPE, metavar="NAME", help="whose data format and test mode are used (default: %(default)s)"
    )
    evaluate.add_argument("--split", help="of the data set (default: the recipe's, val)")
    evaluate.add_argument(
        "--multi-scale", action="store_true", help="look at every picture in six sizes, 0.5 to 1.75 times the recipe's"
    )
    evaluate.add_argument("--flip", action="store_true", help="and mirrored")
    evaluate.add_argument("--json", type=Path, metavar="FILE", dest="json_file", help="writes the figures there")
    evaluate.add_argument(
        "--save-pictures",
        type=Path,
        metavar="DIR",
        dest="pictures",
        help="writes every picture, its truth and the prediction side by side",
    )
    options.add_rank(evaluate)
    options.add_workers(evaluate)
    options.add_device(evaluate)
    options.add_recipe(evaluate, "show pictures", recipes.SHOWN)

    command(commands, "recipes", _recipes, "the recipes that train and evaluate know")


def _train(
    recipe: str | None,
    data: list[Path] | None,
    out: Path | None,
    resume: Path | None,
    workers: int | None,
    accumulate: int | None,
    cuda_graph: bool | None,
    device: str | None,
    **fields,
) -> int:
    from .. import train

    given = {"workers": workers, "accumulate": accumulate, "cuda_graph": cuda_graph, "device": device}
    given = {name: value for name, value in given.items() if value is not None}
    if resume is not None:
        if recipe or out or fields:
            raise recipes.RecipeError(
                "--resume goes by the folder's own recipe and place: give nothing else but --data, where that was moved, and"
                " the machine's options"
            )
        train.resume(resume, data or (), **given)
        return 0
    if not data:
        raise recipes.RecipeError("give --data ROOT, or --resume RUN")
    recipe, encoder = recipe or RECIPE, fields.get("encoder")
    stages = options.overridden(recipes.recipes(recipe), fields)
    if encoder is not None and stages[0].weights is not None:
        raise recipes.RecipeError(f"{stages[0].weights} is a whole model, so --encoder would change nothing: give one of them")
    machine = train.Machine(**{"device": options.best_device(), **given})
    train.train(stages, data, out or Path("runs", f"{Path(recipe).stem}-{stages[0].size}"), machine)
    return 0


def _evaluate(recipe: str, split: str | None, device: str | None, **given) -> int:
    from ..evaluate import evaluate_weights

    chosen = recipes.evaluation_recipe(recipe)
    given["shown"] = options.take(given, recipes.SHOWN)
    if split is None and recipes.recipes(recipe)[-1].val is None:
        print(f"{recipe} trains on {chosen.train} and evaluates nothing; if that has pictures of val, the figures are too good")
    evaluate_weights(recipe=replace(chosen, val=split or chosen.val), device=device or options.best_device(), **given)
    return 0


def _recipes() -> int:
    print(recipes.table())
    return 0
