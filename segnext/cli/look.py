"""``segnext gradcam``, ``segnext compare`` and ``segnext serve``."""

from __future__ import annotations

from pathlib import Path

from . import options
from .options import command

LAYERS = ("stage1", "stage2", "stage3", "stage4", "head")
CONVNEXTS = ("convnext_tiny", "convnext_small", "convnext_base", "convnext_large")
MASKS = ("folder", "ade20k", "cityscapes", "coco-stuff")


def add(commands) -> None:
    gradcam = command(commands, "gradcam", _gradcam, "heat maps: where in photographs a model finds a class")
    gradcam.description = (
        "Draws Grad-CAM's heat maps: a row for every photograph, or for every class or region of one, with the photograph, a"
        " ConvNeXt's map (--compare) and ours."
        " The checkpoint is a whole model's, whose maps explain the labels of the class or a region, or an ImageNet encoder's"
        " with its classifier."
    )
    gradcam.add_argument("inputs", nargs="+", type=Path, metavar="PHOTO", help="image file, or folder with image files inside")
    options.add_weights(gradcam)
    gradcam.add_argument("--out", required=True, type=Path, metavar="FILE.png", help="the figure")
    gradcam.add_argument(
        "--class",
        dest="classes",
        action="append",
        default=[],
        metavar="NAME",
        help="name or number; give it again for each row (default: that of the region's pixel)",
    )
    gradcam.add_argument(
        "--region",
        dest="regions",
        action="append",
        default=[],
        type=options.region,
        metavar="X,Y",
        help="explain only the connected pixels of one label around this one, or of a box LEFT,TOP,RIGHT,BOTTOM; give it again"
        " for each row",
    )
    gradcam.add_argument(
        "--layer",
        choices=LAYERS,
        default="stage4",
        help="whose activations are shown; head: what a whole model's last convolution sees, beside ConvNeXt's stage4"
        " (default: %(default)s)",
    )
    gradcam.add_argument("--compare", choices=CONVNEXTS, help="an ImageNet classifier of torchvision, drawn beside ours")
    gradcam.add_argument(
        "--compare-class",
        dest="compare_classes",
        action="append",
        default=[],
        metavar="NAME",
        help="the class among ImageNet's, where ours is called otherwise; give it again for each row",
    )
    gradcam.add_argument("--compare-weights", type=Path, metavar="FILE", help="its weights (default: torchvision's, fetched)")
    _add_shared(gradcam)

    compare = command(commands, "compare", _compare, "one figure of SegFormer's labels, ours and the true ones")
    compare.description = (
        "Draws a row for every photograph: SegFormer's labels, ours and the true ones, with the colours of the classes that"
        " occur. Both models are shown the photograph at the same size."
    )
    compare.add_argument("inputs", nargs="+", type=Path, metavar="PHOTO", help="image file")
    compare.add_argument("--truth", required=True, nargs="+", type=Path, metavar="MASK", help="mask file of each photograph")
    compare.add_argument(
        "--with",
        dest="other",
        default="segformer-b2",
        metavar="NAME",
        help="segformer-b0 to segformer-b5 (trained on ADE20K, fetched), an id on the Hugging Face hub, or a folder that"
        " save_pretrained wrote (default: %(default)s)",
    )
    options.add_weights(compare)
    compare.add_argument("--out", required=True, type=Path, metavar="FILE.png", help="the figure")
    compare.add_argument(
        "--dataset",
        choices=MASKS,
        default="folder",
        help="whose values the masks have; folder: the class, 255 for none (default: %(default)s)",
    )
    compare.add_argument("--differences", action="store_true", help="a column of the pixels that are labelled differently")
    compare.add_argument(
        "--alpha", type=options.share, default=0.7, help="weight of the colours, 0 to 1 (default: %(default)s)"
    )
    _add_shared(compare)

    serve = command(commands, "serve", _serve, "a page in the browser to try a model with")
    serve.description = (
        "Serves a page to this machine alone: drop a photograph, see its classes, click a pixel for its scores and for"
        " Grad-CAM's map of what is there."
    )
    options.add_weights(serve)
    serve.add_argument("--port", type=options.count, default=8000, help="0: any that is free (default: %(default)s)")
    serve.add_argument("--megabytes", type=options.positive, default=20, help="larger files are refused (default: %(default)s)")
    _add_seen(serve)


def _add_shared(parser) -> None:
    parser.add_argument(
        "--width", type=options.width, default=320, help="of a column in pixels; 0: the photograph's (default: %(default)s)"
    )
    _add_seen(parser)


def _add_seen(parser) -> None:
    parser.add_argument(
        "--short-side",
        type=options.short_side,
        metavar="PIXELS",
        help="larger photographs are shown shrunk to this on the shorter side, 0 for never (default: resized to what our model"
        " was trained on)",
    )
    options.add_rank(parser)
    options.add_device(parser)


def _gradcam(device: str | None, **given) -> int:
    from ..gradcam import gradcam

    gradcam(device=device or options.best_device(), **given)
    print(f"wrote {given['out']}")
    return 0


def _compare(device: str | None, **given) -> int:
    from ..compare import compare

    compare(device=device or options.best_device(), **given)
    print(f"wrote {given['out']}")
    return 0


def _serve(device: str | None, **given) -> int:
    from ..serve import serve

    serve(device=device or options.best_device(), **given)
    return 0
