"""The benchmark cases compute what their reference computes, and the report says so in a table and in JSON."""

import json
import subprocess
from importlib.metadata import version
from math import isnan
from time import sleep

import pytest
import torch
from benchmarks import ERRORS, LIMITS, PLAIN_NMF_ERROR, SMALL, small_ceilings, turns, without
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench import case as bench_case
from bench import cases, ceilings, environment, inference, loop, memory, operators
from bench.__main__ import main
from bench.measure import Runner, error, exact, measure
from bench.report import as_json, markdown, rows
from segnext import speed
from segnext_kernels import _load, _select


@pytest.fixture
def one_small_case(monkeypatch):
    """The registry with a single tiny case, and quick ceilings."""
    small_ceilings(monkeypatch)
    case = operators.dwconv_gelu_case(3, 5, 4, torch.float32)
    monkeypatch.setattr(cases, "CASES", {case.name: case})
    return case


@pytest.mark.parametrize(("case", "direction", "contender"), turns(SMALL))
def test_contender_agrees_with_float64(case, direction, contender):
    rounds_factors = case.operator == "hamburger" and case.dtype == torch.bfloat16 and contender.name == "PyTorch"
    limit = PLAIN_NMF_ERROR if rounds_factors else ERRORS[case.dtype]
    assert error(case, Runner(case, contender), direction, exact(case, direction)) < limit


def test_compiled_contender_agrees_with_float64():
    case = operators.dwconv_gelu_case(3, 5, 4, torch.float32)
    contender = next(c for c in case.contenders if c.label == "torch.compile channels_last")
    assert error(case, Runner(case, contender), "forward", exact(case, "forward")) < ERRORS[case.dtype]


@pytest.mark.parametrize(
    "case", [case for case in SMALL if case.dtype == torch.bfloat16 and "upsample" not in case.name], ids=lambda case: case.name
)
def test_plain_pytorch_computes_in_the_dtype_of_its_inputs(case):
    seen = set()

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            result = function(*arguments, **(options or {}))
            seen.update(leaf.dtype for leaf in tree_leaves(result))
            return result

    runner = Runner(case, next(c for c in case.contenders if c.name == "PyTorch"))
    with Recorder():
        runner.forward()
    assert seen == {torch.bfloat16}


def test_error_sees_a_wrong_result():
    case = operators.nmf_case(6, 35, 3, 2)
    runner = Runner(case, case.contenders[0])
    truth = exact(case, "forward")
    truth[0][0, 2, 7] *= 1.01
    assert error(case, runner, "forward", truth) > 1e-3


def test_error_sees_a_nan_among_gradients():
    case = operators.nmf_case(6, 35, 3, 2)
    truth = exact(case, "step")
    truth[1][0, 2, 7] = float("nan")
    assert isnan(error(case, Runner(case, case.contenders[0]), "step", truth))


def test_error_of_labels_is_the_share_that_differs():
    case = operators.upsample_argmax_case(5, (4, 3), (10, 8), torch.float32)
    truth = exact(case, "forward")
    truth[0][0, :2, :4] += 1
    assert error(case, Runner(case, case.contenders[0]), "forward", truth) == pytest.approx(0.1)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_contender_gets_its_layout(case):
    for contender in case.contenders:
        strides = Runner(case, contender).inputs[0].stride()
        assert (min(strides) == strides[-1]) == (contender.layout == "contiguous")
        assert (min(strides) == strides[1]) == (contender.layout == "channels_last")


def test_inputs_lie_on_the_default_device():
    case = operators.nmf_case(6, 35, 3, 2)
    with torch.device("meta"):
        assert {tensor.device.type for tensor in case.inputs()} == {"meta"}


def test_registry_has_every_operator():
    assert set(_select.OPERATORS) <= {case.operator for case in cases.CASES.values()}


def test_registry_has_every_stage_of_t_and_b():
    for dtype in ("float32", "bfloat16"):
        for channels, side in ((32, 128), (64, 64), (160, 32), (256, 16), (64, 128), (128, 64), (320, 32), (512, 16)):
            assert f"msca_strips/{channels}x{side}x{side}/{dtype}" in cases.CASES
    assert {name for name in cases.CASES if name.startswith("nmf")} == {
        f"nmf/{factors}-{steps}steps/float32" for factors in ("256x4096-r16", "1024x4096-r64") for steps in (6, 7)
    }


def test_cases_for_a_gpu():
    """Of the operators with kernels in both languages every kernel is ours; no two cases share a name."""
    assert len(cases.GPU_CASES) == len(list(cases._gpu_registry()))
    (case,) = cases.select("msca_strips/16x32x128x128/bfloat16", "cuda")
    ours = {contender.label for contender in case.contenders if contender.ours}
    assert ours == {f"fused {backend} {layout}" for backend in ("cuda", "triton") for layout in bench_case.LAYOUTS}
    ours = {c.name for c in cases.select("segnext_t/16*", "cuda")[0].contenders if c.ours}
    assert ours == {"fused", "fused, CUDA graph", "fused torch.compile, CUDA graph"}


def test_a_backend_that_is_absent_leaves_the_rest():
    """As CUDA's kernels are on a GPU without nvcc; here both are, on the CPU."""
    (case,) = cases.select("dwconv_gelu/16x256x128x128/bfloat16", "cuda")
    ours = [contender for contender in case.contenders if contender.ours]
    assert {"fused cuda contiguous": True, "fused triton channels_last": True}.items() <= {
        contender.label: "cpu" in contender.why_not() for contender in ours
    }.items()
    assert {contender.name for contender in case.present()} <= {"PyTorch", "torch.compile"}


def test_without_a_compiler_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(bench_case, "_compiles", lambda: False)
    case = next(iter(cases.CASES.values()))
    assert {contender.name for contender in case.present()} == {"fused", "PyTorch"}
    assert "C++ compiler" in case.contender("torch.compile contiguous").why_not()


def test_a_version_is_found_by_what_brought_a_package(monkeypatch):
    """Of onnxruntime it may be onnxruntime-gpu."""
    monkeypatch.setattr(environment, "_brought", lambda: {"pytest": ["numpy"], "torch": []})
    assert environment._version("pytest") == version("numpy")
    assert environment._version("torch") == "of unknown version" and environment._version("no_such_package") is None


def test_memory_of_the_others_is_told_where_a_process_dies(monkeypatch):
    problem = memory.PROBLEMS["msca_strips/16x64x128x128/float32"]

    def peak(problem, label, threads):
        if label.startswith("fused"):
            raise subprocess.CalledProcessError(-9, "python")
        return 1

    monkeypatch.setattr(memory, "peak_apart", peak)
    figures = memory.run([problem], 1)
    assert [row["contender"] for row in figures["rows"]] == ["PyTorch contiguous", "PyTorch channels_last"]
    assert "missing peer fused contiguous of msca_strips/16x64x128x128/float32: its process ended with -9" in memory.markdown(
        figures
    )


def test_only_the_ceilings_that_are_asked_for(monkeypatch):
    small_ceilings(monkeypatch)
    found = ceilings.measure(0.0, [torch.float32])
    assert set(found) == {"copy_gbytes_per_s", "float32_gflops_per_s"}
    assert "bfloat16" not in markdown(as_json([], found, {}))


def test_a_slow_product_is_not_asked_for_large_matrices(monkeypatch):
    asked = []

    def products(dtype, side):
        return tuple(lambda seconds=seconds: asked.append((side, seconds)) or sleep(seconds) for seconds in (0.05, 0.0001))

    monkeypatch.setattr(ceilings, "_products", products)
    ceilings._quickest_product(torch.bfloat16, 0.0)
    assert {seconds for side, seconds in asked if side == ceilings.SIDE} == {0.0001}


def test_select_takes_shell_patterns():
    assert len(cases.select("msca_strips*float32")) == 8
    with pytest.raises(ValueError, match="no benchmark case fits 'nothing'"):
        cases.select("nothing")


def test_work_of_a_convolution():
    case = operators.dwconv_gelu_case(2, 3, 5, torch.bfloat16)
    assert case.work("forward") == (2 * (30 + 30 + 2 * 10), 2 * 9 * 30)
    assert case.work("backward") == (2 * (3 * 30 + 2 * 20), 4 * 9 * 30)
    assert case.work("step") == (2 * (4 * 30 + 2 * 20), 6 * 9 * 30)


def test_ceilings(monkeypatch):
    small_ceilings(monkeypatch)
    limits = ceilings.measure(seconds=0)
    assert set(limits) == set(LIMITS) and all(value > 0 for value in limits.values())


def test_share_of_the_nearer_ceiling():
    work = bench_case.Work(bytes=10**10, flops=10**11)
    assert ceilings.share(LIMITS, work, torch.float32, 2.0) == (0.5, "memory")
    assert ceilings.share(LIMITS, work._replace(flops=4 * 10**11), torch.bfloat16, 4.0) == (0.5, "arithmetic")


def test_ratios_compare_ours_with_every_peer():
    case = operators.nmf_case(4, 6, 2, 1)
    results = measure(case, "forward", seconds=0, contenders=case.contenders[:4])
    for i, result in enumerate(results):
        result.rounds = [(i + 1) * drift for drift in (1.0, 3.0, 2.0)]
    table = rows(results, LIMITS)
    assert [row["ratios"] for row in table] == [
        {"PyTorch contiguous": 3, "PyTorch channels_last": 4},
        {"PyTorch contiguous": 1.5, "PyTorch channels_last": 2},
        {},
        {},
    ]
    assert "The fastest peer takes 1.50 to 3.00 times as long as ours." in markdown(as_json(table, LIMITS, {}))


def test_a_peer_whose_answer_is_nan_is_no_peer():
    case = operators.nmf_case(4, 6, 2, 1)
    results = measure(case, "forward", seconds=0, contenders=case.contenders[:4])
    results[3].error = float("nan")
    table = rows(results, LIMITS)
    assert [list(row["ratios"]) for row in table[:2]] == [["PyTorch contiguous"]] * 2
    assert "| nan |" in markdown(as_json(table, LIMITS, {}))


def test_filters_lie_as_images_do():
    """PyTorch would arrange them anew in every call."""
    for layout, memory_format in (("contiguous", torch.contiguous_format), ("channels_last", torch.channels_last)):
        _, weight, _ = inference.conv_act_case(4, 8, 5, 3, 1, torch.float32).inputs(layout)
        assert weight.is_contiguous(memory_format=memory_format)


def test_report_prints_a_table_and_writes_files(one_small_case, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main(["report", "--seconds", "0", "--without", "torch.compile", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "### dwconv_gelu, backward, float32" in printed.splitlines()
    assert len({line.count("|") for line in printed.splitlines() if line.startswith("|")}) == 1
    assert (tmp_path / "report.md").read_text() == printed
    figures = json.loads((tmp_path / "report.json").read_text())
    assert figures["environment"]["torch"] == torch.__version__
    assert [(row["direction"], row["contender"], row["layout"]) for row in figures["rows"]] == [
        (direction, contender, layout)
        for direction in ("forward", "backward")
        for contender in ("fused", "PyTorch")
        for layout in bench_case.LAYOUTS
    ]
    assert all(row["seconds"] > 0 and row["rounds"] >= 5 and row["error"] < ERRORS[torch.float32] for row in figures["rows"])
    assert all(row["ceiling_share"] > 0 and row["ceiling"] in ("memory", "arithmetic") for row in figures["rows"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["operators.png", "report.json", "report.md"]
    assert (tmp_path / "operators.png").read_bytes().startswith(b"\x89PNG")


def test_report_without_matplotlib_says_so(one_small_case, monkeypatch, tmp_path, capsys):
    without(monkeypatch, "matplotlib")
    assert main(["report", "--seconds", "0", "--without", "torch.compile", "--out", str(tmp_path)]) == 0
    assert "no plots: matplotlib not installed" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md"]


def test_unknown_case_is_an_error(monkeypatch, capsys):
    for arguments, problem in (
        (["report", "--without", "torch.compiled"], "--without torch.compiled: no contender is called so"),
        (["report", "--without", "fused"], "--without fused leaves nothing of ours to report for"),
        (["report", "--device", "cuda"], "there is no GPU that torch can use"),
        (["memory", "--contender", "fused"], "--contender needs a --case"),
        (["report", "--out", "/dev/null/below"], "Not a directory"),
        (["report", "--out", "/proc"], "/proc"),
        (["report", "--threads", str(1 << 40)], "Overflow"),
    ):
        if "cuda" not in arguments or not torch.cuda.is_available():
            assert main(arguments) == 2
            assert problem in capsys.readouterr().err
    for arguments in (["report", "--threads", "0"], ["loop", "--rounds", "0"]):
        with pytest.raises(SystemExit):
            main(arguments)
        assert f"argument {arguments[1]}: 0 is not positive" in capsys.readouterr().err
    monkeypatch.setattr(_load, "failure", "they were not built")
    assert main(["report", "--case", "nothing"]) == 2
    assert "there are no kernels to measure: they were not built" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(["report", "--case", "nothing"]) == 2
    assert "no benchmark case fits 'nothing'" in capsys.readouterr().err


needs_peak = pytest.mark.skipif(not speed.CLEAR_REFS.exists(), reason=f"peak memory is taken from {speed.CLEAR_REFS}")


@needs_peak
def test_memory_counts_what_plain_pytorch_keeps():
    """For backward the 5x5's and three rows' results are kept; the sum and the gradients come on top."""
    code = (
        "import torch; from bench import memory, operators\n"
        "case, small = (operators.msca_strips_case(16, *size, torch.float32, batch=4) for size in ((64, 128), (8, 8)))\n"
        "print(memory.peak(memory.Problem(case, small, 'step'), 'PyTorch channels_last'))"
    )
    images = memory.in_new_process(["-c", code]) / (4 * 4 * 16 * 64 * 128)
    assert 6 < images < 9


@needs_peak
def test_memory_of_the_loss_has_no_upsampled_logits():
    problem = memory.select("upsample_cross_entropy")
    assert 0 < memory.peak_apart(problem, "fused contiguous", threads=1) < 2 * 150 * 512 * 512 * 4 / 10


@needs_peak
def test_memory_table(monkeypatch, tmp_path, capsys):
    peaks = {
        "fused contiguous": 1 << 20,
        "fused channels_last": 2 << 20,
        "PyTorch contiguous": 8 << 20,
        "PyTorch channels_last": 4 << 20,
    }
    monkeypatch.setattr(memory, "peak_apart", lambda problem, label, threads: peaks[label])
    assert main(["memory", "--case", "msca_strips", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "### msca_strips/16x64x128x128/float32, step" in printed and "| fused channels_last | 2 | 0.50 |" in printed
    assert {row["contender"]: row["bytes"] for row in json.loads((tmp_path / "memory.json").read_text())["rows"]} == peaks
    assert main(["memory", "--case", "nothing"]) == 2
    assert "there is no memory case 'nothing'" in capsys.readouterr().err
    assert main(["memory", "--case", "msca_strips", "--contender", "nobody"]) == 2
    assert "has no contender 'nobody'" in capsys.readouterr().err


def test_loop_tells_what_is_spent_beside_the_model():
    lines = loop.markdown(loop.run(rounds=1, crop=(64, 64), size=(64, 80), pictures=3)).splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| training") or line.startswith("| evaluation")]
    assert len(rows) == 9 and all(float(row[1]) > 0 and row[-1].endswith("%") for row in rows)
    assert all(0 <= float(row[2].rstrip("%")) < 100 for row in rows[:6])


def test_every_kind_of_problem_has_its_contenders():
    labels = {name.partition("/")[0]: problem.labels for name, problem in memory.PROBLEMS.items()}
    assert set(labels) == {"msca_strips", "upsample_cross_entropy", "train_t", "segnext_t_labels"}
    assert all(any(label.startswith("fused") for label in found) for found in labels.values())
    assert not any("torch.compile" in label for found in labels.values() for label in found)
    assert all(p.small.contender(label) for p in memory.PROBLEMS.values() for label in p.labels)
