"""segnext export: what the files hold and say, and their answers from outside PyTorch and from C++ against the model's own."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import segnext
from segnext import cli
from segnext.export import export, formats
from segnext.export.program import ExportError, decomposed, fixed_bases, metadata, trace
from segnext.model import MEAN, SIZES, STD, SegNeXt

MAIN = Path(__file__).parents[1] / "examples" / "aoti" / "main.cpp"
CLASSES = [f"class {i}" for i in range(7)]
PALETTE = [(i, 2 * i, 255 - i) for i in range(7)]
SIZE = (64, 96)
SHOWN = {"scale": (256, 64), "multiple": 8, "window": (64, 64), "stride": (48, 32)}


def network(**changes) -> SegNeXt:
    """A small model whose norms and scales are not the identity, so that wrong folding shows."""
    model = small.model(**{"depths": (1, 1, 1, 1), **changes})
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 2)
        for name, parameter in model.named_parameters():
            if "layer_scale" in name:
                parameter.normal_(std=0.3)
    model.classes, model.palette = CLASSES, PALETTE
    for name, value in SHOWN.items():
        setattr(model, name, value)
    return model


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def assert_agrees(found: Tensor, model: SegNeXt, shown: Tensor, labels: bool) -> None:
    """To 1e-5 of the largest logit."""
    with torch.no_grad():
        logits = model(shown)
    limit = 1e-5 * logits.abs().max()
    if labels:
        upsampled = F.interpolate(logits, shown.shape[-2:], mode="bilinear", align_corners=False)
        assert found.dtype == torch.int64 and found.shape == upsampled[:, 0].shape and len(found.unique()) > 1
        assert (upsampled.amax(1) - upsampled.gather(1, found[:, None])[:, 0]).max() < limit
    else:
        assert found.dtype == torch.float32 and found.shape == logits.shape
        assert (found - logits).abs().max() < limit


def run(*arguments) -> int:
    return cli.main([str(argument) for argument in arguments])


def assert_metadata(said: dict[str, str], labels: bool) -> None:
    expected = {"mean": MEAN, "std": STD, "classes": CLASSES, "palette": PALETTE, **SHOWN}
    assert {name: json.loads(said[name]) for name in expected} == json.loads(json.dumps(expected))
    assert said["input"] == "images: float32 [batch, 3, height, width], RGB in 0..1, minus mean, divided by std"
    assert said["output"].startswith("labels: int64" if labels else "logits: float32")


@pytest.mark.parametrize("head, dynamic, labels", [("ham", True, False), ("msca", False, True)])
def test_onnx(tmp_path, capsys, head, dynamic, labels):
    import onnx

    model, out = network(head=head), tmp_path / "out.onnx"
    segnext.save(model, tmp_path / "small.pth")
    options = ["--dynamic"] * dynamic + ["--labels"] * labels
    options += ["--weights", tmp_path / "small.pth", "--size", "64x96", "--out", out]
    assert run("export", "--format", "onnx", *options) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(f"wrote {out}, which needs a runtime for ONNX opset 20")
    assert [line.partition(":")[0] for line in printed[1:]] == (
        ["images 2x3x64x96", "images 1x3x83x49"] if dynamic else ["images 1x3x64x96"]
    )
    assert all("of the labels differ" in line if labels else "largest difference" in line for line in printed[1:])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.onnx", "small.pth"]

    file = onnx.load(out)
    assert [(opset.domain, opset.version) for opset in file.opset_import] == [("", 20)]
    assert {node.domain for node in file.graph.node} == {""} and not file.functions
    assert not any(node.op_type in ("RandomUniform", "BatchNormalization") for node in file.graph.node)
    names = [[dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in file.graph.input]
    assert names == [["batch", 3, "height", "width"] if dynamic else [1, 3, 64, 96]]
    assert [value.name for value in file.graph.input] == ["images"]
    assert [value.name for value in file.graph.output] == ["labels" if labels else "logits"]
    assert_metadata({entry.key: entry.value for entry in file.metadata_props}, labels)

    session = formats.onnx_runtime(str(out))
    for shape in [(1, 3, *SIZE)] + dynamic * [(3, 3, 75, 50), (1, 3, 33, 130)]:
        assert_agrees(session(images(*shape)), model, images(*shape), labels)


@pytest.mark.parametrize("head, dynamic, labels", [("ham", True, True), ("msca", False, False)])
def test_torch_export(tmp_path, head, dynamic, labels):
    model, out = network(head=head), tmp_path / "new" / "out.pt2"
    report = export(model, out, "torch-export", SIZE, dynamic=dynamic, labels=labels)
    assert "import segnext_kernels" in str(report) and len(report.checks) == 1 + dynamic
    said = {"segnext.json": ""}
    program = torch.export.load(out, extra_files=said)
    assert_metadata(json.loads(said["segnext.json"]), labels)
    kept = our_operators(program)
    assert kept == {
        *("conv_act", "group_norm_relu", "mlp", "resize_concat_conv", "spatial_attention"),
        *(["hamburger"] if head == "ham" else []),
        *(["upsample_argmax"] if labels else []),
    }
    for shape in [(1, 3, *SIZE)] + dynamic * [(3, 3, 75, 50)]:
        assert_agrees(program.module()(images(*shape)), model, images(*shape), labels)


def our_operators(program: torch.export.ExportedProgram) -> set[str]:
    targets = (node.target for node in program.graph.nodes if node.op == "call_function")
    return {target._opname for target in targets if getattr(target, "namespace", "") == "segnext_kernels"}


@pytest.mark.parametrize("size", SIZES)
def test_every_size_decomposes_to_plain_operators(size):
    """One block a stage, because more of them are more of the same."""
    model = SegNeXt(replace(SIZES[size], depths=(1, 1, 1, 1))).eval()
    program = decomposed(trace(model, (1, 3, 64, 64), labels=True))
    targets = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert {target.namespace for target in targets} == {"aten"}
    assert_agrees(program.module()(images(1, 3, 64, 64)), model, images(1, 3, 64, 64), labels=True)


@pytest.fixture(scope="module")
def cpp_main(tmp_path_factory) -> Path:
    """examples/aoti/main.cpp, built as its comment says."""
    folder = Path(torch.__path__[0])
    out = tmp_path_factory.mktemp("cpp") / "main"
    (command,) = (line for line in MAIN.read_text().splitlines() if "g++" in line)
    command = command.removeprefix("//").replace("$T", str(folder))
    words = [{"main.cpp": str(MAIN), "main": str(out)}.get(word, word) for word in command.split()]
    subprocess.run(words, check=True)
    return out


def run_main(main: Path, package: Path, shown: Tensor, dtype: type, *library: Path) -> Tensor:
    done = subprocess.run([main, package, *map(str, shown.shape), *library], input=shown.numpy().tobytes(), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return torch.from_numpy(np.frombuffer(done.stdout, dtype).copy())


@pytest.mark.parametrize(
    "operators, head, dynamic, labels",
    [(False, "msca", False, False), (True, "ham", True, True)],
    ids=["decomposed", "operators"],
)
def test_aoti_from_python_and_cpp(tmp_path, cpp_main, operators, head, dynamic, labels):
    model, out = network(head=head), tmp_path / "out.pt2"
    with torch._inductor.config.patch({"aot_inductor.debug_compile": True}):  # not optimised, in half the time
        report = export(model, out, "aoti", SIZE, dynamic=dynamic, labels=labels, operators=operators)
    library = (formats.kernels(),) if operators else ()
    assert (str(library[0]) if operators else "libtorch") in str(report)
    package = torch._inductor.aoti_load_package(str(out))
    assert_metadata(package.loader.get_metadata(), labels)
    for shape in [(1, 3, *SIZE)] + dynamic * [(2, 3, 75, 50)]:
        shown = images(*shape)
        found = package(shown)
        assert_agrees(found, model, shown, labels)
        alone = run_main(cpp_main, out, shown, np.int64 if labels else np.float32, *library)
        assert_agrees(alone.view(found.shape), model, shown, labels)


def test_cpp_main_says_what_is_wrong(cpp_main, tmp_path):
    done = subprocess.run([cpp_main], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("usage:")
    done = subprocess.run([cpp_main, "absent.pt2", "1", "3", "8", "8", tmp_path / "absent.so"], capture_output=True, text=True)
    assert done.returncode == 1 and "absent.so" in done.stderr


def test_fixed_bases_are_the_models_own():
    model = network()
    shown = images(2, 3, *SIZE)
    with torch.no_grad():
        assert torch.equal(model(shown), model(shown, fixed_bases(model).expand(2, -1, -1)))
    assert torch.equal(fixed_bases(network(bases="random")), fixed_bases(model))
    assert fixed_bases(network(head="msca")) is None


def test_model_is_left_as_it_is_and_random_bases_become_fixed(tmp_path):
    model = network(bases="random").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export(model, tmp_path / "out.pt2", "torch-export", SIZE)
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    found = torch.export.load(tmp_path / "out.pt2").module()(images(1, 3, *SIZE))
    model.config = replace(model.config, bases="fixed")
    model.decode_head.hamburger.ham.bases = "fixed"
    assert_agrees(found, model.eval(), images(1, 3, *SIZE), labels=False)


def test_neither_defaults_nor_autocast_nor_the_dtype_matter(tmp_path):
    """The model of a training in another dtype is exported in float32, wherever the caller makes tensors by default."""
    model, x = network(), images(1, 3, *SIZE)
    expected = None
    for name, given in (("plain", model), ("double", copy.deepcopy(model).double()), ("autocast", model), ("defaults", model)):
        with ExitStack() as stack:
            if name == "autocast":
                stack.enter_context(torch.autocast("cpu"))
            if name == "defaults":
                stack.enter_context(torch.device("meta"))
                stack.callback(torch.set_default_dtype, torch.get_default_dtype())
                torch.set_default_dtype(torch.float64)
            export(given, tmp_path / f"{name}.pt2", "torch-export", SIZE)
        found = torch.export.load(tmp_path / f"{name}.pt2").module()(x)
        expected = found if expected is None else expected
        assert torch.equal(found, expected), name


def test_metadata_without_legend_and_of_other_channels():
    said = metadata(small.model(in_channels=4), labels=False)
    assert said.keys() == {"input", "output"} and "[batch, 4, height, width], normalised as in training" in said["input"]
    assert said["output"] == "logits: float32 [batch, 7, height / 8, width / 8], rounded up"


@pytest.mark.parametrize("labels", [False, True], ids=["logits", "labels"])
@pytest.mark.parametrize("damage", ["values", "nan", "shape"])
def test_failed_check_leaves_nothing_and_keeps_what_was_there(tmp_path, monkeypatch, labels, damage):
    change = {
        "values": lambda found: 6 - found if labels else found * 1.001,
        "nan": lambda found: found * float("nan"),
        "shape": lambda found: found[:, :, 1:],
    }[damage]

    def load(path):
        right = torch.export.load(path).module()
        return lambda shown: change(right(shown))

    monkeypatch.setitem(formats.FORMATS, "torch-export", replace(formats.FORMATS["torch-export"], load=load))
    out = tmp_path / "out.pt2"
    out.write_text("before")
    with pytest.raises(ExportError, match="fails its check and was not kept"):
        export(network(head="msca"), out, "torch-export", SIZE, labels=labels)
    assert out.read_text() == "before" and [path.name for path in tmp_path.iterdir()] == ["out.pt2"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"out": "a.pt2", "format": "onnx"}, "a.pt2 must end in .onnx, as onnx has it"),
        ({"out": "a.onnx", "format": "aoti"}, "a.onnx must end in .pt2, as aoti has it"),
        ({"out": "a.onnx", "format": "tflite"}, "there is no format 'tflite'; there are onnx, torch-export, aoti"),
        ({"out": "a.onnx", "format": "onnx", "size": (32, 64)}, "at least 33 pixels high and wide, got 32x64"),
        ({"out": "a.onnx", "format": "onnx", "operators": True}, "only aoti can be told to keep operators"),
        ({"out": "/dev/null/a.onnx", "format": "onnx"}, "cannot write /dev/null/a.onnx: Not a directory"),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_refuses(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ExportError, match=message):
        export(small.model(), **arguments)
    assert list(tmp_path.iterdir()) == []


def test_aoti_needs_a_compiler(tmp_path):
    with torch._inductor.config.patch({"cpp.cxx": ("/absent/g++",)}), pytest.raises(ExportError, match="needs a C.. compiler"):
        export(small.model(), tmp_path / "a.pt2", "aoti", SIZE)
    assert list(tmp_path.iterdir()) == []


def test_operators_need_kernels(monkeypatch, tmp_path):
    monkeypatch.setattr("segnext_kernels.build_info", lambda: {"missing": {"cpu": "not built"}, "isa": None})
    with pytest.raises(ExportError, match="there are no operators to keep: not built"):
        export(small.model(), tmp_path / "a.pt2", "aoti", SIZE, operators=True)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--size", "32x64"], "of at least 33 pixels each"),
        (["--format", "tflite"], "tflite"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        run("export", "--weights", "w.pth", "--format", "onnx", *arguments)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_command_line_errors_are_one_line(tmp_path, capsys):
    segnext.save(small.model(), tmp_path / "small.pth")
    assert run("export", "--weights", tmp_path / "small.pth", "--format", "aoti", "--out", tmp_path / "a.onnx") == 2
    assert capsys.readouterr().err == f"segnext: {tmp_path / 'a.onnx'} must end in .pt2, as aoti has it\n"


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_extra_is_named_in_one_line(tmp_path, monkeypatch, capsys, missing):
    segnext.save(small.model(), tmp_path / "small.pth")
    monkeypatch.setitem(sys.modules, missing, None)
    assert run("export", "--weights", tmp_path / "small.pth", "--format", "onnx", "--out", tmp_path / "a.onnx") == 2
    assert capsys.readouterr().err == f"segnext: this needs {missing}: pip install 'segnext-kernels[export]'\n"
    assert [path.name for path in tmp_path.iterdir()] == ["small.pth"]


def test_default_name_is_the_weights(tmp_path, monkeypatch, capsys):
    segnext.save(network(head="msca"), tmp_path / "small.pth")
    monkeypatch.chdir(tmp_path)
    assert run("export", "--weights", "small.pth", "--format", "torch-export", "--size", "64x64") == 0
    assert capsys.readouterr().out.startswith("wrote small.pt2, ") and (tmp_path / "small.pt2").is_file()
