"""Which backend serves, who says so, and the instruction set that the environment asks for."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from operators import dwconv_gelu_sample, msca_strips_sample, nmf_sample

import segnext_kernels
from segnext_kernels import _load, _select, build_info, explain

OPERATORS = ("msca_strips", "dwconv_gelu", "nmf")
X = {"msca_strips": torch.ones(1, 2, 3, 4), "dwconv_gelu": torch.ones(1, 2, 3, 4), "nmf": torch.ones(1, 2, 3)}
AGREE = """
import torch, segnext_kernels
from operators import DTYPES, arrange, check, dwconv_gelu_sample, grad_like, msca_strips_sample, nmf_sample

assert segnext_kernels.build_info()["isa"] == {isa!r}, segnext_kernels.build_info()
samples = [make((2, 33, 13, 21)) for make in (msca_strips_sample, dwconv_gelu_sample)]
samples += [nmf_sample(2, 45, 70, 17, 6, gradient) for gradient in ("exact", "one_step")]
for sample in samples:
    for dtype in DTYPES:
        for layout in ("contiguous", "transposed" if sample.operator == "nmf" else "channels_last"):
            cast = sample.to(dtype)
            check(cast.with_x(arrange(cast.x, layout)), "cpu", grad_like(cast.x))
print("agreed")
"""


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), **environment}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)


def test_public_names():
    assert set(segnext_kernels.__all__) == {"build_info", "dwconv_gelu", "explain", "msca_strips", "nmf"}


@pytest.mark.parametrize("operator", OPERATORS)
def test_explain(operator, backend):
    answer = explain(operator, X[operator])
    assert list(answer) == list(_select.BACKENDS)
    assert list(answer.values()).count("serves") == 1
    assert answer[backend] in ("serves", "could serve")
    assert all(answer.values())


@pytest.mark.parametrize("operator", OPERATORS)
def test_explain_without_compiled_kernels(operator, monkeypatch):
    monkeypatch.setattr(_load, "failure", "they were left out")
    answer = explain(operator, X[operator])
    assert answer["cpu"] == "they were left out"
    assert answer["reference"] == "serves"
    assert build_info()["missing"]["cpu"] == "they were left out"
    with pytest.raises(ValueError, match=f"{operator}: backend 'cpu' cannot serve this call: they were left out"):
        _select.select(operator, "cpu", X[operator])
    assert _select.select(operator, None, X[operator]) == "reference"


def test_explain_other_device():
    answer = explain("nmf", torch.ones(1, 2, 3, device="meta"))
    assert answer["cpu"] == "x is on meta, the compiled kernels are for the CPU"
    assert answer["reference"] == "serves"


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_compiled_kernels_come_first(backend):
    for operator, x in X.items():
        assert explain(operator, x)["cpu"] == "serves"
        assert explain(operator, x)["reference"] == "could serve"


def test_explain_unknown_operator():
    with pytest.raises(ValueError, match="there is no operator 'conv2d'; there are msca_strips, dwconv_gelu, nmf"):
        explain("conv2d", torch.ones(1))


def test_unknown_backend():
    assert _select.why_not("tpu", "nmf", X["nmf"]) == "there is no backend 'tpu'; there are cuda, triton, cpu, reference"


def test_build_info(backend):
    info = build_info()
    assert set(info) == {"version", "isa", "torch_built", "torch_running", "compiler", "cuda_architectures", "missing"}
    assert info["version"] == segnext_kernels.__version__
    assert info["torch_running"] == torch.__version__
    assert info["cuda_architectures"] == []
    assert set(info["missing"]) <= {"cuda", "triton", "cpu"}
    if backend == "cpu":
        assert info["isa"] in _load._LIBRARIES
        assert info["torch_built"]
        assert info["compiler"]
        assert "cpu" not in info["missing"]


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_operators_called_directly_stay_within_their_memory(backend):
    """Whoever goes around the public functions, and their messages, still gets an exception for arguments that do not fit."""
    operators = torch.ops.segnext_kernels
    x, *weights = msca_strips_sample((2, 4, 9, 8)).leaves
    _, weight, bias = dwconv_gelu_sample((2, 4, 9, 8)).leaves
    matrix, bases = nmf_sample(2, 5, 9, 3, 2).leaves
    calls = {
        "too few weights": lambda: operators.msca_strips(x, weights[:-1]),
        "too few channels": lambda: operators.msca_strips(x, [w[:2] for w in weights]),
        "other dtype": lambda: operators.msca_strips(x, [w.half() for w in weights]),
        "strides": lambda: operators.msca_strips(x[..., ::2], weights),
        "smaller gradient": lambda: operators.msca_strips_backward(x[:1], x, weights, True, True),
        "short filter": lambda: operators.dwconv_gelu(x, weight[:2], bias),
        "short bias": lambda: operators.dwconv_gelu_backward(x, x, weight, bias[:1], True, True),
        "fewer rows": lambda: operators.nmf(matrix, bases[:, :2], 2, "exact"),
        "fewer matrices": lambda: operators.nmf_backward(matrix, matrix, bases[:1], 2, "exact", True, True),
        "strided bases": lambda: operators.nmf(matrix, bases.mT.contiguous().mT, 2, "exact"),
        "negative steps": lambda: operators.nmf(matrix, bases, -1, "exact"),
    }
    for what, call in calls.items():
        with pytest.raises(RuntimeError, match="segnext_kernels: "):
            call()
            pytest.fail(f"{what} was accepted")


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_other_instruction_sets(isa, backend):
    if importlib.util.find_spec(f"segnext_kernels._C_{isa}") is None:
        pytest.skip(f"there is no library for {isa} on this platform")
    features = importlib.import_module("segnext_kernels._cpu").features()
    missing = [name for name in _load._LIBRARIES[isa] if name not in features]
    if missing:
        pytest.skip(f"this processor lacks {', '.join(missing)}")
    result = python(AGREE.format(isa=isa), **{_load.ISA_VARIABLE: isa})
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "agreed"


def test_unknown_instruction_set():
    result = python("import segnext_kernels", **{_load.ISA_VARIABLE: "sse9"})
    assert result.returncode != 0
    assert (
        "ImportError: SEGNEXT_KERNELS_ISA=sse9: there is no such instruction set; there are avx512_bf16, avx512"
        in result.stderr
    )


def test_reference_alone():
    """An installation without compiled kernels: everything is served, and the reason is told."""
    code = """
import sys
sys.modules["segnext_kernels._cpu"] = None
import torch, segnext_kernels
x = torch.ones(1, 2, 3)
print(segnext_kernels.nmf(x, x, 1).shape, segnext_kernels.build_info()["isa"])
print(segnext_kernels.explain("nmf", x))
"""
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert "torch.Size([1, 2, 3]) None" in result.stdout
    assert "the compiled CPU kernels were not built" in result.stdout
    assert "SEGNEXT_KERNELS_COMPILE" in result.stdout
