"""Models for other programs: ONNX files, packages of torch.export and of AOTInductor, and the ``segnext export`` command.

What is exported is the fused model (:func:`segnext.fuse`), with the decomposition's fixed bases as a constant. torch.export
keeps our operators. For ONNX every operator is replaced by its reference, so that the graph has standard operators only, batch
norms and layer scales folded. So it is for AOTInductor, whose package then needs nothing but libtorch: our operators' schemas
are defined in Python. A program that defines them itself and loads the kernels' library, as examples/aoti/main.cpp does, can
also run a package that keeps the operators, which takes less time.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import segnext_kernels
from segnext_kernels.nn import NMF2D

from .checkpoint import replacing
from .fuse import fuse
from .model import MEAN, STD, SegNeXt

OPSET = 20  # of the ONNX files: the first with GELU
LEAST = 33  # pixels: of fewer the coarsest map has a single row or column, for which torch.export traces another program
TOLERANCE = 1e-4  # of the largest logit
ONNX_EXPORT = ("onnx", "onnxscript")
ONNX_RUNTIME = (*ONNX_EXPORT, "onnxruntime")
DECOMPOSED = ("conv_act", "group_norm_relu", "mlp", "nmf", "resize_concat_conv", "spatial_attention")


class ExportError(RuntimeError):
    """A model cannot be exported in this way; the message says why in one sentence."""


class Deployed(nn.Module):
    """The fused model with its choices made: images [B, in_channels, H, W] to logits, or to int64 labels [B, H, W].

    The Ham head starts from the fixed bases of its seed, also where the model draws random ones.
    """

    def __init__(self, model: SegNeXt, labels: bool) -> None:
        super().__init__()
        self.model, self.labels = fuse(model), labels
        self.register_buffer("bases", fixed_bases(model))

    def forward(self, images: Tensor) -> Tensor:
        bases = None if self.bases is None else self.bases.expand(images.shape[0], -1, -1)
        logits = self.model(images, bases)
        return segnext_kernels.upsample_argmax(logits, images.shape[-2:]) if self.labels else logits


def fixed_bases(model: SegNeXt) -> Tensor | None:
    """What the decomposition of one image starts from [1, decoder_channels, rank]; None for the MSCA head."""
    if model.config.head != "ham":
        return None
    ham = model.decode_head.hamburger.ham
    return NMF2D(ham.rank, seed=ham.seed).eval().initial_bases(torch.empty(1, model.config.decoder_channels, 1, 1))


@dataclass(frozen=True)
class Agreement:
    """How far a file's answer is from the model's.

    Attributes:
        shape: of the images.
        error: the largest difference of a logit, over the largest logit; for labels how much a pixel's label lies below the
            highest of the upsampled logits at most, likewise.
        share: of the pixels whose label is another; None for logits.
    """

    shape: tuple[int, ...]
    error: float
    share: float | None = None

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape))
        if self.share is None:
            return f"images {size}: largest difference from torch {self.error:.1e} of the largest logit"
        other = f"{self.share:.4%} of the labels differ from torch's"
        return f"images {size}: {other}, their logits by {self.error:.1e} of the largest logit at most"


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
        model: left as it is; on the CPU, in float32. A Ham head's bases are the fixed ones of its seed.
        out: ends in the format's ending. A file that was there is replaced only once the new one is complete and checked.
        format: "onnx" (.onnx, opset 20, standard operators only), "torch-export" (.pt2 for ``torch.export.load`` after
            ``import segnext_kernels``) or "aoti" (.pt2 for ``torch._inductor.aoti_load_package`` and C++, compiled for this
            kind of processor).
        size: (height, width) of the images, 33 at least.
        dynamic: any batch, height and width from 33 on; else batch 1 and ``size`` only.
        labels: the output is the label map, the highest of the bilinearly upsampled logits, instead of the logits at stride 8.
        operators: the format "aoti" keeps our operators, see the module; the others need no such choice.

    The file has one input "images" [B, in_channels, H, W] and one output, "logits" or "labels". It says what it takes and
    gives, see :func:`metadata`: in ONNX as metadata, in torch.export's package as ``extra_files["segnext.json"]``, in
    AOTInductor's as its loader's ``get_metadata()``.

    Raises:
        ExportError: the format, ending or size is wrong, the file cannot be written, there is no C++ compiler for "aoti", or
            the check fails; no file is then left behind.
        ImportError: onnx, onnxscript or onnxruntime is not installed.
    """
    out = Path(out)
    kind = _format(format, operators)
    if out.suffix != kind.ending:
        raise ExportError(f"{out} must end in {kind.ending}, as {format} has it")
    if min(size) < LEAST:
        raise ExportError(f"images must be at least {LEAST} pixels high and wide, got {size[0]}x{size[1]}")
    for package in kind.packages:
        import_module(package)
    if format == "aoti":
        _find_compiler()
    model = copy.deepcopy(model).eval()
    shapes = _sizes(model, size, dynamic)
    try:
        with replacing(out) as file, tempfile.TemporaryDirectory() as folder, _quiet():
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


def trace(model: SegNeXt, shape: tuple[int, ...], *, dynamic: bool = False, labels: bool = False) -> ExportedProgram:
    """The program of :class:`Deployed` for images of the shape, or of any batch, height and width, with our operators in it."""
    with torch.no_grad():
        return torch.export.export(
            Deployed(model, labels).eval(), (torch.zeros(shape),), dynamic_shapes=_dynamic() if dynamic else None
        )


def decomposed(program: ExportedProgram) -> ExportedProgram:
    """The same with PyTorch's own operators only: the references in place of ours."""
    references = {name: getattr(import_module(f"segnext_kernels.{name}.reference"), name) for name in DECOMPOSED}
    references["upsample_argmax"] = _labels
    return program.run_decompositions(
        {getattr(torch.ops.segnext_kernels, name).default: reference for name, reference in references.items()}
    )


def _labels(logits: Tensor, height: int, width: int) -> Tensor:
    """Without the reference's loop over strips, which takes their number from the size."""
    return F.interpolate(logits, (height, width), mode="bilinear", align_corners=False).argmax(1)


def metadata(model: SegNeXt, labels: bool) -> dict[str, str]:
    """What a file says of itself: its input and output in words, the rest that is known as JSON.

    The keys are input, output, mean and std (for three channels), classes, palette and short_side.
    """
    config = model.config
    facts = {name: getattr(model, name) for name in ("classes", "palette", "short_side")}
    values = "normalised as in training"
    if config.in_channels == len(MEAN):
        facts |= {"mean": MEAN, "std": STD}
        values = "RGB in 0..1, minus mean, divided by std"
    output = "labels: int64 [batch, height, width]"
    if not labels:
        output = f"logits: float32 [batch, {config.num_classes}, height / 8, width / 8], rounded up"
    words = {"input": f"images: float32 [batch, {config.in_channels}, height, width], {values}", "output": output}
    return words | {name: json.dumps(value) for name, value in facts.items() if value is not None}


@torch.inference_mode()
def compare(run: Callable[[Tensor], Tensor], model: SegNeXt, shape: tuple[int, ...], labels: bool) -> Agreement:
    """An exported model's answer for random images against the model's own."""
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    bases = fixed_bases(model)
    logits = model(images, bases if bases is None else bases.expand(shape[0], -1, -1))
    found, largest = run(images), logits.abs().max()
    if not labels:
        _same_shape(found, logits)
        return Agreement(shape, ((found - logits).abs().max() / largest).item())
    upsampled = F.interpolate(logits, shape[-2:], mode="bilinear", align_corners=False)
    highest, expected = upsampled.max(1)
    _same_shape(found, expected)
    below = highest - upsampled.gather(1, found[:, None])[:, 0]
    return Agreement(shape, (below.max() / largest).item(), (found != expected).float().mean().item())


def _same_shape(found: Tensor, expected: Tensor) -> None:
    is_, ought = ([tensor.dtype, *tensor.shape] for tensor in (found, expected))
    if is_ != ought:
        raise ExportError(f"the file fails its check and was not kept: it gives {is_} instead of {ought}")


def onnx_program(program: ExportedProgram, output: str = "logits") -> torch.onnx.ONNXProgram:
    """A decomposed program in ONNX; its input is called "images"."""
    dynamic = any(isinstance(n, torch.SymInt) for n in _images(program).shape)
    with _quiet():
        return torch.onnx.export(
            program,
            input_names=["images"],
            output_names=[output],
            opset_version=OPSET,
            dynamic_shapes=_dynamic() if dynamic else None,  # here for their names
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


def _format(name: str, operators: bool) -> _Format:
    if name not in FORMATS:
        raise ExportError(f"there is no format {name!r}; there are {', '.join(FORMATS)}")
    if not operators:
        return FORMATS[name]
    if name != "aoti":
        raise ExportError(f"only aoti can be told to keep operators: torch-export always does, onnx never, got {name}")
    needs = f"`import segnext_kernels` in Python, {kernels()} in C++ (see examples/aoti): it keeps our operators"
    return replace(FORMATS["aoti"], operators=True, needs=needs)


def _find_compiler() -> None:
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler as error:
        raise ExportError("aoti needs a C++ compiler: install one, for example g++, or name it in CXX") from error


def _sizes(model: SegNeXt, size: tuple[int, int], dynamic: bool) -> list[tuple[int, ...]]:
    """The shapes of the images that a file is checked on; it is traced at the first, where a dynamic batch must not be 1."""
    channels, (height, width) = model.config.in_channels, size
    if not dynamic:
        return [(1, channels, height, width)]
    return [(2, channels, height, width), (1, channels, height + 19, max(LEAST, width // 2 + 1))]


def _dynamic() -> dict[str, dict[int, Dim]]:
    return {"images": {0: Dim("batch"), 2: Dim("height", min=LEAST), 3: Dim("width", min=LEAST)}}


def _images(program: ExportedProgram) -> Tensor:
    (name,) = program.graph_signature.user_inputs
    return next(node.meta["val"] for node in program.graph.nodes if node.name == name)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' warnings, which are for those who write models."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
