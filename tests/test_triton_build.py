"""The Triton kernels compiled for GPUs that are not there: no spills, few launches; and traced.

What is compiled is a sample, chosen in triton_sample.py; ``python -m bench triton-static`` compiles everything.
In processes of their own, for here the kernels are interpreted, where there is no GPU.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import triton_static
from bench.__main__ import main
from segnext_kernels import _select, _triton, build_info

pytestmark = [
    pytest.mark.skipif(_triton.failure is not None, reason=str(_triton.failure)),
    pytest.mark.skipif(
        torch.version.cuda is None, reason="this torch has no CUDA, and so no tensors of a GPU that is not there"
    ),
]
ROOT = Path(__file__).parents[1]
NMF = {"finish", "step", "approximate", "step_backward", "finish_backward", "gradient_of_x"}

LAUNCHES = """
import torch
from bench import triton_static as static
from segnext_kernels.nmf import triton as nmf

for steps in (0, 1, 7):
    for rank in (16, 64):
        print(len(static.record(lambda: nmf.forward(torch.empty(2, 256, 4096), torch.empty(2, 256, rank), steps, "exact"))))
"""


def run(*arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # where bench is
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    return json.loads(run("tests/triton_sample.py").splitlines()[-1])


def test_all_compile_without_spills_and_fit(compiled):
    assert not [c for c in compiled if not c["fits"]]


def test_every_kernel_is_compiled_for_every_target(compiled):
    names = {"strips", "gradients", "reduce", "activate", "differentiate", "highest"}
    names |= NMF
    names |= {"add_scaled", "add_scaled_backward", "add_losses", "add_weights", "keep_log_sum_exps", "gather"}
    assert {(c["kernel"], c["target"]) for c in compiled} == {
        (name, target) for name in names for target in triton_static.TARGETS
    }


def test_every_kernel_of_images_is_compiled_for_every_dtype_and_both_layouts(compiled):
    of_factors = {"finish", "finish_backward", "reduce", "add_weights"}
    for name in {c["kernel"] for c in compiled} - of_factors:
        some = [c["configuration"] for c in compiled if c["kernel"] == name]
        assert {c.split()[0] for c in some} == {"fp32", "bf16", "fp16"}, name
        if name in ("strips", "gradients", "activate", "differentiate"):
            assert {"LAST=True" in c for c in some} == {True, False}, name


def test_products_of_16_bits_are_made_on_tensor_cores(compiled):
    steps = [c for c in compiled if c["kernel"] == "step" and c["configuration"].startswith(("bf16", "fp16"))]
    assert {c["target"] for c in steps} == set(triton_static.TARGETS) and all(c["tensor_cores"] for c in steps)


def test_high_ranks_are_compiled(compiled):
    """Of B and L, and above 64, forward and backward."""
    for rank in (64, 128):
        some = [c for c in compiled if f"RANK={rank}" in c["configuration"]]
        assert {c["kernel"] for c in some} == NMF and {c["target"] for c in some} == set(triton_static.TARGETS)


def test_launches_of_nmf():
    """At most two for each step and three more."""
    counts = list(map(int, run("-c", LAUNCHES).split()))
    assert counts == [2 * steps + 2 for steps in (0, 1, 7) for _ in range(2)]


def test_torch_compile_sees_through():
    assert run("tests/triton_traced.py").count("is seen through") == 6


@pytest.mark.parametrize("operator", _select.TRITON_OPERATORS)
def test_signatures_make_schemas(operator):
    """``torch.library.triton_op``, which serves where there is a GPU, makes one of the annotations even if it is given one."""
    module = importlib.import_module(f"segnext_kernels.{operator}.triton")
    for name in {"forward", "backward"} & set(vars(module)):
        assert torch.library.infer_schema(getattr(module, name), mutates_args=())


def test_autocast_on_gpus_is_registered():
    """For those that cast; the others take what they are given, under autocast as elsewhere."""
    cast = {"msca_strips": True, "dwconv_gelu": True, "nmf": True, "scale_add": False, "upsample_cross_entropy": False}
    for name, casts in cast.items():
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"{_triton.NAMESPACE}::{name}", "AutocastCUDA") == casts


def test_triton_static_command(monkeypatch, capsys):
    monkeypatch.setattr(triton_static, "report", lambda case, target: f"# a table of {case} for {target}")
    assert main(["triton-static", "--target", "sm_90"]) == 0
    assert capsys.readouterr().out == "# a table of * for sm_90\n"
    monkeypatch.setitem(_triton.__dict__, "failure", "Triton is not installed (somewhere)")
    assert main(["triton-static"]) == 2
    assert "there are no Triton kernels to compile: Triton is not installed" in capsys.readouterr().err
    assert build_info()["missing"]["triton"] == "Triton is not installed (somewhere)"


def test_bytes_moved():
    """The table of what is moved names every operator that has a limit."""
    text = "\n".join(triton_static.moved())
    assert "| msca_strips | 16x64x64x64 | contiguous | 1.00 |" in text
    assert "| nmf, 7 steps | 16x256x4096, rank 16 | 16 bits, sm_80 | 8 |" in text
    assert "| nmf, 7 steps | 16x256x4096, rank 16 | float32 | 15 | 14.0 |" in text  # what is read again is in the L2
    shares = [float(line.split("|")[4]) for line in text.splitlines() if line.startswith("| upsample_cross_entropy")]
    assert shares and max(shares) <= 1
