"""``segnext predict``, ``demo``, ``info`` and ``table2``."""

from __future__ import annotations

import sys
from pathlib import Path

from ..model import HEADS, SIZES
from ..recipes import SHOWN
from . import options
from .options import add_device, command


def add(commands) -> None:
    predict = command(commands, "predict", _predict, "segment photographs with a checkpoint")
    predict.description = (
        "Segments photographs. For each, writes NAME_overlay.png (the photograph under the classes' colours) and NAME_mask.png"
        " (index-colour, the pixel value is the class) at the photograph's full size, and one legend.png for them all. A broken"
        " file is named and skipped; the exit code is then 1."
    )
    predict.add_argument(
        "inputs", nargs="+", type=Path, metavar="PHOTO", help="image file, or folder with image files directly inside"
    )
    options.add_weights(predict)
    predict.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the results")
    options.add_rank(predict)
    predict.add_argument(
        "--alpha", type=options.share, default=0.5, help="weight of the colours in the overlay, 0 to 1 (default: %(default)s)"
    )
    predict.add_argument(
        "--short-side",
        type=options.short_side,
        metavar="PIXELS",
        help="larger photographs are shown to the network whole, shrunk to this on the shorter side, which bounds time and"
        " memory; 0 for never (default: as evaluation shows them, resized to what the checkpoint was trained on, or to 512"
        " where it doesn't say that, and through the windows of its recipe)",
    )
    predict.add_argument(
        "--multi-scale", action="store_true", help="look at every photograph in six sizes, 0.5 to 1.75 times that"
    )
    predict.add_argument("--flip", action="store_true", help="and mirrored")
    add_device(predict)
    options.add_recipe(predict, "show photographs", SHOWN)

    demo = command(commands, "demo", _demo, "train from scratch on drawn scenes or on your photographs, and look at it")
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
    add_device(demo)

    info = command(commands, "info", _info, "parameters and multiply-accumulates of a model")
    info.add_argument("--size", choices=SIZES, default="t", help="of the model (default: %(default)s)")
    info.add_argument("--head", choices=HEADS, default="ham", help="of the model (default: %(default)s)")
    info.add_argument("--classes", type=options.positive, default=150, help="number of classes (default: %(default)s)")
    info.add_argument(
        "--image-size", type=options.image_size, default=(512, 512), metavar="HxW", help="size of the image (default: 512x512)"
    )

    table2 = command(commands, "table2", _table2, "parameters and GFLOPs of all models, with the paper's figures beside them")
    table2.add_argument(
        "--measure",
        action="store_true",
        dest="measured",
        help="adds latency and peak memory with the weights on this machine: one 512x512 image, float32, fused on the CPU",
    )
    table2.add_argument(
        "--weights",
        nargs="+",
        type=options.model_weights,
        default=[],
        metavar="MODEL=FILE",
        help="checkpoints, as T-HAM=FILE B-MSCA=FILE; adds their mIoU in one size, and in six sizes and mirrored",
    )
    table2.add_argument("--weights-dir", type=Path, metavar="DIR", help="folder with checkpoints called t-ham.pth and so on")
    table2.add_argument("--data", type=Path, metavar="ROOT", help="folder of the data set that they are evaluated on")
    table2.add_argument(
        "--recipe", default="ade20k", metavar="NAME", help="whose data format and test mode are used (default: %(default)s)"
    )
    options.add_workers(table2)
    add_device(table2, default="cpu")


def _predict(inputs: list[Path], device: str | None, **given) -> int:
    from ..predict import predict

    shown = options.take(given, SHOWN)
    broken = predict(inputs, device=device or options.best_device(), shown=shown, **given)
    print(f"wrote into {given['out']}")
    if broken:
        print(f"segnext: {len(broken)} of the files could not be read and were skipped", file=sys.stderr)
    return 1 if broken else 0


def _demo(device: str | None, **given) -> int:
    from ..demo import demo

    demo(device=device or options.best_device(), **given)
    return 0


def _info(size: str, head: str, classes: int, image_size: tuple[int, int]) -> int:
    from ..complexity import info

    print(info(size, head, num_classes=classes, image_size=image_size))
    return 0


def _table2(weights: list, weights_dir: Path | None, **given) -> int:
    from ..table2 import in_folder, table2

    print(table2(weights={**(in_folder(weights_dir) if weights_dir else {}), **dict(weights)}, **given))
    return 0
