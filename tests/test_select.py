"""Which backend serves, who says so, and the instruction set that the environment asks for."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from operators import FUNCTIONS, compiled, dwconv_gelu_sample, msca_strips_sample, nmf_sample, require
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import segnext_kernels
from segnext_kernels import _load, _select, _triton, build_info, explain

OPERATORS = ("msca_strips", "dwconv_gelu", "nmf")
X = {"msca_strips": torch.ones(1, 2, 3, 4), "dwconv_gelu": torch.ones(1, 2, 3, 4), "nmf": torch.ones(1, 2, 3)}
SMALL = (msca_strips_sample((1, 3, 6, 7)), dwconv_gelu_sample((1, 3, 6, 7)), nmf_sample(1, 5, 9, 3, 2))
AGREE = """
import checks, segnext_kernels
assert segnext_kernels.build_info()["isa"] == {isa!r}, segnext_kernels.build_info()
checks.check_all_operators()
print("agreed")
"""

# Instruction sets that are asked for, what stands in for the compiled modules, and why they are refused then.
REFUSED = {
    "unknown": ("sse9", "{}", "there is no such instruction set; there are amx_bf16, avx512_bf16, avx512, avx2, baseline"),
    "nothing-built": ("baseline", "{'_cpu': None}", "the compiled CPU kernels were not built (SEGNEXT_KERNELS_COMPILE=0"),
    "lacking": ("avx2", "{'_cpu': processor(['fma'])}", "this processor lacks avx2, f16c"),
    "of-another-version": (
        "baseline",
        "{'_cpu': SimpleNamespace(features=list, INTERFACE=0)}",
        "the compiled kernels are of another version of this package than its Python files: reinstall it",
    ),
    "not-built": (
        "baseline",
        "{'_cpu': processor([]), '_C_baseline': None}",
        "the compiled CPU kernels were not built for baseline",
    ),
}


# Halves that as floats are not subnormal, beside a processor that flushes these.
SMALL_HALVES = """
import torch
torch.set_flush_denormal(True)
x = torch.full((1, 8, 16, 16), 3e-5, dtype=torch.float16)
assert segnext_kernels.scale_add(x, torch.zeros_like(x), torch.ones(8), backend="cpu").equal(x)
"""


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), **environment}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)


def test_public_names():
    assert set(segnext_kernels.__all__) == {"build_info", "explain", "pack", "patch", "unpatch", *_select.OPERATORS}


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
    assert answer["cpu"] == "x is on meta, these kernels are for the CPU"
    assert answer["reference"] == "serves"


@pytest.mark.parametrize(
    ("operator", "dtype", "failure", "reason"),
    [
        ("nmf", torch.float32, None, "the CUDA kernels are for msca_strips and dwconv_gelu"),
        ("msca_strips", torch.float64, None, "the CUDA kernels are for float32, bfloat16 and float16, x is float64"),
        ("msca_strips", torch.float32, "they were left out", "they were left out"),
    ],
)
def test_why_cuda_does_not_serve(operator, dtype, failure, reason, monkeypatch):
    monkeypatch.setattr(_load, "cuda_failure", failure)
    with FakeTensorMode():
        x = torch.empty(1, 2, 3, 4, dtype=dtype, device="cuda")
        answer = explain(operator, x)
        assert answer["cuda"] == reason
        triton = _triton.failure is None and dtype != torch.float64
        assert (answer["triton"], answer["reference"])[0 if triton else 1] == "serves"
    assert explain("msca_strips", torch.ones(1, 2, 3, 4))["cuda"] == "x is on cpu, these kernels are for CUDA"


@pytest.mark.parametrize(
    ("built", "capability", "fits"),
    [
        ("8.0 9.0", (8, 6), True),
        ("8.6 9.0", (8, 0), False),
        ("8.0 9.0", (10, 0), False),
        ("9.0+PTX", (12, 0), True),
        ("9.0a+PTX", (9, 0), True),
        ("9.0a+PTX", (12, 0), False),
    ],
)
def test_gpus_that_the_cuda_kernels_fit(built, capability, fits, monkeypatch):
    monkeypatch.setattr(_load, "cuda_architectures", built.split())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(_load, "cuda_version", 13000)
    monkeypatch.setattr(_load, "cuda_driver", lambda: 13000)
    reason = _load.why_not_on_gpu.__wrapped__(0)
    major, minor = capability
    assert reason == (
        None if fits else f"the CUDA kernels were built for {', '.join(built.split())}, this GPU is {major}.{minor}"
    )


@pytest.mark.parametrize(
    ("driver", "own", "fits"),
    [
        (12080, (9, 0), False),
        (13000, (9, 0), True),
        (13020, (9, 0), True),
        (14000, (12, 0), True),
        (13000, (12, 0), False),  # compiled by the driver, from what a newer toolkit made
        (13010, (12, 0), True),
    ],
)
def test_drivers_that_the_cuda_kernels_fit(driver, own, fits, monkeypatch):
    monkeypatch.setattr(_load, "cuda_architectures", ["9.0+PTX"])
    monkeypatch.setattr(_load, "cuda_version", 13010)
    monkeypatch.setattr(_load, "cuda_driver", lambda: driver)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: own)
    reason = _load.why_not_on_gpu.__wrapped__(0)
    assert fits == (reason is None)
    known = f"{driver // 1000}.{driver % 1000 // 10}"
    assert fits or f"were built with CUDA 13.1, which this driver is too old for (it knows CUDA {known})" in reason


@pytest.mark.skipif(_load.cuda_failure is not None, reason=f"no CUDA kernels: {_load.cuda_failure}")
def test_the_library_knows_the_driver():
    assert _load.cuda_version >= 12000
    assert (_load.cuda_driver() >= 12000) == torch.cuda.is_available()
    assert (_load.why_not_on_gpu(0) is None) if torch.cuda.is_available() else True


def test_a_schema_does_not_change_without_the_interface():
    """A library that was built before would take the arguments of the new schema for those of the old one."""
    schemas = (str(s) for s in torch._C._jit_get_all_schemas() if s.name.startswith("segnext_kernels::"))
    digest = hashlib.sha256("\n".join(sorted(schemas)).encode()).hexdigest()
    assert (_load.INTERFACE, digest[:8]) == (4, "a65b5af2"), "count _load.INTERFACE up, and write the new digest here"


@pytest.mark.parametrize(("capability", "served"), [((7, 5), "reference"), ((9, 0), "triton")])
def test_compiled_calls_are_served_as_others(capability, served, monkeypatch):
    """By what the GPU at hand can run."""
    monkeypatch.setattr(_load, "cuda_failure", "they were left out")
    monkeypatch.setattr(_triton, "failure", None)
    monkeypatch.setattr(_triton, "has_gpu", lambda: True)
    monkeypatch.setattr(_triton, "_capability", lambda index: capability)

    class Labels(torch.nn.Module):
        def forward(self, logits):
            return segnext_kernels.upsample_argmax(logits, (8, 8)), segnext_kernels.dwconv_gelu(
                logits, torch.ones(2, 1, 3, 3).to(logits), logits[0, :, 0, 0]
            )

    with FakeTensorMode():
        logits = torch.empty(1, 2, 4, 4, device="cuda")
        assert next(name for name, answer in explain("dwconv_gelu", logits).items() if answer == "serves") == served
        program = torch.export.export(Labels(), (logits,), strict=True)
    called = {str(node.target).split(".")[0] for node in program.graph.nodes if "segnext" in str(node.target)}
    assert called == (set() if served == "reference" else {"segnext_kernels_triton"})


def test_triton_serves_where_cuda_was_not_built(monkeypatch):
    """And without Triton plain PyTorch, each with its reason."""
    monkeypatch.setattr(_load, "cuda_failure", "they were left out")
    monkeypatch.setattr(_triton, "failure", None)
    with FakeTensorMode():
        x, double = (torch.empty(1, 2, 3, 4, dtype=dtype, device="cuda") for dtype in (torch.bfloat16, torch.float64))
        answer = explain("msca_strips", x)
        assert (answer["cuda"], answer["triton"], answer["reference"]) == ("they were left out", "serves", "could serve")
        assert "float32, bfloat16 and float16, x is float64" in explain("msca_strips", double)["triton"]
        assert explain("conv_act", x)["triton"].startswith("the Triton kernels are for msca_strips, dwconv_gelu, nmf")
        assert "ranks up to 128, got 200" in explain("nmf", x, rank=200)["triton"]
        for large in ((1, 2, 2**30), (1, 2**16, 3)):
            assert "below 2**31 elements and 65536 rows" in explain("nmf", x.new_empty(large))["triton"]
        monkeypatch.setattr(_triton, "capability", lambda x: (7, 5))
        assert explain("msca_strips", x)["triton"].endswith("from compute capability 8.0 on, this one has 7.5")
        monkeypatch.setattr(_triton, "failure", "Triton is not installed")
        answer = explain("msca_strips", x)
        assert (answer["triton"], answer["reference"]) == ("Triton is not installed", "serves")


@pytest.mark.parametrize(("name", "serves"), [("gfx942:sramecc+:xnack-", True), ("gfx90a", True), ("gfx1100", False)])
def test_amds_gpus_with_matrix_cores_are_served(name, serves, monkeypatch):
    monkeypatch.setattr(_triton, "failure", None)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(_triton, "architecture", lambda x: name)
    with FakeTensorMode():
        reason = _select.why_not("triton", "nmf", torch.empty(1, 2, 3, device="cuda"))
    assert reason is None if serves else reason.endswith("wavefronts of 64 threads; this one is gfx1100")


def test_triton_on_the_cpu_is_the_interpreter(monkeypatch):
    monkeypatch.setattr(_triton, "failure", None)
    assert explain("nmf", X["nmf"])["triton"] == "x is on cpu, these kernels are for GPUs"
    monkeypatch.setattr(_triton, "interpreted", True)
    assert explain("nmf", X["nmf"])["triton"] == "serves"


def test_triton_as_it_is_interpreted_elsewhere(monkeypatch):
    """Not mended as in these tests, it is wrong about bfloat16."""
    code = """
import torch
from segnext_kernels import explain
x = torch.rand(1, 2, 3)
answers = [explain("nmf", x.to(dtype))["triton"] for dtype in (torch.float32, torch.float16, torch.bfloat16)]
with torch.autocast("cpu", torch.bfloat16):
    assert explain("nmf", x)["triton"] == answers[-1]
assert answers == ["serves", "serves", "Triton's interpreter cuts bfloat16 off instead of rounding it"], answers
"""
    result = python(code, TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stderr


def test_a_triton_that_is_too_old():
    code = """
import sys
from types import ModuleType
names = "triton", "triton.runtime", "triton.runtime.jit"
triton, runtime, jit = (sys.modules.setdefault(name, ModuleType(name)) for name in names)
triton.__version__, jit.JITFunction = "3.1.0", object
import segnext_kernels
assert segnext_kernels.build_info()["missing"]["triton"] == "Triton 3.1.0 is too old: 3.4 or newer is needed"
"""
    result = python(code)
    assert result.returncode == 0, result.stderr


def test_distributed_tensors_are_plain_pytorchs_matter():
    code = """
import torch, torch.distributed as dist, segnext_kernels as sk
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
x, weight, bias = torch.randn(2, 4, 5, 6), torch.randn(4, 1, 3, 3), torch.randn(4)
mesh = init_device_mesh("cpu", (1,))
split = distribute_tensor(x, mesh, [Shard(0)])
whole = (distribute_tensor(tensor, mesh) for tensor in (weight, bias))
assert "DTensor" in sk.explain("dwconv_gelu", split)["cpu"]
y = sk.dwconv_gelu(split, *whole)
assert y.placements == (Shard(0),)
torch.testing.assert_close(y.full_tensor(), sk.dwconv_gelu(x, weight, bias))
dist.destroy_process_group()
"""
    result = python(code)
    assert result.returncode == 0, result.stderr


@compiled
def test_compiled_kernels_come_first(backend):
    for operator, x in X.items():
        assert explain(operator, x)["cpu"] == "serves"
        assert explain(operator, x)["reference"] == "could serve"


def test_explain_unknown_operator():
    with pytest.raises(ValueError, match="there is no operator 'conv2d'; there are msca_strips, dwconv_gelu, nmf"):
        explain("conv2d", torch.ones(1))


def test_unknown_backend():
    assert _select.why_not("tpu", "nmf", X["nmf"]) == "there is no backend 'tpu'; there are cuda, triton, cpu, reference"


@pytest.mark.parametrize("built", [[], ["_C_baseline.abi3.so"]], ids=["not-built", "built"])
def test_kernels_that_were_built_but_do_not_load_fail_the_tests(built, monkeypatch):
    monkeypatch.setattr(_load, "failure", "no such symbol")
    monkeypatch.setattr("operators.LIBRARIES", built)
    with pytest.raises((pytest.fail if built else pytest.skip).Exception, match="backend 'cpu': no such symbol"):
        require("cpu")


def test_build_info(backend):
    info = build_info()
    assert set(info) == {"version", "isa", "torch_built", "torch_running", "compiler", "cuda_architectures", "missing"}
    assert info["version"] == segnext_kernels.__version__
    assert info["torch_running"] == torch.__version__
    assert bool(info["cuda_architectures"]) == ("cuda" not in info["missing"])
    assert set(info["missing"]) <= {"cuda", "triton", "cpu"}
    if backend == "cpu":
        assert info["isa"] in _load._LIBRARIES
        assert info["torch_built"]
        assert info["compiler"]
        assert "cpu" not in info["missing"]


@compiled
def test_operators_called_directly_stay_within_their_memory(backend):
    """Whoever goes around the public functions, and their messages, still gets an exception for arguments that do not fit."""
    operators = torch.ops.segnext_kernels
    x, *weights = msca_strips_sample((2, 4, 9, 8)).leaves
    _, weight, bias = dwconv_gelu_sample((2, 4, 9, 8)).leaves
    matrix, bases = nmf_sample(2, 5, 9, 3, 2).leaves
    _, kept = operators.nmf_and_factors(matrix, bases, 2, "exact")
    strided = kept.repeat_interleave(2)[::2]
    calls = {
        "too few weights": lambda: operators.msca_strips(x, weights[:-1]),
        "too few channels": lambda: operators.msca_strips(x, [w[:2] for w in weights]),
        "other dtype": lambda: operators.msca_strips(x, [w.half() for w in weights]),
        "no image": lambda: operators.msca_strips(x[0], weights),
        "smaller gradient": lambda: operators.msca_strips_backward(x[:1], x, weights, True, True),
        "short filter": lambda: operators.dwconv_gelu(x, weight[:2], bias),
        "short bias": lambda: operators.dwconv_gelu_backward(x, x, weight, bias[:1], True, True),
        "fewer rows": lambda: operators.nmf(matrix, bases[:, :2], 2, "exact"),
        "fewer matrices": lambda: operators.nmf_backward(matrix, matrix, bases[:1], None, 2, "exact", True, True),
        "strided bases": lambda: operators.nmf(matrix, bases.mT.contiguous().mT, 2, "exact"),
        "negative steps": lambda: operators.nmf(matrix, bases, -1, "exact"),
        "other factors": lambda: operators.nmf_backward(matrix, matrix, bases, kept[:-1], 2, "exact", True, True),
        "strided factors": lambda: operators.nmf_backward(matrix, matrix, bases, strided, 2, "exact", True, True),
    }
    for what, call in calls.items():
        with pytest.raises(RuntimeError, match="segnext_kernels: "):
            call()
            pytest.fail(f"{what} was accepted")


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512_bf16"])
@compiled
def test_other_instruction_sets(isa, backend):
    if importlib.util.find_spec(f"segnext_kernels._C_{isa}") is None:
        pytest.skip(f"there is no library for {isa} on this platform")
    features = importlib.import_module("segnext_kernels._cpu").features()
    missing = [name for name in _load._LIBRARIES[isa] if name not in features]
    if missing:
        pytest.skip(f"this processor lacks {', '.join(missing)}")
    result = python(AGREE.format(isa=isa) + SMALL_HALVES, **{_load.ISA_VARIABLE: isa})
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "agreed"


@pytest.mark.parametrize(("isa", "modules", "reason"), REFUSED.values(), ids=REFUSED)
def test_instruction_set_that_is_refused(isa, modules, reason):
    code = f"""
import sys
from types import SimpleNamespace
def processor(features):
    return SimpleNamespace(features=lambda: features, INTERFACE={_load.INTERFACE})
sys.modules.update((f"segnext_kernels.{{name}}", module) for name, module in {modules}.items())
import segnext_kernels
"""
    result = python(code, **{_load.ISA_VARIABLE: isa})
    assert result.returncode != 0
    assert f"ImportError: {_load.ISA_VARIABLE}={isa}: {reason}" in result.stderr


@pytest.mark.parametrize(("without", "chosen"), [("", "amx_bf16"), ("amx", "avx512"), ("slow amx", "avx512_bf16")])
def test_dot_products_that_are_slow_are_left(monkeypatch, without, chosen):
    """The best library is one with tiles, then one with dot products, unless these make less than multiply-adds do."""
    features = ["slow-avx512bf16", *_load._LIBRARIES["amx_bf16"]]
    have = [name for name in features if not name.startswith(tuple(without.split()))]
    loaded = {}
    monkeypatch.setattr(_load, "facts", loaded)
    processor = SimpleNamespace(features=lambda: have, INTERFACE=_load.INTERFACE)
    monkeypatch.setitem(sys.modules, "segnext_kernels._cpu", processor)
    for isa in _load._LIBRARIES:
        monkeypatch.setitem(sys.modules, f"segnext_kernels._C_{isa}", SimpleNamespace(facts=lambda isa=isa: {"isa": isa}))
    assert _load._load(None) is None and loaded["isa"] == chosen
    if chosen != "amx_bf16":
        assert _load._load("avx512_bf16") is None and loaded["isa"] == "avx512_bf16"  # who asks for it has it


@pytest.mark.parametrize("left", [{"INTERFACE": 0}, {}], ids=["another", "older"])
def test_libraries_that_cannot_be_used_are_told(left, monkeypatch):
    """Of another version, as `git pull` leaves them: whoever built them expects them to be used. Once, and none is loaded,
    since its kernels would be PyTorch's from then on."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setitem(sys.modules, "segnext_kernels._cpu", SimpleNamespace(features=list, **left))
    for name in ("_C_baseline", "_C_cuda"):
        monkeypatch.setitem(sys.modules, f"segnext_kernels.{name}", SimpleNamespace())  # which has no facts
    with pytest.warns(UserWarning, match="another version of this package.* reinstall it; slower backends are used instead"):
        assert "reinstall it" in _load._load(None)
    assert "reinstall it" in _load._load_cuda()


def test_an_installation_that_a_source_tree_hides_is_told(monkeypatch, tmp_path):
    """Python looks first in the folder that it is started in."""
    (tmp_path / "segnext_kernels").mkdir()
    (tmp_path / "segnext_kernels" / "__init__.py").touch()
    installed = SimpleNamespace(locate_file=lambda name: tmp_path / name)
    monkeypatch.setattr(_load.metadata, "distributions", lambda name: [installed])
    monkeypatch.setitem(sys.modules, "segnext_kernels._cpu", None)
    with pytest.warns(UserWarning, match=f"before the one installed in {tmp_path}.*: work in another folder"):
        assert "no kernels were compiled" in _load._load(None)
    monkeypatch.setattr(_load.metadata, "distributions", lambda name: [])
    assert "were not built" in _load._load(None)


def test_metadata_may_be_missing():
    """In a source tree, or what a bundler made."""
    code = """
import importlib.metadata
def version(name):
    raise importlib.metadata.PackageNotFoundError(name)
importlib.metadata.version = version
import segnext_kernels
print(segnext_kernels.__version__)
"""
    result = python(code)
    assert result.stdout.strip() == "unknown", result.stderr


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


@compiled
@pytest.mark.parametrize("operator", OPERATORS)
def test_transforms_go_through_plain_pytorch(operator, backend):
    sample = next(s for s in SMALL if s.operator == operator)
    x, *rest = sample.leaves

    def loss(x, backend=None):
        return FUNCTIONS[operator](x, *rest, **sample.options, backend=backend).square().sum()

    tangent = torch.rand_like(x)
    expected = torch.autograd.grad(loss(leaf := x.clone().requires_grad_(), backend), leaf)[0]
    torch.testing.assert_close(torch.func.grad(loss)(x), expected)
    torch.testing.assert_close(torch.func.jvp(loss, (x,), (tangent,))[1], (expected * tangent).sum())
    with pytest.raises(ValueError, match="forward-mode"):
        torch.func.grad(lambda x: loss(x, backend))(x)
    torch._dynamo.reset()
    compiled_loss = torch.compile(loss, backend="eager")
    compiled_loss(x)
    for jvp in (  # what is compiled must not take the kernels' way either, whose tangents are zero
        lambda: torch.compile(lambda x: torch.func.jvp(loss, (x,), (tangent,))[1], backend="eager", fullgraph=True)(x),
        lambda: torch.func.jvp(compiled_loss, (x,), (tangent,))[1],
        lambda: forward_derivative(compiled_loss, x, tangent),
    ):
        torch.testing.assert_close(jvp(), (expected * tangent).sum())


def forward_derivative(function, x: torch.Tensor, tangent: torch.Tensor) -> torch.Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent))).tangent


@compiled
@pytest.mark.parametrize("operator", OPERATORS)
def test_vmap(operator, backend):
    """Over every argument in turn, whatever its strides, as one computes ensembles of models."""
    sample = next(s for s in SMALL if s.operator == operator)
    for i, leaf in enumerate(sample.leaves):
        batched = torch.stack([leaf, leaf * 0.5, leaf * 2])
        for layout in (batched, batched.mT.contiguous().mT if leaf.dim() > 1 else batched):

            def function(part, i=i):
                leaves = [*sample.leaves[:i], part, *sample.leaves[i + 1 :]]
                return FUNCTIONS[operator](*leaves, **sample.options)

            expected = torch.stack([function(part) for part in batched])
            torch.testing.assert_close(torch.vmap(function)(layout), expected, rtol=1e-4, atol=1e-5)


@compiled
@pytest.mark.parametrize("operator", OPERATORS)
def test_vmap_over_gradients(operator, backend):
    """As one computes a Jacobian from the rows of a matrix of gradients of y."""
    sample = next(s for s in SMALL if s.operator == operator)
    leaves = [leaf.clone().requires_grad_() for leaf in sample.leaves]
    y = FUNCTIONS[operator](*leaves, **sample.options, backend=backend)
    batch = torch.stack([torch.ones_like(y), torch.rand_like(y)])
    found = torch.vmap(lambda grad: torch.autograd.grad(y, leaves, grad, retain_graph=True))(batch)
    for row, grad in enumerate(batch):
        expected = torch.autograd.grad(y, leaves, grad, retain_graph=True)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours[row], theirs, rtol=1e-4, atol=1e-4)


@compiled
@pytest.mark.parametrize("operator", OPERATORS)
def test_tensors_without_memory_are_refused(operator, backend):
    """As offloaders leave them, which take the storage away and keep the tensor."""
    sample = next(s for s in SMALL if s.operator == operator)
    for i in range(len(sample.leaves)):
        leaves = [leaf.clone() for leaf in sample.leaves]
        leaves[i].untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match=r"segnext_kernels: .* has no memory: its storage was freed"):
            FUNCTIONS[operator](*leaves, **sample.options, backend=backend)


def test_explain_knows_dtypes():
    for operator, dtype, said in (
        ("mlp", torch.float16, "mlp takes float32, bfloat16; x is float16"),
        ("msca_strips", torch.int64, "msca_strips takes float32, float64, bfloat16, float16; x is int64"),
    ):
        assert explain(operator, torch.ones(1, 2, 3, 4, dtype=dtype)) == dict.fromkeys(_select.BACKENDS, said)


def test_explain_names_what_is_wrong():
    x = torch.ones(1, 2, 3, 4)
    assert explain("msca_strips", x, branch_sizes=[7, 11, 21])["cpu"] == explain("msca_strips", x)["cpu"]
    with pytest.raises(TypeError, match="^explain: x must be a tensor, got list$"):
        explain("resize_concat_conv", [x])
