"""The ``segnext`` command. What a sub-command needs is imported when it runs, so that --help is quick."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from . import options, recipes

SIZES, HEADS = ("t", "s", "b", "l"), ("ham", "msca")
TRAIN_EXTRA = ("matplotlib", "pycocotools", "scipy", "tensorboard")  # what the extra "train" has more than "models"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a sub-command.

    Returns:
        0 if all went well, 1 if files were skipped or have faults, 2 for an error, which is one line on stderr; 130 when
        interrupted.
    """
    arguments = vars(_parser().parse_args(argv))
    try:
        return arguments.pop("run")(**arguments)
    except KeyboardInterrupt:
        print("segnext: interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        missing = error.name.partition(".")[0]
        extra = "train" if missing in TRAIN_EXTRA else "models"
        print(f"segnext: this needs {missing}: pip install 'segnext-kernels[{extra}]'", file=sys.stderr)
        return 2
    except Exception as error:
        if not isinstance(error, _expected_errors()):
            raise
        print(f"segnext: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("segnext", description="Semantic segmentation with SegNeXt.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    predict = _command(commands, "predict", _predict, "segment photographs with a checkpoint")
    predict.description = (
        "Segments photographs. For each, writes NAME_overlay.png (the photograph under the classes' colours) and NAME_mask.png"
        " (index-colour, the pixel value is the class) at the photograph's full size, and one legend.png for them all. A broken"
        " file is named and skipped; the exit code is then 1."
    )
    predict.add_argument(
        "inputs", nargs="+", type=Path, metavar="PHOTO", help="image file, or folder with image files directly inside"
    )
    predict.add_argument(
        "--weights", required=True, help="checkpoint file (.pth, .safetensors) or the name of a hosted one, as ade20k-t"
    )
    predict.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the results")
    predict.add_argument("--rank", type=options.positive, help="rank of the decomposition, where the checkpoint doesn't say it")
    predict.add_argument(
        "--alpha", type=options.share, default=0.5, help="weight of the colours in the overlay, 0 to 1 (default: %(default)s)"
    )
    predict.add_argument(
        "--short-side",
        type=options.count,
        metavar="PIXELS",
        help="larger photographs are shown to the network shrunk to this on the shorter side, which bounds time and memory;"
        " 0 for never (default: what the checkpoint was trained on, or 512 where it doesn't say that)",
    )
    _add_device(predict)

    demo = _command(commands, "demo", _demo, "train from scratch on drawn scenes or on your photographs, and look at it")
    demo.description = (
        "Trains SegNeXt from random weights and shows what it learned on pictures that it was not trained on. Without --data"
        " the pictures are scenes that the program draws; nothing is downloaded."
    )
    demo.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder for pictures and checkpoint (default: demo, with --data demo/NAME where NAME is that folder's)",
    )
    demo.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="photographs: images/ and masks/ under train/ and val/, classes in classes.txt",
    )
    demo.add_argument("--seconds", type=options.seconds, help="length of the training (default: 120, with --data 180)")
    demo.add_argument("--size", choices=SIZES, default="t", help="of the model (default: %(default)s)")
    demo.add_argument("--head", choices=HEADS, default="ham", help="of the model (default: %(default)s)")
    demo.add_argument(
        "--image-size",
        type=options.demo_size,
        metavar="HxW",
        help="size of the scenes (default: 128x160); photographs keep their shape and are resized to the smaller of the two on"
        " the shorter side (default: 180x240)",
    )
    demo.add_argument(
        "--seed", type=options.count, default=0, help="of the weights and of the order of the pictures (default: %(default)s)"
    )
    _add_device(demo)

    train = _command(commands, "train", _train, "train on your own pictures, or by one of the paper's recipes")
    train.description = (
        "Trains SegNeXt. The shortest path is --data FOLDER with images/, masks/ and classes.txt, for which the recipe is"
        " `folder`: it starts from ImageNet's encoder, which is fetched once; `scratch` starts from nothing. Several GPUs or"
        " machines: torchrun --nproc-per-node N -m segnext train ..."
    )
    train.add_argument(
        "--recipe",
        default="folder",
        metavar="NAME",
        help="one of `segnext recipes`, or the recipe.json of an earlier training (default: %(default)s)",
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
    train.add_argument("--device", type=options.device, help="as PyTorch names it: cpu, cuda (default: cpu)")
    options.add_recipe(train)

    evaluate = _command(commands, "evaluate", _evaluate, "IoU and accuracy of a checkpoint on a labelled data set")
    evaluate.add_argument("--weights", required=True, help="checkpoint file, or the name of a hosted one, as ade20k-t")
    evaluate.add_argument("--data", required=True, type=Path, metavar="ROOT", help="the data set's folder")
    evaluate.add_argument(
        "--recipe", default="folder", metavar="NAME", help="whose data format and test mode are used (default: %(default)s)"
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
    evaluate.add_argument(
        "--rank", type=options.positive, help="rank of the decomposition, where the checkpoint doesn't say it"
    )
    evaluate.add_argument(
        "--workers", type=options.count, default=2, help="processes that read pictures (default: %(default)s)"
    )
    _add_device(evaluate)

    _command(commands, "recipes", _recipes, "the recipes that train and evaluate know")

    info = _command(commands, "info", _info, "parameters and multiply-accumulates of a model")
    info.add_argument("--size", choices=SIZES, default="t", help="of the model (default: %(default)s)")
    info.add_argument("--head", choices=HEADS, default="ham", help="of the model (default: %(default)s)")
    info.add_argument("--classes", type=options.positive, default=150, help="number of classes (default: %(default)s)")
    info.add_argument(
        "--image-size", type=options.image_size, default=(512, 512), metavar="HxW", help="size of the image (default: 512x512)"
    )

    _add_data(commands)

    _command(commands, "table2", _table2, "parameters and GFLOPs of all models, with the paper's figures beside them")
    return parser


def _add_data(commands) -> None:
    parser = commands.add_parser("data", help="data sets: list them, check one, cut one", description="Data sets.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    _command(commands, "list", _data_list, "the known data sets, with the files that are expected of each")

    check = _command(commands, "check", _data_check, "read a whole data set and name every fault in it")
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

    cut = _command(commands, "cut-isaid", _data_cut_isaid, "cut the large images of iSAID into patches")
    cut.add_argument("source", type=Path, metavar="SOURCE", help="what was downloaded: images and masks under train/ and val/")
    cut.add_argument("out", type=Path, metavar="OUT", help="folder for the patches; those that are there already are left")
    cut.add_argument("--size", type=_positive, default=896, help="of a patch in pixels (default: %(default)s)")
    cut.add_argument("--stride", type=_positive, default=512, help="from a patch to the next (default: %(default)s)")
    _add_workers(cut)


def _add_workers(parser: argparse.ArgumentParser) -> None:
    default = min(8, os.cpu_count() or 1)
    parser.add_argument("--workers", type=_count, default=default, help="processes that read files (default: %(default)s)")


def _command(commands, name: str, run, summary: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
    parser.set_defaults(run=run)
    return parser


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", type=options.device, default="cpu", help="as PyTorch names it: cpu, cuda, cuda:1 (default: %(default)s)"
    )


def _predict(inputs: list[Path], **options) -> int:
    from .predict import predict

    broken = predict(inputs, **options)
    if broken:
        print(f"segnext: {len(broken)} of the files could not be read and were skipped", file=sys.stderr)
    return 1 if broken else 0


def _demo(**options) -> int:
    from .demo import demo

    demo(**options)
    return 0


def _train(
    recipe: str,
    data: list[Path] | None,
    out: Path | None,
    resume: Path | None,
    workers: int | None,
    accumulate: int | None,
    device: str | None,
    **fields,
) -> int:
    from . import train

    given = {"workers": workers, "accumulate": accumulate, "device": device}
    given = {name: value for name, value in given.items() if value is not None}
    if resume is not None:
        if data or out or fields:
            raise recipes.RecipeError(
                "--resume goes by the folder's own recipe, data and place: give nothing else but the machine's options"
            )
        train.resume(resume, **given)
        return 0
    if not data:
        raise recipes.RecipeError("give --data ROOT, or --resume RUN")
    stages = options.overridden(recipes.recipes(recipe), fields)
    train.train(stages, data, out or Path("runs", f"{Path(recipe).stem}-{stages[0].size}"), train.Machine(**given))
    return 0


def _evaluate(recipe: str, split: str | None, **given) -> int:
    from .evaluate import evaluate_weights

    chosen = recipes.recipes(recipe)[0]
    evaluate_weights(recipe=replace(chosen, val=split or chosen.val or "val"), **given)
    return 0


def _recipes() -> int:
    print(recipes.table())
    return 0


def _info(size: str, head: str, classes: int, image_size: tuple[int, int]) -> int:
    from .complexity import info

    print(info(size, head, num_classes=classes, image_size=image_size))
    return 0


def _table2() -> int:
    from .complexity import table2

    print(table2())
    return 0


def _data_list() -> int:
    from inspect import getdoc

    from .data import DATASETS

    for name, kind in DATASETS.items():
        classes = f"{kind.classes} classes" if kind.classes else "any classes"
        print(f"{name}: {classes}; splits {', '.join(kind.splits)}\n\n{getdoc(kind.find)}\n")
    return 0


def _data_check(root: Path, dataset: str, split: list[str], workers: int) -> int:
    from .data.check import check_splits, summary

    reports = check_splits(dataset, root, split, workers)
    print(summary(reports))
    return 1 if any(report.faults for report in reports.values()) else 0


def _data_cut_isaid(**options) -> int:
    from .data.isaid import cut_isaid

    written = cut_isaid(**options)
    print(f"wrote {written} patches")
    return 0


def _expected_errors() -> tuple[type[Exception], ...]:
    """What is the input's fault, not the program's."""
    from .data.pairs import DataError
    from .images import ImageError
    from .predict import InputError
    from .weights import WeightsError

    return DataError, ImageError, InputError, WeightsError, recipes.RecipeError, FloatingPointError, OSError
