"""The ``segnext`` command. What a sub-command needs is imported when it runs, so that --help is quick."""

from __future__ import annotations

import sys
from collections.abc import Sequence

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
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # names of files and classes that the terminal cannot show are shown escaped
            stream.reconfigure(errors="backslashreplace")
    arguments = vars(_parser().parse_args(argv))
    try:
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
    except Exception as error:
        if not isinstance(error, _expected_errors()):
            raise
        print(f"segnext: {error}", file=sys.stderr)
        return 2


def _parser() -> Parser:
    parser = Parser("segnext", description="Semantic segmentation with SegNeXt.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    for group in (models, training, export, look, data):
        group.add(commands)
    return parser


def _expected_errors() -> tuple[type[Exception], ...]:
    """What is the input's fault, not the program's."""
    from ..data.pairs import DataError
    from ..distributed import PeerError
    from ..export.program import ExportError
    from ..images import ImageError
    from ..predict import InputError
    from ..recipes import RecipeError
    from ..weights import WeightsError

    known = (DataError, ExportError, ImageError, InputError, PeerError, RecipeError, WeightsError)
    return *known, FloatingPointError, OSError
