"""Models outside PyTorch: an ONNX file of the same weights, and what runs it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Hashable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from segnext.export.formats import ONNX_EXPORT, onnx_program

OPENVINO = (*ONNX_EXPORT, "openvino")

_files: dict[Hashable, str] = {}


@cache
def _directory() -> tempfile.TemporaryDirectory:
    """Goes when the process ends."""
    return tempfile.TemporaryDirectory()


def onnx_file(key: Hashable, model: Callable[[], nn.Module], shape: tuple[int, ...]) -> str:
    """The path of the model's ONNX file for float32 images of the shape, made once per key in this process."""
    if key not in _files:
        path = str(Path(_directory().name) / f"{len(_files)}.onnx")
        export(model(), shape, path)
        _files[key] = path
    return _files[key]


def export(model: nn.Module, shape: tuple[int, ...], path: str) -> None:
    with torch.no_grad():
        program = torch.export.export(model.eval(), (torch.zeros(shape),))
    onnx_program(program).save(path, external_data=False)


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
