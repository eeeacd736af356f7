"""The formats: how each is written, loaded again, and what it needs."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

import segnext_kernels

from .program import ExportError, dynamic_shapes

OPSET = 20  # of the ONNX files: the first with GELU
ONNX_EXPORT = ("onnx", "onnxscript")
ONNX_RUNTIME = (*ONNX_EXPORT, "onnxruntime")


def onnx_program(program: ExportedProgram, output: str = "logits") -> torch.onnx.ONNXProgram:
    """A decomposed program in ONNX; its input is called "images"."""
    dynamic = any(isinstance(n, torch.SymInt) for n in _images(program).shape)
    with quiet():
        return torch.onnx.export(
            program,
            input_names=["images"],
            output_names=[output],
            opset_version=OPSET,
            dynamic_shapes=dynamic_shapes() if dynamic else None,  # here for their names
            dynamo=True,
            verbose=False,
        )


def onnx_runtime(path: str) -> Callable[[Tensor], Tensor]:
    """The file in ONNX Runtime, with PyTorch's number of threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _write_onnx(program: ExportedProgram, path: str, meta: dict[str, str]) -> None:
    written = onnx_program(program, output=meta["output"].partition(":")[0])
    written.model.metadata_props.update(meta)
    written.save(path, external_data=False)


def _write_torch_export(program: ExportedProgram, path: str, meta: dict[str, str]) -> None:
    torch.export.save(program, path, extra_files={"segnext.json": json.dumps(meta)})


def _write_aoti(program: ExportedProgram, path: str, meta: dict[str, str]) -> None:
    torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs={"aot_inductor.metadata": meta})


def _load_torch_export(path: str) -> Callable[[Tensor], Tensor]:
    return torch.export.load(path).module()


def _load_aoti(path: str) -> Callable[[Tensor], Tensor]:
    return torch._inductor.aoti_load_package(path)


@dataclass(frozen=True)
class _Format:
    """``needs`` ends the sentence "which needs ..."; ``operators``: keeps ours."""

    ending: str
    write: Callable[[ExportedProgram, str, dict[str, str]], None]
    load: Callable[[str], Callable[[Tensor], Tensor]]
    needs: str
    operators: bool = False
    packages: tuple[str, ...] = ()


FORMATS = {
    "onnx": _Format(
        ".onnx",
        _write_onnx,
        onnx_runtime,
        f"a runtime for ONNX opset {OPSET}; its operators are the standard ones",
        packages=ONNX_RUNTIME,
    ),
    "torch-export": _Format(
        ".pt2",
        _write_torch_export,
        _load_torch_export,
        "`import segnext_kernels` before torch.export.load: it keeps our operators",
        operators=True,
    ),
    "aoti": _Format(
        ".pt2",
        _write_aoti,
        _load_aoti,
        "libtorch and this kind of processor; its operators are PyTorch's own, compiled by Inductor",
    ),
}


def kernels() -> Path:
    """The library with our operators' kernels for this processor.

    Raises:
        ExportError: there is none.
    """
    info = segnext_kernels.build_info()
    if "cpu" in info["missing"]:
        raise ExportError(f"there are no operators to keep: {info['missing']['cpu']}")
    return Path(segnext_kernels.__file__).with_name(f"_C_{info['isa']}.abi3.so")


def find_format(name: str, operators: bool) -> _Format:
    if name not in FORMATS:
        raise ExportError(f"there is no format {name!r}; there are {', '.join(FORMATS)}")
    if not operators:
        return FORMATS[name]
    if name != "aoti":
        raise ExportError(f"only aoti can be told to keep operators: torch-export always does, onnx never, got {name}")
    needs = f"`import segnext_kernels` in Python, {kernels()} in C++ (see examples/aoti): it keeps our operators"
    return replace(FORMATS["aoti"], operators=True, needs=needs)


def has_compiler() -> bool:
    """Whether Inductor, torch.compile's and AOTInductor's compiler, finds one for C++."""
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return False
    return True


def _images(program: ExportedProgram) -> Tensor:
    (name,) = program.graph_signature.user_inputs
    return next(node.meta["val"] for node in program.graph.nodes if node.name == name)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the exporters' warnings, which are for those who write models."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
