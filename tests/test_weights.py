"""Checkpoints: layouts, formats, what is read from them, and every way in which they can be bad."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import golden
import numpy as np
import pytest
import small
import torch

import segnext
from segnext import WeightsError, weights
from segnext.described import Described
from segnext.model import HEADS, SIZES, Config, SegNeXt

SUFFIXES = pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def assert_golden(model: SegNeXt) -> None:
    images, bases = golden.inputs(torch.float32)
    expected = golden.VALUES["eval/logits"]
    with torch.no_grad():
        error = (model(images, bases) - expected).abs().max() / expected.abs().max()
    assert not model.training and error < 1e-5


def assert_same_weights(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=0, atol=0)


@SUFFIXES
@pytest.mark.parametrize("layout", ["official", "mmsegmentation"])
def test_load_layouts(tmp_path, suffix, layout):
    model = segnext.load(golden.write(tmp_path / f"model{suffix}", golden.state_dict(layout)))
    assert model.config == small.CONFIG and (model.classes, model.palette) == (None, None)
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    assert_golden(model)


@FORMATS
def test_load_unwrapped_state(tmp_path, zipped):
    torch.save(golden.state_dict(), tmp_path / "model.pth", _use_new_zipfile_serialization=zipped)
    assert_golden(segnext.load(str(tmp_path / "model.pth")))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("size", SIZES)
def test_configuration_is_read_from_the_shapes(size, head):
    with torch.device("meta"):
        model = segnext.create(size, num_classes=11, head=head, in_channels=4)
    found = weights._config(model.state_dict(), Described(), Path("model.pth"))
    assert replace(found, rank=model.config.rank) == model.config
    assert head == "msca" or found.rank == SIZES[size].rank


@SUFFIXES
@pytest.mark.parametrize("head", HEADS)
def test_save_and_load(tmp_path, suffix, head):
    model = SegNeXt(replace(small.CONFIG, head=head, rank=5, drop_path=0.2, dropout=0.3, bases="random", gradient="one_step"))
    model.classes = [f"class {i}" for i in range(7)]
    model.palette = [(i, 2 * i, 255) for i in range(7)]
    model.scale = (128, 96)
    path = tmp_path / "new" / f"model{suffix}"
    segnext.save(model.to(memory_format=torch.channels_last), path)
    loaded = segnext.load(path)
    assert_same_weights(loaded, model)
    for name in ("config", "classes", "palette", "scale"):
        assert getattr(loaded, name) == getattr(model, name)
    assert list(path.parent.iterdir()) == [path]


@SUFFIXES
def test_names_and_colours_are_saved_as_plain_ones(tmp_path, suffix):
    model = SegNeXt(small.CONFIG)
    model.classes, model.palette = list(np.array([f"class {i}" for i in range(7)])), np.arange(21).reshape(7, 3)
    segnext.save(model, tmp_path / f"model{suffix}")
    loaded = segnext.load(tmp_path / f"model{suffix}")
    assert loaded.classes == [f"class {i}" for i in range(7)] and loaded.palette[6] == (18, 19, 20)


@SUFFIXES
def test_numbers_are_saved_as_plain_ones(tmp_path, suffix):
    rates = dict(zip(("drop_path", "dropout"), np.linspace(0.1, 0.3, 2), strict=True))
    model = SegNeXt(replace(small.CONFIG, channels=tuple(np.array(small.CONFIG.channels)), num_classes=np.int64(7), **rates))
    model.scale = np.array([100, 50])
    segnext.save(model, tmp_path / f"model{suffix}")
    loaded = segnext.load(tmp_path / f"model{suffix}")
    assert (loaded.config, loaded.scale) == (replace(small.CONFIG, **rates), (100, 50))


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"classes": ["a", "b"]}, "a model of 7 classes must have as many names and colours"),
        ({"palette": [(0, 0, 0)] * 8}, "a model of 7 classes must have as many names and colours"),
        ({"palette": [(0, 0, 256)] * 7}, "three numbers from 0 to 255"),
        ({"palette": [(0, 0)] * 7}, "three numbers from 0 to 255"),
    ],
)
def test_a_legend_that_does_not_fit_is_not_saved(tmp_path, wrong, message):
    model = SegNeXt(small.CONFIG)
    vars(model).update(wrong)
    with pytest.raises(ValueError, match=message):
        segnext.save(model, tmp_path / "model.pth")
    assert not list(tmp_path.iterdir())


def test_load_consumes_no_random_numbers(tmp_path):
    path = golden.write(tmp_path / "model.pth", golden.state_dict())
    before = torch.random.get_rng_state()
    segnext.load(path)
    assert torch.equal(torch.random.get_rng_state(), before)


MM_TEXT = "decode_head=dict(type='LightHamHead', ham_kwargs=dict(MD_S=1, MD_R=24, train_steps=6))"


@pytest.mark.parametrize(
    ("meta", "argument", "rank"),
    [
        ({}, None, 16),
        ({"cfg": MM_TEXT}, None, 24),
        ({"config": MM_TEXT}, None, 24),
        ({"config": '{"MD_R": 24}'}, None, 24),
        ({"segnext": {"rank": 9}, "cfg": MM_TEXT}, None, 9),
        ({"segnext": {"rank": 9}, "cfg": MM_TEXT}, 3, 3),
    ],
    ids=["paper", "cfg", "config", "json", "own", "argument"],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_rank(tmp_path, suffix, meta, argument, rank):
    model = segnext.load(golden.write(tmp_path / f"model{suffix}", golden.state_dict(), meta), rank=argument)
    assert model.config.rank == model.decode_head.hamburger.ham.rank == rank


def test_a_wide_decoder_has_the_papers_rank_64(tmp_path):
    segnext.save(SegNeXt(replace(small.CONFIG, decoder_channels=512)), tmp_path / "model.pth")
    state = torch.load(tmp_path / "model.pth")["state_dict"]
    assert segnext.load(golden.write(tmp_path / "bare.pth", state)).config.rank == 64


@pytest.mark.parametrize(
    "meta",
    [
        {"dataset_meta": {"classes": tuple("abcdefg"), "palette": [[i, i, i] for i in range(7)]}},
        {"CLASSES": tuple("abcdefg"), "PALETTE": [[i, i, i] for i in range(7)]},
    ],
    ids=["1.x", "0.x"],
)
def test_classes_and_palette_of_mmsegmentation(tmp_path, meta):
    model = segnext.load(golden.write(tmp_path / "model.pth", golden.state_dict(), meta))
    assert model.classes == list("abcdefg") and model.palette == [(i, i, i) for i in range(7)]


@pytest.mark.parametrize(
    "meta",
    [
        {"CLASSES": ("road", "sky")},
        {"classes": list(range(7)), "palette": list(range(7)), "scale": ["512", 512], 7: None},
        {"classes": "abcdefg", "palette": [[1, 2, 3]], "scale": [512, 0]},
    ],
    ids=["another count", "other types", "no lists"],
)
def test_what_cannot_ride_along_is_left_out(tmp_path, meta):
    model = segnext.load(golden.write(tmp_path / "model.pth", golden.state_dict(), meta))
    assert (model.classes, model.palette, model.scale) == (None, None, None)


@FORMATS
def test_training_history_beside_the_weights_is_ignored(tmp_path, monkeypatch, zipped):
    """mmengine's checkpoints hold objects of its own classes with NumPy arrays in them."""
    name = "mmengine.logging.history_buffer"
    module = types.ModuleType(name)
    module.HistoryBuffer = type("HistoryBuffer", (), {"__module__": name})
    history = module.HistoryBuffer()
    history.values = np.arange(5.0)
    checkpoint = {"state_dict": golden.state_dict(), "meta": {"cfg": MM_TEXT}, "message_hub": {"loss": history}}
    with monkeypatch.context() as patch:
        for package in ("mmengine", "mmengine.logging"):
            patch.setitem(sys.modules, package, types.ModuleType(package))
        patch.setitem(sys.modules, name, module)
        torch.save(checkpoint, tmp_path / "iter_160000.pth", _use_new_zipfile_serialization=zipped)
    assert segnext.load(tmp_path / "iter_160000.pth").config.rank == 24


class Code:
    """Unpickling this would call a function."""

    def __init__(self, function: Callable, *args) -> None:
        self.call = function, args

    def __reduce__(self):
        return self.call


@FORMATS
@pytest.mark.parametrize("module", ["builtins", "os"])
def test_no_code_of_a_checkpoint_runs(tmp_path, zipped, module):
    touched = tmp_path / "touched"
    code = Code(open, str(touched), "w") if module == "builtins" else Code(os.mkdir, str(touched))
    path = tmp_path / "model.pth"
    torch.save({"state_dict": golden.state_dict(), "extra": code}, path, _use_new_zipfile_serialization=zipped)
    if module == "builtins":
        assert_golden(segnext.load(path))
    else:
        with pytest.raises(WeightsError, match="cannot be read"):
            segnext.load(path)
    assert not touched.exists()


def encoder_state(prefix: str = "") -> dict:
    """As ImageNet's checkpoints are: the encoder and a classifier."""
    state = {key: value for key, value in golden.state_dict().items() if key.startswith("backbone.")}
    state = {prefix + key.removeprefix("backbone."): value for key, value in state.items()}
    return state | {"head.weight": torch.ones(1000, 64), "head.bias": torch.ones(1000)}


@pytest.mark.parametrize(
    "state",
    [encoder_state(), encoder_state("backbone."), golden.state_dict(), golden.state_dict("official")],
    ids=["bare", "prefixed", "mmsegmentation's model", "official model"],
)
@pytest.mark.parametrize("into", ["model", "encoder"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_load_encoder(tmp_path, suffix, into, state):
    model = SegNeXt(replace(small.CONFIG, head="msca"))
    head = {key: value.clone() for key, value in model.decode_head.state_dict().items()}
    path = golden.write(tmp_path / f"encoder{suffix}", state)
    segnext.load_encoder(model if into == "model" else model.backbone, path)
    assert_same_weights(model.backbone, golden.model(torch.float32).backbone)
    torch.testing.assert_close(model.decode_head.state_dict(), head, rtol=0, atol=0)


def test_load_refuses_an_encoder(tmp_path):
    path = golden.write(tmp_path / "encoder.pth", encoder_state())
    with pytest.raises(WeightsError, match=r"encoder\.pth holds no decode_head, .*load_encoder"):
        segnext.load(path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            replace(small.CONFIG, in_channels=4),
            r"misshapen patch_embed1\.proj\.0\.weight \[4, 3, 3, 3\] instead of \[4, 4, 3, 3\]$",
        ),
        (replace(small.CONFIG, depths=(1, 1, 2, 2)), r"missing block4\.1\..* and \d+ more$"),
        (replace(small.CONFIG, depths=(1, 1, 1, 1)), r"unexpected block3\.1\..* and \d+ more$"),
    ],
    ids=["channels", "deeper", "shallower"],
)
def test_load_encoder_of_another_shape_changes_nothing(tmp_path, config, message):
    model = SegNeXt(config)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(WeightsError, match=message):
        segnext.load_encoder(model, golden.write(tmp_path / "encoder.pth", encoder_state()))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_import_needs_only_torch_and_numpy():
    heavy = ["torchvision", "PIL", "tqdm", "safetensors"]
    code = f"import sys; sys.modules.update(dict.fromkeys({heavy})); import segnext"  # None: importing them fails
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_neither_import_nor_prediction_brings_a_compiler(tmp_path):
    """Dynamo takes as long to import as torch, and what it needs some of that. Where there is a GPU, the Triton operators are
    compiled for it and bring it."""
    segnext.save(small.model(), tmp_path / "model.pth")
    code = f"import sys, segnext, torch; model = segnext.load({str(tmp_path / 'model.pth')!r})"
    code += "; segnext.fuse(model).predict(torch.zeros(1, 3, 32, 32))"
    code += "; print(*sys.modules.keys() & {'torch._dynamo', 'torch._inductor', 'sympy'})"
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_config_of_a_custom_network(tmp_path):
    config = Config((4, 6, 8, 10), (1, 2, 1, 1), (2, 3, 4, 5), decoder_channels=96, head="msca", num_classes=2, in_channels=1)
    segnext.save(SegNeXt(config), tmp_path / "model.safetensors")
    assert segnext.load(tmp_path / "model.safetensors").config == config


@pytest.mark.parametrize(
    "wrapper", ["module.", "_orig_mod.", "model.", "net.", "_orig_mod.module.", "module._orig_mod.", "model._orig_mod."]
)
def test_names_of_wrappers_are_left_out(tmp_path, wrapper):
    model = small.model()
    state = {wrapper + key: value for key, value in model.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "wrapped.pth")
    loaded = segnext.load(tmp_path / "wrapped.pth", rank=model.config.rank)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())


@pytest.mark.parametrize(
    "name, key", [("a.ckpt", "state_dict"), ("a.pth.tar", "model"), ("a.pth", "state_dict_ema"), ("a.pt", None)]
)
def test_states_have_other_names_too(tmp_path, name, key):
    model = small.model()
    state = {"n_averaged": torch.tensor(3), **{f"module.{name}": value for name, value in model.state_dict().items()}}
    torch.save({key: state, "epoch": 3} if key else state, tmp_path / name)
    loaded = segnext.load(tmp_path / name, rank=model.config.rank)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_an_unknown_prefix_is_named(tmp_path):
    torch.save({f"learner.{key}": value for key, value in small.model().state_dict().items()}, tmp_path / "odd.pth")
    with pytest.raises(WeightsError, match=r"under a prefix that is unknown here: learner\.decode_head\."):
        segnext.load(tmp_path / "odd.pth")


def test_what_is_saved_can_be_loaded(tmp_path):
    """A compiled model as the model, a fused one not at all; names of any length."""
    model, path = small.model(), tmp_path / f"{'w' * 250}.pth"
    segnext.save(torch.compile(model), path)
    assert segnext.load(path).state_dict().keys() == model.state_dict().keys()
    with pytest.raises(TypeError, match="^save: model must be a SegNeXt, got FusedSegNeXt$"):
        segnext.save(segnext.fuse(model), tmp_path / "fused.pth")
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_a_second_head_and_missing_counters(tmp_path):
    """As mmsegmentation trains some models with, and as PyTorch wrote batch norms before it counted."""
    model = small.model()
    state = {key: value for key, value in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    assert len(state) < len(model.state_dict())
    torch.save({"state_dict": {**state, "auxiliary_head.conv_seg.weight": torch.ones(3)}}, tmp_path / "w.pth")
    loaded = segnext.load(tmp_path / "w.pth").state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())
    assert all(loaded[key] == 0 for key in loaded.keys() - state.keys())
