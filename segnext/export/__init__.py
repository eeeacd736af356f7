"""Models for other programs: ONNX files, packages of torch.export and of AOTInductor.

What is exported is the fused model (:func:`segnext.fuse`), with the decomposition's fixed bases as a constant. torch.export
keeps our operators. For ONNX every operator is replaced by its reference, so that the graph has standard operators only, batch
norms and layer scales folded. So it is for AOTInductor, whose package then needs nothing but libtorch: our operators' schemas
are defined in Python. A program that defines them itself and loads the kernels' library, as examples/aoti/main.cpp does, can
also run a package that keeps the operators, which takes less time.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch

from ..checkpoint import check_file, replacing
from ..model import SegNeXt
from .check import TOLERANCE, Agreement, checked_shapes, compare
from .formats import find_format, has_compiler, quiet
from .program import LEAST, ExportError, decomposed, metadata, trace


@contextmanager
def plainly_on_the_cpu() -> Iterator[None]:
    """Without autocast, and with tensors on the CPU, whatever the caller has about it."""
    with torch.autocast("cpu", enabled=False), torch.device("cpu"):
        yield


@dataclass(frozen=True)
class Report:
    """What was written, what a program needs to run it, and how it agrees with the model."""

    out: Path
    needs: str
    checks: tuple[Agreement, ...]

    def __str__(self) -> str:
        return "\n".join([f"wrote {self.out}, which needs {self.needs}", *map(str, self.checks)])


def export(
    model: SegNeXt,
    out: str | os.PathLike[str],
    format: str,
    size: tuple[int, int] = (512, 512),
    *,
    dynamic: bool = False,
    labels: bool = False,
    operators: bool = False,
) -> Report:
    """Writes the model for inference on the CPU, in float32, and checks the file on the spot against the model in torch.

    Args:
        model: left as it is; on the CPU, in any dtype. A Ham head's bases are the fixed ones of its seed.
        out: ends in the format's ending; its folder is made if it isn't there. A file that was there is replaced only once the
            new one is complete and checked.
        format: "onnx" (.onnx, opset 20, standard operators only), "torch-export" (.pt2 for ``torch.export.load`` after
            ``import segnext_kernels``) or "aoti" (.pt2 for ``torch._inductor.aoti_load_package`` and C++, compiled for this
            kind of processor).
        size: (height, width) of the images, 33 at least.
        dynamic: any batch, height and width from 33 on; else batch 1 and ``size`` only.
        labels: the output is the label map, the highest of the bilinearly upsampled logits, instead of the logits at stride 8.
        operators: the format "aoti" keeps our operators, see the module; the others need no such choice.

    The file has one input "images" [B, in_channels, H, W] and one output, "logits" or "labels". It says what it takes and
    gives (:func:`segnext.export.program.metadata`): in ONNX as metadata, in torch.export's package as
    ``extra_files["segnext.json"]``, in AOTInductor's as its loader's ``get_metadata()``.

    Raises:
        ExportError: the format, ending or size is wrong, the file cannot be written, there is no C++ compiler for "aoti", or
            the check fails; no file is then left behind.
        ImportError: onnx, onnxscript or onnxruntime is not installed.
    """
    out = Path(out)
    kind = find_format(format, operators)
    if out.suffix != kind.ending:
        raise ExportError(f"{out} must end in {kind.ending}, as {format} has it")
    if min(size) < LEAST:
        raise ExportError(f"images must be at least {LEAST} pixels high and wide, got {size[0]}x{size[1]}")
    for package in kind.packages:
        import_module(package)
    if format == "aoti" and not has_compiler():
        raise ExportError("aoti needs a C++ compiler: install one, for example g++, or name it in CXX")
    model = copy.deepcopy(model).float().eval()
    shapes = checked_shapes(model, size, dynamic)
    try:
        check_file(out)
        with replacing(out) as file, tempfile.TemporaryDirectory() as folder, quiet(), plainly_on_the_cpu():
            made = str(Path(folder, f"model{kind.ending}"))
            traced = trace(model, shapes[0], dynamic=dynamic, labels=labels)
            kind.write(traced if kind.operators else decomposed(traced), made, metadata(model, labels))
            run = kind.load(made)
            checks = tuple(compare(run, model, shape, labels) for shape in shapes)
            for check in checks:
                if not check.error <= TOLERANCE:
                    raise ExportError(f"the {format} file fails its check and was not kept: {check}")
            file.write(Path(made).read_bytes())
    except OSError as error:
        raise ExportError(f"cannot write {out}: {error.strerror or error}") from error
    return Report(out, kind.needs, checks)
