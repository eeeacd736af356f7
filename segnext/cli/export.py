"""``segnext export``."""

from __future__ import annotations

from pathlib import Path

from . import options
from .options import command

ENDINGS = {"onnx": ".onnx", "torch-export": ".pt2", "aoti": ".aoti.pt2"}  # of the files that nobody named


def add(commands) -> None:
    export = command(commands, "export", _export, "write a model for ONNX runtimes, torch.export or C++, and check the file")
    export.description = (
        "Writes the model for inference on the CPU, in float32, for programs that know nothing of segnext. The file is run on"
        " the spot and compared with the model in PyTorch; if they differ it is not kept. Its metadata says how images are"
        " normalised, and what the checkpoint says of classes, colours, scale and windows."
    )
    options.add_weights(export)
    export.add_argument(
        "--format",
        required=True,
        choices=ENDINGS,
        help="onnx: standard operators only; torch-export: keeps the operators of segnext_kernels, for torch.export.load;"
        " aoti: compiled by AOTInductor, for Python and C++",
    )
    export.add_argument(
        "--size",
        type=options.export_size,
        default=(512, 512),
        metavar="HxW",
        help="size of the images, at least 33x33 (default: 512x512)",
    )
    export.add_argument("--dynamic", action="store_true", help="leaves batch, height and width open, instead of 1 and --size")
    export.add_argument(
        "--labels", action="store_true", help="the output is the label map instead of the logits at an eighth of the size"
    )
    export.add_argument(
        "--operators",
        action="store_true",
        help="aoti: keeps the operators of segnext_kernels, which takes less time, but needs their library",
    )
    export.add_argument("--out", type=Path, metavar="FILE", help="default: the weights' name with the format's ending, here")
    options.add_rank(export)


def _export(weights: str, format: str, out: Path | None, rank: int | None, **given) -> int:
    from .. import load
    from ..export import export

    print(export(load(weights, rank=rank), out or Path(Path(weights).stem + ENDINGS[format]), format, **given))
    return 0
