"""Every way in which a checkpoint can be bad ends in one sentence that names it."""

from __future__ import annotations

import sys
from collections import defaultdict

import golden
import pytest
import torch

import segnext
from segnext import WeightsError

CONV_SEG, SQUEEZE = "decode_head.conv_seg.weight", "decode_head.squeeze.conv.weight"
STEM, FC1 = "backbone.patch_embed1.proj.0.weight", "backbone.block1.0.mlp.fc1.weight"


BAD_STATES = {
    "missing": (lambda s: s.pop("decode_head.align.gn.bias"), "missing decode_head.align.gn.bias$"),
    "missing blocks": (
        lambda s: [s.pop(key) for key in list(s) if key.startswith("backbone.block3.0.")],
        r"backbone\.block3\.0\.mlp\.fc1\.weight, .* is missing",
    ),
    "missing, size unknown": (lambda s: s.pop(STEM), f"{STEM}, which tells the model's size, is missing"),
    "unexpected": (lambda s: s.update({"another_head.w": torch.ones(1)}), r"unexpected another_head\.w$"),
    "misshapen": (lambda s: s.update({"backbone.norm2.bias": torch.ones(3)}), r"norm2\.bias \[3\] instead of \[16\]$"),
    "misshapen, size unknown": (lambda s: s.update({CONV_SEG: torch.tensor(1.0)}), f"{CONV_SEG}, .* misshapen"),
    "no channels": (lambda s: s.update({"backbone.norm1.weight": torch.ones(0)}), r"backbone\.norm1\.weight, .* misshapen"),
    "one channel": (lambda s: s.update({"backbone.norm1.weight": torch.ones(1)}), r"backbone\.norm1\.weight, .* misshapen"),
    "no whole groups": (lambda s: s.update({SQUEEZE: torch.ones(65, 120, 1, 1)}), f"{SQUEEZE}, .* misshapen"),
    "fewer hidden than channels": (lambda s: s.update({FC1: torch.ones(7, 8, 1, 1)}), f"{FC1}, .* misshapen"),
    "all at once": (
        lambda s: s.update({"x": torch.ones(1), "backbone.norm2.bias": torch.ones(3), "y": s.pop("decode_head.align.gn.bias")}),
        r"missing decode_head\.align\.gn\.bias; unexpected x, y; misshapen backbone\.norm2\.bias",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), BAD_STATES.values(), ids=BAD_STATES)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_bad_states(tmp_path, suffix, spoil, message):
    state = golden.state_dict()
    spoil(state)
    path = golden.write(tmp_path / f"bad{suffix}", state)
    with pytest.raises(WeightsError, match=message) as caught:
        segnext.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"rank": 0}, "rank must be a whole number of at least 1, got 0"),
        ({"rank": "x"}, "rank must be a whole number of at least 1, got 'x'"),
        ({"bases": "zz"}, "bases must be one of fixed, random, got 'zz'"),
        ({"gradient": ["exact"]}, r"gradient must be one of exact, one_step, got \['exact'\]"),
        ({"dropout": None}, r"dropout must be a number in \[0, 1\), got None"),
    ],
    ids=str,
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_bad_descriptions(tmp_path, suffix, own, message):
    path = golden.write(tmp_path / f"bad{suffix}", golden.state_dict(), {"segnext": own})
    with pytest.raises(WeightsError, match=f"^{path} describes no model: {message}$"):
        segnext.load(path)


def test_a_bad_rank_of_the_caller_is_not_the_files_fault(tmp_path):
    with pytest.raises(ValueError, match="^rank must be a whole number of at least 1, got 0$"):
        segnext.load(golden.write(tmp_path / "model.pth", golden.state_dict()), rank=0)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_type_that_cannot_be_read_safely_is_named(tmp_path, zipped):
    path, counts = tmp_path / "model.pth", defaultdict(int, {"steps": 3})
    torch.save({"state_dict": golden.state_dict(), "counts": counts}, path, _use_new_zipfile_serialization=zipped)
    message = r"model\.pth cannot be read safely \(weights_only\) because of .*collections\.defaultdict.* in it$"
    with pytest.raises(WeightsError, match=message):
        segnext.load(path)


BAD_CONTENTS = {
    "text": lambda path: path.write_text("weights"),
    "empty": lambda path: path.write_bytes(b""),
    "list": lambda path: torch.save([1, 2], path),
    "numbered": lambda path: torch.save({1: torch.ones(1)}, path),
    "numbers": lambda path: torch.save({"state_dict": {"a": 1}}, path),
    "nothing": lambda path: torch.save({}, path),
    "module": lambda path: torch.save(torch.nn.Linear(1, 1), path),
}


@pytest.mark.parametrize("spoil", BAD_CONTENTS.values(), ids=BAD_CONTENTS)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_no_checkpoint_at_all(tmp_path, suffix, spoil):
    path = tmp_path / f"bad{suffix}"
    spoil(path)
    with pytest.raises(WeightsError, match="cannot be read|holds no state_dict") as caught:
        segnext.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("part", [0.01, 0.5, 0.999])
@pytest.mark.parametrize("kind", ["zip.pth", "legacy.pth", "model.safetensors"])
def test_truncated_files(tmp_path, kind, part):
    path = tmp_path / kind
    options = {"_use_new_zipfile_serialization": kind == "zip.pth"} if path.suffix == ".pth" else {}
    golden.write(path, golden.state_dict(), **options)
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    with pytest.raises(WeightsError, match="cannot be read") as caught:
        segnext.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_no_such_file(tmp_path):
    with pytest.raises(WeightsError, match=r"there is no file .*nothing\.pth, and hosted weights are called ade20k-t, "):
        segnext.load(tmp_path / "nothing.pth")
    with pytest.raises(WeightsError, match="there is no file ade20k-xl"):
        segnext.load("ade20k-xl")


def test_unknown_ending(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"x")
    with pytest.raises(WeightsError, match=r"model\.onnx must end in \.pth, \.pt, \.ckpt, \.tar or \.safetensors"):
        segnext.load(tmp_path / "model.onnx")
    with pytest.raises(WeightsError, match=r"out must end in"):
        segnext.save(golden.model(), tmp_path / "out")


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_a_failed_save_leaves_the_old_file(tmp_path, suffix, monkeypatch):
    path = tmp_path / f"model{suffix}"
    path.write_text("old")

    def fail(*args):
        if len(args) == 2 and hasattr(args[1], "write"):
            args[1].write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save" if suffix == ".safetensors" else "torch.save", fail)
    with pytest.raises(WeightsError, match=f"cannot write .*model{suffix}: No space left"):
        segnext.save(golden.model(), path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_save_into_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "nowhere").touch()
    with pytest.raises(WeightsError, match=r"cannot write .*nowhere/model\.pth: Not a directory"):
        segnext.save(golden.model(), tmp_path / "nowhere" / "model.pth")


def test_safetensors_is_named_where_it_is_missing(tmp_path, monkeypatch):
    path = golden.write(tmp_path / "model.safetensors", golden.state_dict())
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match="safetensors"):
        segnext.load(path)
