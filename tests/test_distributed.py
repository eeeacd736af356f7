"""Several processes, forked or started by torchrun, train and evaluate like one with the same total batch."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import folders
import pytest
import torch
from torch import nn

import segnext
from segnext import cli, distributed
from segnext.run import read_csv

TESTS = Path(__file__).parent


def start(processes: int, *program) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    ended = subprocess.run(
        [sys.executable, *torchrun, *map(str, program)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, list[dict]]:
    """Of every run in distributed_run.py what each process found."""
    out = tmp_path_factory.mktemp("runs")
    start(1, TESTS / "distributed_run.py", out)
    return {run.name: [torch.load(path, weights_only=True) for path in sorted(run.iterdir())] for run in out.iterdir()}


@pytest.fixture(scope="module")
def one(found) -> dict:
    (one,) = found["one"]
    return one


@pytest.fixture(scope="module")
def two(found) -> list[dict]:
    first, second = found["two"]
    return [first, second]


def test_losses_and_gradients_are_those_of_one_process(one, two):
    """Those of the last step, and what AdamW has added up of all."""
    for other, kind in itertools.product(two, ("gradients", "momenta")):
        assert other["losses"] == pytest.approx(one["losses"], rel=1e-4)
        for name, gradient in one[kind].items():
            scale = gradient.abs().max().item()
            torch.testing.assert_close(other[kind][name], gradient, rtol=0, atol=2e-3 * scale + 1e-7, msg=name)


def test_weights_are_the_same_in_all_processes(two):
    assert two[0]["state"].keys() == two[1]["state"].keys()
    for name, value in two[0]["state"].items():
        assert torch.equal(value, two[1]["state"][name]), name


def test_statistics_of_norms_are_those_of_one_process(one, two):
    statistics = [name for name in one["state"] if "running_" in name]
    assert statistics
    for name in statistics:
        torch.testing.assert_close(two[0]["state"][name], one["state"][name], rtol=1e-3, atol=1e-3, msg=name)


def test_evaluation_counts_every_picture_once(one, two):
    assert sorted(two[0]["seen"] + two[1]["seen"]) == sorted(one["seen"]) == list(range(7))
    assert torch.equal(two[0]["confusion"], two[1]["confusion"])
    pixels = one["confusion"].sum().item()
    assert two[0]["confusion"].sum() == pixels
    assert (two[0]["confusion"] - one["confusion"]).abs().sum() < 0.02 * pixels  # the weights differ in the last bits


def test_norms_that_are_not_synchronised_see_less(one, found):
    """The test above would notice it; and all processes evaluate the first one's statistics."""
    first, second = found["plain"]
    assert first["losses"] != pytest.approx(one["losses"], rel=1e-4)
    assert all(torch.equal(first["state"][name], second["state"][name]) for name in first["state"])


def test_the_command_in_two_processes_computes_what_it_does_in_two_parts(tmp_path):
    """Each process draws its own crops, and what it drops, as the part would."""
    data = folders.folder(tmp_path / "data", train=5, val=3)
    options = (
        "--recipe scratch --iterations 4 --batch 4 --crop 32x32 --scale 64x32 --precision float32 --no-sync-norm --dropout 0.5"
    )
    options += " --drop-path 0.3 --log-every 1 --save-every 2 --evaluate-every 3 --workers 0"
    command = ["-m", "segnext", "train", "--data", str(data), *options.split()]
    start(2, *command, "--out", tmp_path / "two")
    assert cli.main([*command[2:], "--out", str(tmp_path / "one"), "--accumulate", "2"]) == 0
    losses = [[float(row["loss"]) for row in read_csv(tmp_path / name / "train.csv")] for name in ("one", "two")]
    assert len(losses[0]) == 4 and losses[1] == pytest.approx(losses[0], rel=2e-3)
    assert [row["step"] for row in read_csv(tmp_path / "two" / "val.csv")] == ["3", "4"]
    for name in ("model.pth", "last.pth", "best.pth"):
        assert segnext.load(tmp_path / "two" / name).classes == folders.CLASSES
    start(2, "-m", "segnext", "train", "--resume", tmp_path / "two")  # it has ended: nothing happens, in neither process


def test_three_processes_go_on_with_the_same_bits(found):
    """Three numbers can be added in another order, two cannot."""
    assert len(found["three"]) == 3
    for result in found["three"]:
        assert result["done"] == 4
        for name, value in result["unbroken"].items():
            assert torch.equal(result["resumed"][name], value), name


def test_synchronised_norm_alone_is_a_batch_norm():
    torch.manual_seed(0)
    plain = nn.BatchNorm2d(3)
    norms = nn.Sequential(nn.BatchNorm2d(3))
    assert distributed.synchronise_norms(norms) is norms and type(norms[0]) is nn.BatchNorm2d
    synchronised = distributed.SyncBatchNorm2d(3)
    x = torch.randn(4, 3, 5, 6)
    torch.testing.assert_close(synchronised(x), plain(x))
    assert (distributed.rank(), distributed.world_size(), distributed.broadcast_object("a")) == (0, 1, "a")
