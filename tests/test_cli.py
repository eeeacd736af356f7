"""The ``segnext`` command: help, exit codes, and one line for every expected error."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import small
from PIL import Image

import segnext
from segnext import cli, demo, predict


@pytest.fixture
def weights(tmp_path):
    segnext.save(small.model(), tmp_path / "small.pth")
    return tmp_path / "small.pth"


def run(*arguments) -> int:
    return cli.main([str(argument) for argument in arguments])


@pytest.mark.parametrize(
    "command",
    [[], ["predict"], ["demo"], ["data"], ["data", "check"], ["info"], ["table2"], ["gradcam"], ["compare"]],
    ids=str,
)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as ended:
        run(*command, "--help")
    assert ended.value.code == 0 and "usage: segnext" in capsys.readouterr().out


def test_python_m_segnext():
    ended = subprocess.run([sys.executable, "-m", "segnext", "table2", "--help"], capture_output=True, text=True)
    assert ended.returncode == 0 and "usage: segnext table2" in ended.stdout


HUGE_PAGES = """
import re
from segnext.cli import main
main(["info"])
import torch
tensor, inside = torch.ones(16 << 20), False
for line in open("/proc/self/smaps"):
    if bounds := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
        inside = int(bounds[1], 16) <= tensor.data_ptr() < int(bounds[2], 16)
    if inside and line.startswith("VmFlags:"):
        print("asked" if " hg" in line else line)
"""


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="needs Linux with huge pages")
def test_huge_pages_are_asked_for():
    """PyTorch reads its switch when it allocates for the first time, which no import may do before."""
    unset = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    done = subprocess.run([sys.executable, "-c", HUGE_PAGES], capture_output=True, text=True, env=unset)
    assert done.stdout.splitlines()[-1] == "asked", done.stdout + done.stderr


@pytest.mark.parametrize("size, head, figures", [("t", "ham", ("4.3", "6.6")), ("b", "msca", ("28.0", "33.6"))])
def test_info(size, head, figures, capsys):
    assert run("info", "--size", size, "--head", head) == 0
    printed = capsys.readouterr().out
    assert all(figure in printed for figure in figures)


def test_info_of_other_classes_and_sizes(capsys):
    printed = []
    for options in ((), ("--classes", 7), ("--image-size", "64x96")):
        assert run("info", *options) == 0
        printed.append(capsys.readouterr().out)
    assert len(set(printed)) == 3


def test_table2(capsys):
    assert run("table2") == 0
    assert "48.9" in capsys.readouterr().out


def test_predict_exit_codes(tmp_path, weights, capsys, monkeypatch):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no image")
    options = ("--weights", weights, "--out", tmp_path / "out")
    called = Mock(wraps=predict.predict)
    monkeypatch.setattr(predict, "predict", called)
    assert run("predict", tmp_path / "a.png", *options, "--rank", 3, "--alpha", 0.3, "--short-side", 16) == 0
    assert capsys.readouterr().err == ""
    given = called.call_args.kwargs
    assert (given["rank"], given["alpha"], given["short_side"]) == (3, 0.3, 16)
    assert run("predict", tmp_path / "a.png", tmp_path / "b.png", *options) == 1
    error = capsys.readouterr().err
    assert "b.png: not an image" in error and "1 of the files" in error


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["predict", "{}/absent.png", "--weights", "{}/small.pth", "--out", "{}/out"], "absent.png: no such file"),
        (["predict", "{}/a.png", "--weights", "{}/absent.pth", "--out", "{}/out"], "absent.pth"),
        (["predict", "{}/a.png", "--weights", "{}/small.pth", "--out", "{}/a.png"], "a.png"),
        (["predict", "{}/empty", "--weights", "{}/small.pth", "--out", "{}/out"], "empty: there is no image"),
        (["demo", "--data", "{}/empty", "--out", "{}/out"], "classes.txt: no such file"),
    ],
)
def test_expected_errors_are_one_line(tmp_path, weights, capsys, arguments, message):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    assert run(*(argument.format(tmp_path) for argument in arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("segnext: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "COMMAND"),
        (["predict", "a.png"], "--weights"),
        (["predict", "a.png", "--weights", "w", "--out", "o", "--alpha", "1.5"], "not between 0 and 1"),
        (["predict", "a.png", "--weights", "w", "--out", "o", "--short-side", "-1"], "negative"),
        (["predict", "a.png", "--weights", "w", "--out", "o", "--short-side", "1"], "1 is neither 0 nor at least 8"),
        (["compare", "a.png", "--short-side", "7"], "7 is neither 0 nor at least 8"),
        (["serve", "--short-side", "1"], "1 is neither 0 nor at least 8"),
        (["gradcam", "a.png", "--width", "4097"], "4097 is more than a column of a figure may have, 4096"),
        (["train", "--step", "4"], "segnext train: unrecognized arguments: --step 4 (segnext train --help says more)"),
        (["data", "list", "a"], "segnext data list: unrecognized arguments: a (segnext data list --help says more)"),
        (["--size", "info"], "segnext: unrecognized arguments: --size (segnext --help says more)"),
        (["predict", "a.png", "--weights", "w", "--out", "o", "--rank", "0"], "not positive"),
        (["predict", "a.png", "--weights", "w", "--out", "o", "--rank", "100000000"], "more than any head has channels, 1024"),
        (["predict", "a.png", "--weights", "w", "--out", "o", "--device", "abacus"], "abacus"),
        (["demo", "--seconds", "nan"], "no length of time"),
        (["demo", "--size", "xl"], "xl"),
        (["demo", "--image-size", "16x64"], "at least 32 pixels"),
        (["info", "--image-size", "512"], "HEIGHTxWIDTH"),
        (["train", "--data", "d", "--scale", "512"], "'512' is not two whole numbers, as 512x512"),
        (["demo", "--seed", "x"], "--seed: x is no whole number"),
        (["info", "--classes", "1.5"], "--classes: 1.5 is no whole number"),
        (["demo", "--seconds", "long"], "--seconds: long is no number"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        run(*arguments)
    assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    "command, missing, extra",
    [
        ("predict", "torchvision", "models"),
        ("predict", "safetensors", "models"),
        ("demo", "tqdm", "models"),
        ("gradcam", "pytorch_grad_cam", "look"),
        ("compare", "transformers", "look"),
    ],
)
def test_missing_extras_are_named_in_one_line(tmp_path, command, missing, extra):
    """Run by itself, because it takes a fresh import of everything."""
    arguments = {
        "predict": ["predict", "a.png", "--weights", "w.safetensors", "--out", "out"],
        "demo": ["demo"],
        "gradcam": ["gradcam", "a.png", "--weights", "w.safetensors", "--out", "out.png"],
        "compare": ["compare", "a.png", "--truth", "a.png", "--weights", "w.safetensors", "--out", "out.png"],
    }[command]
    (tmp_path / "a.png").touch()
    segnext.save(small.model(), tmp_path / "w.safetensors")
    code = f"import sys; sys.modules[{missing!r}] = None; from segnext.cli import main; sys.exit(main({arguments}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    message = f"segnext: this needs {missing}: pip install 'segnext-kernels[{extra}]'\n"
    assert (done.returncode, done.stderr) == (2, message)


def test_names_that_a_terminal_cannot_show(tmp_path):
    model = small.labelling(["\u9053", "sky", "car"])
    segnext.save(model, tmp_path / "w.pth")
    (tmp_path / "classes.txt").write_text("\u9053\nsky\ncar", encoding="utf-8")
    for kind in ("images", "masks"):
        (tmp_path / "val" / kind).mkdir(parents=True)
        Image.new("L", (40, 40)).save(tmp_path / "val" / kind / "a.png")
    command = [sys.executable, "-m", "segnext", "evaluate", "--weights", tmp_path / "w.pth", "--data", tmp_path]
    done = subprocess.run(command, env=os.environ | {"PYTHONIOENCODING": "latin-1"}, capture_output=True)
    assert done.returncode == 0 and rb"\u9053" in done.stdout, done.stderr


@pytest.mark.parametrize("place, name", [(demo, "demo"), (cli, "_parser")], ids=["running", "parsing"])
def test_interruption(monkeypatch, capsys, place, name):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(place, name, interrupted)
    assert run("demo") == 130
    assert capsys.readouterr().err == "segnext: interrupted\n"


def test_bugs_keep_their_traceback(monkeypatch, tmp_path):
    monkeypatch.setattr(predict, "predict", lambda *args, **options: {}["bug"])
    with pytest.raises(KeyError):
        run("predict", "a.png", "--weights", "w", "--out", tmp_path)
