"""The benchmark cases compute what their reference computes, and the report says so in a table and in JSON."""

import json
import subprocess
import sys
from dataclasses import replace
from datetime import datetime
from importlib.metadata import version
from math import isnan
from time import sleep

import pytest
import torch
from benchmarks import ERRORS, LIMITS, PLAIN_NMF_ERROR, SMALL, small_ceilings, turns, without
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bench.__main__
from bench import case as bench_case
from bench import cases, ceilings, environment, inference, loop, memory, operators, output, triton_static
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


def test_inputs_and_results_lie_on_the_device(monkeypatch):
    """Which is not PyTorch's default one."""
    monkeypatch.setattr(bench_case, "_device", torch.device("meta"))
    small_ceilings(monkeypatch)
    case = operators.nmf_case(6, 35, 3, 2)
    assert {tensor.device.type for tensor in (*case.inputs(), *exact(case, "step"))} == {"meta"}
    assert {product().device.type for product in ceilings._products(torch.float32, 4)} == {"meta"}
    assert torch.get_default_device().type == "cpu"


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
    for name in ("segnext_t/16*", "train_t*float32"):
        (case,) = cases.select(name, "cuda")
        peers = [c for c in case.contenders if not c.ours]
        assert {c.name for c in peers} >= {"PyTorch, CUDA graph", "torch.compile", "torch.compile, CUDA graph"}
        assert len({c.label for c in peers}) == len(peers) == 2 * len({c.name for c in peers})


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
    *_, figures = memory.run([problem], 1)
    assert [row["contender"] for row in figures["rows"]] == ["PyTorch contiguous", "PyTorch channels_last"]
    assert "missing peer fused contiguous of msca_strips/16x64x128x128/float32: its process ended with -9" in memory.markdown(
        figures
    )


def test_only_the_ceilings_that_are_asked_for(monkeypatch):
    small_ceilings(monkeypatch)
    found = ceilings.measure(0.0, [torch.float32])
    assert set(found) == {"copy_gbytes_per_s", "float32_gflops_per_s"}
    assert "in bfloat16" not in markdown(as_json([], found, {}))
    assert {"float32_gflops_per_s", "bfloat16_gflops_per_s"} < set(ceilings.measure(0.0, [torch.bfloat16]))


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
    slow = LIMITS | {"bfloat16_gflops_per_s": 50.0}
    assert ceilings.share(slow, work._replace(flops=4 * 10**11), torch.bfloat16, 8.0) == (0.5, "arithmetic")


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
    text = markdown(as_json(table, LIMITS, {}))
    assert "The fastest peer takes 1.50 to 3.00 times as long as ours." in text
    assert table[1]["quartiles"] == [3, 5]
    header, _, *lines = (line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|"))
    cells = [dict(zip(header, line, strict=True)) for line in lines]
    assert [(line["rounds"], line["spread"]) for line in cells] == [("3", "50%, 50%")] * 2


def test_a_peer_whose_answer_is_nan_is_no_peer():
    case = operators.nmf_case(4, 6, 2, 1)
    results = measure(case, "forward", seconds=0, contenders=case.contenders[:4])
    results[3].error = float("nan")
    table = rows(results, LIMITS)
    assert [list(row["ratios"]) for row in table[:2]] == [["PyTorch contiguous"]] * 2
    assert "| nan |" in markdown(as_json(table, LIMITS, {}))


def broken(case, ours=False):
    """The case with another contender, which fails."""

    def build():
        raise RuntimeError("no device found\nand a long trace")

    return replace(case, contenders=(bench_case.Contender("broken", None, build, ours=ours), *case.contenders))


def test_a_peer_that_fails_leaves_the_rest(one_small_case, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cases, "CASES", {one_small_case.name: broken(one_small_case)})
    without(monkeypatch, "matplotlib")
    assert main(["report", "--seconds", "0.001", "--without", "torch.compile", "--out", str(tmp_path)]) == 0
    reason = "RuntimeError: no device found"
    assert f"missing peer broken of {one_small_case.name}, forward: {reason}" in capsys.readouterr().out.splitlines()
    figures = json.loads((tmp_path / "report.json").read_text())
    assert figures["missing_peers"][f"broken of {one_small_case.name}, backward"] == reason
    assert len(figures["rows"]) == 8 and not any(row["contender"] == "broken" for row in figures["rows"])


def test_what_fails_of_ours_is_an_error(one_small_case):
    with pytest.raises(RuntimeError, match="no device found"):
        measure(broken(one_small_case, ours=True), "forward", 0, absent={})


def test_an_interrupted_report_has_what_there_is(one_small_case, monkeypatch, tmp_path, capsys):
    def once(case, direction, *rest):
        if direction == "backward":
            raise KeyboardInterrupt
        return measure(case, direction, *rest)

    monkeypatch.setattr(bench.__main__, "measure", once)
    without(monkeypatch, "matplotlib")
    assert main(["report", "--seconds", "0.001", "--without", "torch.compile", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "bench: interrupted"
    text = (tmp_path / "report.md").read_text()
    assert "### dwconv_gelu, forward, float32" in text and "backward" not in text


def test_an_interrupted_comparison_of_memory_has_what_there_is(monkeypatch, tmp_path, capsys):
    def peak(problem, label, threads):
        if label == "PyTorch contiguous":
            raise KeyboardInterrupt
        return 1 << 20

    monkeypatch.setattr(memory, "peak_apart", peak)
    monkeypatch.setattr(speed, "CLEAR_REFS", tmp_path)
    assert main(["memory", "--case", "msca_strips", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "bench: interrupted\n"
    figures = json.loads((tmp_path / "memory.json").read_text())
    assert [row["contender"] for row in figures["rows"]] == ["fused contiguous", "fused channels_last"]
    assert "| fused channels_last | 1 |" in (tmp_path / "memory.md").read_text()


def test_the_environment_says_what_was_run(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "orig_argv", ["/usr/bin/python", "-m", "bench", "report", "--case", "nmf*"])
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setattr(environment, "_commit", lambda: "529ec13-dirty")
    found = environment.environment()
    assert found["command"] == "python -m bench report --case 'nmf*'" and datetime.fromisoformat(found["date"])
    assert found["OMP_NUM_THREADS"] == "2" and "OMP_WAIT_POLICY" not in found
    text = environment.heading({"environment": found, "missing_peers": {}})[0]
    assert "; commit 529ec13-dirty; date " in text and "; OMP_NUM_THREADS 2; " in text


def test_the_commit_of_a_folder_of_git(monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    assert environment._commit.__wrapped__() is None
    (tmp_path / ".git").mkdir()  # but no repository
    assert environment._commit.__wrapped__() is None


def test_json_has_null_for_what_is_no_number(tmp_path):
    output.write_json(tmp_path / "a.json", {"rows": [{"error": float("nan"), "seconds": 0.5}], "ratio": float("inf")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"rows": [{"error": None, "seconds": 0.5}], "ratio": None}


def test_work_of_a_hamburger_is_that_of_nmf_and_a_convolution():
    hamburger = inference.hamburger_case(64, 6, 5, torch.float32).work("forward").flops
    assert hamburger == operators.nmf_case(64, 36, 5, 7).work("forward").flops + 2 * 64 * 64 * 36


def test_triton_kernels_of_some_operators_and_targets(monkeypatch, capsys):
    pytest.importorskip("triton")
    asked = []
    monkeypatch.setattr(triton_static, "distinct", lambda call, target: [target])
    monkeypatch.setattr(triton_static, "calls", lambda dtype, last: dict.fromkeys(("scale_add", "nmf"), None))
    monkeypatch.setattr(triton_static, "compile_all", lambda jobs: asked.extend(jobs) or [])
    triton_static.report("nmf", "sm_*0")
    assert {target for _, target in asked} == {"sm_80", "sm_90", "sm_100"}
    assert main(["triton-static", "--case", "upsample*"]) == 2
    assert "--case upsample*: there is none; there are scale_add, nmf" in capsys.readouterr().err
    assert main(["triton-static", "--target", "sm_70"]) == 2
    assert "--target sm_70: there is none; there are sm_80, " in capsys.readouterr().err


def test_filters_lie_as_images_do():
    """PyTorch would arrange them anew in every call."""
    for layout, memory_format in (("contiguous", torch.contiguous_format), ("channels_last", torch.channels_last)):
        _, weight, _ = inference.conv_act_case(4, 8, 5, 3, 1, torch.float32).inputs(layout)
        assert weight.is_contiguous(memory_format=memory_format)


def test_report_prints_a_table_and_writes_files(one_small_case, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main(["report", "--seconds", "0.001", "--without", "torch.compile", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "### dwconv_gelu, backward, float32" in printed.splitlines()
    assert len({line.count("|") for line in printed.splitlines() if line.startswith("|")}) == 1
    assert (tmp_path / "report.md").read_text() == printed
    figures = json.loads((tmp_path / "report.json").read_text())
    assert figures["environment"]["torch"] == torch.__version__
    left_out = {f"torch.compile {layout}": "left out by --without" for layout in bench_case.LAYOUTS}
    assert figures["missing_peers"] == left_out
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
    assert main(["report", "--seconds", "0.001", "--without", "torch.compile", "--out", str(tmp_path)]) == 0
    assert "no plots: matplotlib not installed" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md"]


def test_unknown_case_is_an_error(monkeypatch, capsys):
    for arguments, problem in (
        (["report", "--without", "torch.compiled"], "--without torch.compiled: no contender is called so"),
        (["report", "--without", "fused"], "--without fused leaves nothing of ours to report for"),
        (["report", "--device", "cuda"], "there is no GPU that torch can use"),
        (["memory", "--contender", "fused"], "--contender needs a --case"),
        (["memory", "--contender", "fused", "--case", "msca", "--out", "."], "and writes no --out"),
        (["report", "--out", "/dev/null/below"], "Not a directory"),
        (["report", "--out", "/proc"], "/proc"),
        (["report", "--threads", str(1 << 40)], "Overflow"),
    ):
        if "cuda" not in arguments or not torch.cuda.is_available():
            assert main(arguments) == 2
            assert problem in capsys.readouterr().err
    seconds = [(["report", "--seconds", text], "no length of time") for text in ("0", "nan", "inf", "-1")]
    for arguments, problem in (
        (["report", "--threads", "0"], "not positive"),
        (["loop", "--rounds", "0"], "not positive"),
        *seconds,
    ):
        with pytest.raises(SystemExit):
            bench.__main__._parser().parse_args(arguments)
        assert f"argument {arguments[1]}: {arguments[2]} is {problem}" in capsys.readouterr().err
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
    *_, figures = loop.run(rounds=1, crop=(64, 64), size=(64, 80), pictures=3)
    assert all(type(r["seconds"]) is type(r["beside"]) is float for r in figures["rows"])
    lines = loop.markdown(figures).splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| training") or line.startswith("| evaluation")]
    assert len(rows) == 9 and all(float(row[1]) > 0 and row[-1].endswith("%") for row in rows)
    assert all(0 <= float(row[2].rstrip("%")) < 100 for row in rows[:6])


def test_every_kind_of_problem_has_its_contenders():
    labels = {name.partition("/")[0]: problem.labels for name, problem in memory.PROBLEMS.items()}
    assert set(labels) == {"msca_strips", "upsample_cross_entropy", "train_t", "segnext_t_labels"}
    assert all(any(label.startswith("fused") for label in found) for found in labels.values())
    assert not any("torch.compile" in label for found in labels.values() for label in found)
    assert all(p.small.contender(label) for p in memory.PROBLEMS.values() for label in p.labels)
