"""Parameters and multiply-accumulates against the paper's table and torchprofile."""

from __future__ import annotations

import pytest

from segnext import complexity

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
