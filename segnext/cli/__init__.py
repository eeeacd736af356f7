"""The ``segnext`` command. What a sub-command needs beside torch is imported when it runs, so that --help waits for no more."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from ..errors import SegnextError
from . import data, export, look, models, training
from .options import Parser

EXTRAS = {  # what they have more than "models"
    "train": ("matplotlib", "pycocotools", "scipy", "tensorboard"),
    "look": ("cv2", "fastapi", "huggingface_hub", "pytorch_grad_cam", "starlette", "transformers", "uvicorn"),
    "export": ("onnx", "onnxruntime", "onnxscript"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a sub-command.

    Returns:
        0 if all went well, 1 if files were skipped or have faults, 2 for an error, which is one line on stderr; 130 when
        interrupted.
    """
    # PyTorch asks Linux for huge pages then, and a step of training on the CPU takes a tenth to a fifth less time.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # names of files and classes that the terminal cannot show are shown escaped
            stream.reconfigure(errors="backslashreplace")
    try:
        arguments = vars(_parser().parse_args(argv))
        return arguments.pop("run")(**arguments)
    except KeyboardInterrupt:
        print("segnext: interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if error.name is None:
            raise
        missing = error.name.partition(".")[0]
        extra = next((extra for extra, packages in EXTRAS.items() if missing in packages), "models")
        print(f"segnext: this needs {missing}: pip install 'segnext-kernels[{extra}]'", file=sys.stderr)
        return 2
    except (SegnextError, FloatingPointError, OSError) as error:
        print(f"segnext: {error}", file=sys.stderr)
        return 2


def _parser() -> Parser:
    parser = Parser("segnext", description="Semantic segmentation with SegNeXt.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    for group in (models, training, export, look, data):
        group.add(commands)
    return parser
