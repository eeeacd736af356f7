"""Models outside PyTorch: ONNX files of the same weights, and what runs them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Hashable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from segnext.export.formats import ONNX_EXPORT, onnx_program
from segnext.export.program import decomposed, trace
from segnext.model import SegNeXt

OPENVINO = (*ONNX_EXPORT, "openvino")

_files: dict[Hashable, str] = {}


@cache
def _directory() -> tempfile.TemporaryDirectory:
    """Goes when the process ends."""
    return tempfile.TemporaryDirectory()


def onnx_file(key: Hashable, program: Callable[[], ExportedProgram]) -> str:
    """The path of the program's ONNX file, made once per key in this process."""
    if key not in _files:
        path = str(Path(_directory().name) / f"{len(_files)}.onnx")
        onnx_program(program()).save(path, external_data=False)
        _files[key] = path
    return _files[key]


def program(model: nn.Module, shape: tuple[int, ...]) -> ExportedProgram:
    """The model as it is, for float32 images of the shape."""
    with torch.no_grad():
        return torch.export.export(model.eval(), (torch.zeros(shape),))


def segnext_program(model: SegNeXt, shape: tuple[int, ...], labels: bool) -> ExportedProgram:
    """What ``segnext export --format onnx`` makes of the model; that takes one image, or any number."""
    return decomposed(trace(model, shape, labels=labels))


def openvino(path: str, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The file in OpenVINO, with PyTorch's number of threads, computing in float32 or bfloat16."""
    import openvino

    options = {
        "INFERENCE_PRECISION_HINT": {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype],
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    request = openvino.Core().compile_model(path, "CPU", options).create_infer_request()

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(request.infer([images.numpy()], share_inputs=True, share_outputs=True)[0])

    return run
