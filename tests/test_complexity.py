"""Parameters and multiply-accumulates against the paper's table and torchprofile, and what is measured beside them."""

from __future__ import annotations

from pathlib import Path
from time import sleep

import folders
import pytest
import torch
from torch import nn

import segnext
from segnext import WeightsError, cli, complexity, speed, table2
from segnext.data import open_dataset
from segnext.recipes import RecipeError
from segnext.speed import Speed

MODELS = pytest.mark.parametrize(("size", "head"), complexity.PAPER, ids=lambda value: value)


@MODELS
def test_paper_figures(size, head):
    found = complexity.count(size, head)
    assert (f"{found.parameters / 1e6:.1f}", f"{found.macs / 1e9:.1f}") == tuple(map(str, complexity.PAPER[size, head]))


@pytest.mark.parametrize(
    ("size", "head", "macs"),
    [("t", "ham", 6591770624), ("t", "msca", 6665732096), ("s", "ham", 15850631168), ("s", "msca", 15924592640)],
)
def test_torchprofile_figures(size, head, macs):
    """What torchprofile 0.1.0 counts for the models in plain PyTorch that are given the decomposition's bases."""
    assert complexity.count(size, head).macs == macs


def test_info():
    assert complexity.info("b", "msca").splitlines() == [
        "SegNeXt-B, msca head, 150 classes, 512x512 pixels",
        "28.0 M parameters, 33.6 GFLOPs (multiply-accumulates, as the paper counts)",
    ]


def test_info_follows_classes_and_image():
    fewer = complexity.info("t", "ham", num_classes=2, image_size=(240, 320))
    assert "2 classes, 240x320 pixels" in fewer
    assert complexity.count("t", num_classes=2).parameters == complexity.count("t").parameters - 148 * 257


def test_table2():
    title, *rows = complexity.table2().splitlines()
    assert title.split() == ["size", "head", "parameters", "(M)", "paper", "GFLOPs", "paper"]
    assert len(rows) == 8
    for row, ((size, head), (parameters, gflops)) in zip(rows, complexity.PAPER.items(), strict=True):
        assert row.split() == [size.upper(), head, str(parameters), str(parameters), str(gflops), str(gflops)]


class Slow(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sleep(0.02)
        return x


class Hungry(nn.Module):
    """Has weights of 4 MiB, and beside them takes 64 MiB for a large image."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1 << 20))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ones(64 << 20 if x.shape[-1] > 64 else 1, dtype=torch.uint8)


def test_latency_is_the_median(monkeypatch):
    monkeypatch.setattr(speed, "SECONDS", 0.1)
    assert 0.02 <= speed.latency(Slow(), torch.zeros(1, 3, 8, 8)) < 0.06


def test_memory_is_weights_and_peak():
    """In a process of its own, as it is meant: memory that earlier tests freed would serve the 64 MiB."""
    tests = str(Path(__file__).parent)
    code = f"import sys, torch; sys.path.insert(0, {tests!r}); import test_complexity as t;"
    code += "print(t.speed.memory(t.Hungry(), torch.zeros(1, 3, 128, 128)))"
    assert 67 < int(speed.in_new_process(["-c", code], returning=True)) / 2**20 < 72


def test_measure():
    """In processes of their own; T has 4.3 million weights, and 4 bytes for each."""
    found = speed.measure("t", "ham", (64, 64))
    assert 1e-4 < found.seconds < 10
    assert 16 * 2**20 < found.bytes < 64 * 2**20


def test_table2_with_measurements(monkeypatch, capsys):
    def measure(size, head, device):
        return Speed(seconds=0.0125 if head == "ham" else 0.02, bytes=3 << 20)

    monkeypatch.setattr(speed, "measure", measure)
    assert cli.main(["table2", "--measure"]) == 0
    title, *rows = capsys.readouterr().out.splitlines()
    assert title.split()[-3:] == ["paper", "ms", "MiB"] and len({len(line) for line in (title, *rows)}) == 1
    assert [row.split()[-2:] for row in rows] == [["12.5", "3"], ["20.0", "3"]] * 4


@pytest.fixture
def labelled(tmp_path):
    """A data set and T's weights for its classes: T-MSCA's say only class 0."""
    folders.folder(tmp_path / "data", train=0, val=1)
    (tmp_path / "weights").mkdir()
    for head in ("ham", "msca"):
        torch.manual_seed(0)
        model = segnext.create("t", len(folders.CLASSES), head)
        if head == "msca":
            nn.init.zeros_(model.decode_head.conv_seg.weight)
            model.decode_head.conv_seg.bias.data[0] = 1
        segnext.save(model, tmp_path / "weights" / f"t-{head}.pth")
    return tmp_path


def test_table2_with_miou(labelled, capsys, set_threads, monkeypatch):
    set_threads(1)  # of tiny pictures
    options = ["--data", str(labelled / "data"), "--recipe", "folder", "--workers", "0"]
    assert cli.main(["table2", "--weights-dir", str(labelled / "weights"), *options]) == 0
    title, ham, msca, *others = capsys.readouterr().out.splitlines()
    assert title.endswith("mIoU SS   mIoU MS") and all(row.split()[-2:] == ["-", "-"] for row in others)
    truth = torch.cat([labels.flatten() for _, labels in open_dataset("folder", labelled / "data", "val")])
    truth = truth[truth != 255]
    expected = 100 * (truth == 0).double().mean().item() / len(truth.unique())
    assert msca.split()[-2:] == [f"{expected:.1f}"] * 2
    assert 0 <= float(ham.split()[-2]) <= 100 and ham.split()[-2:] != msca.split()[-2:]

    def evaluated(weights, *arguments):
        return {"mIoU SS": {model: Path(file).name for model, file in weights.items()}}

    monkeypatch.setattr(table2, "miou_columns", evaluated)
    assert cli.main(["table2", "--weights", f"T-MSCA={labelled / 'weights' / 't-msca.pth'}", *options]) == 0
    assert [row.split()[-1] for row in capsys.readouterr().out.splitlines()[1:]] == ["-", "t-msca.pth", *"-" * 6]


def test_table2_errors(labelled):
    data, weights = labelled / "data", labelled / "weights"
    with pytest.raises(WeightsError, match=r"t-ham\.pth is no SegNeXt-T with the msca head"):
        table2.table2(weights={("t", "msca"): weights / "t-ham.pth"}, data=data, recipe="folder")
    for given in ({"weights": {("t", "ham"): weights / "t-ham.pth"}}, {"data": data}):
        with pytest.raises(RecipeError, match="give both --weights and --data"):
            table2.table2(**given)
    with pytest.raises(WeightsError, match=r"no checkpoint with a name as t-ham\.pth"):
        table2.in_folder(data)
    (weights / "t-ham.safetensors").touch()
    with pytest.raises(WeightsError, match=r"t-ham\.pth and t-ham\.safetensors are of one model"):
        table2.in_folder(weights)


@pytest.mark.parametrize("text", ["t-ham", "T-HAM=", "xl-ham=a.pth", "t-cheese=a.pth"])
def test_weights_of_another_form(text, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["table2", "--weights", text])
    assert ended.value.code == 2 and "is not MODEL=FILE" in capsys.readouterr().err
