"""The benchmark cases compute what their reference computes, and the report says so in a table and in JSON."""

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import cases, memory
from bench.__main__ import main
from bench.measure import Runner, error, exact, measure
from bench.report import markdown, rows

ERRORS = {torch.float32: 5e-6, torch.bfloat16: 2e-2}  # of the largest value; bfloat16 has 8 bits and sums in PyTorch's order
CHANNELS = 33  # fewer than 17: PyTorch's bfloat16 channels_last convolution with 1 x 21 taps does not always return
SMALL = [
    *(make(CHANNELS, 9, 6, dtype, batch=2) for make in (cases.msca_strips_case, cases.dwconv_gelu_case) for dtype in ERRORS),
    *(cases.nmf_case(6, 35, 3, 2, direction) for direction in ("forward", "backward")),
]
TURNS = [
    pytest.param(case, direction, contender, id=f"{case.name}-{direction}-{contender.label.replace(' ', '-')}")
    for case in SMALL
    for direction in case.work
    for contender in case.contenders
    if contender.name != "torch.compile"
]


@pytest.fixture
def one_small_case(monkeypatch):
    """The registry with a single tiny case, without the compiler, which takes long."""
    case = cases.dwconv_gelu_case(3, 5, 4, torch.float32)
    monkeypatch.setattr(cases, "CASES", {case.name: case})
    return case


@pytest.mark.parametrize(("case", "direction", "contender"), TURNS)
def test_contender_agrees_with_float64(case, direction, contender):
    assert error(case, Runner(case, contender), direction, exact(case, direction)) < ERRORS[case.dtype]


def test_compiled_contender_agrees_with_float64():
    case = cases.dwconv_gelu_case(3, 5, 4, torch.float32)
    contender = next(c for c in case.contenders if c.label == "torch.compile channels_last")
    assert error(case, Runner(case, contender), "forward", exact(case, "forward")) < ERRORS[case.dtype]


@pytest.mark.parametrize("case", [case for case in SMALL if case.dtype == torch.bfloat16], ids=lambda case: case.name)
def test_plain_pytorch_computes_in_the_dtype_of_its_inputs(case):
    seen = set()

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            result = function(*arguments, **(options or {}))
            seen.add(result.dtype)
            return result

    runner = Runner(case, next(c for c in case.contenders if c.name == "PyTorch"))
    with Recorder():
        runner.forward()
    assert seen == {torch.bfloat16}


def test_error_sees_a_wrong_result():
    case = cases.nmf_case(6, 35, 3, 2, "forward")
    runner = Runner(case, case.contenders[0])
    truth = exact(case, "forward")
    truth[0][0, 2, 7] *= 1.01
    assert error(case, runner, "forward", truth) > 1e-3


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_contender_gets_its_layout(case):
    for contender in case.contenders:
        strides = Runner(case, contender).inputs[0].stride()
        assert (min(strides) == strides[-1]) == (contender.layout == "contiguous")
        assert (min(strides) == strides[1]) == (contender.layout == "channels_last")


def test_registry_has_every_stage_of_t_and_b():
    for dtype in ("float32", "bfloat16"):
        for channels, side in ((32, 128), (64, 64), (160, 32), (256, 16), (64, 128), (128, 64), (320, 32), (512, 16)):
            assert f"msca_strips/{channels}x{side}x{side}/{dtype}" in cases.CASES
    assert {name for name in cases.CASES if name.startswith("nmf")} == {
        f"nmf/{factors}-{steps}steps/float32" for factors in ("256x4096-r16", "1024x4096-r64") for steps in (6, 7)
    }


def test_select_takes_shell_patterns():
    assert len(cases.select("msca_strips*float32")) == 8
    with pytest.raises(ValueError, match="no benchmark case fits 'nothing'"):
        cases.select("nothing")


def test_work_of_a_convolution():
    case = cases.dwconv_gelu_case(2, 3, 5, torch.bfloat16)
    assert case.work["forward"] == (2 * (30 + 30 + 2 * 10), 2 * 9 * 30)
    assert case.work["backward"] == (2 * (3 * 30 + 2 * 20), 4 * 9 * 30)


def test_ratios_compare_ours_with_every_peer():
    case = cases.nmf_case(4, 6, 2, 1, "forward")
    results = measure(case, "forward", seconds=0, contenders=case.contenders[:4])
    for i, result in enumerate(results):
        result.rounds = [(i + 1) * drift for drift in (1.0, 3.0, 2.0)]
    table = rows(results)
    assert [row["ratios"] for row in table] == [
        {"PyTorch contiguous": 3, "PyTorch channels_last": 4},
        {"PyTorch contiguous": 1.5, "PyTorch channels_last": 2},
        {},
        {},
    ]
    assert "The fastest peer takes 1.50 to 3.00 times as long as ours." in markdown(table)


def test_report_prints_a_table_and_writes_json(one_small_case, tmp_path, capsys):
    out = tmp_path / "figures.json"
    assert main(["report", "--seconds", "0", "--without", "torch.compile", "--json", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "### dwconv_gelu, backward, float32" in lines
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    figures = json.loads(out.read_text())
    assert figures["environment"]["torch"] == torch.__version__
    assert [(row["direction"], row["contender"], row["layout"]) for row in figures["rows"]] == [
        (direction, contender, layout)
        for direction in ("forward", "backward")
        for contender in ("fused", "PyTorch")
        for layout in cases.LAYOUTS
    ]
    assert all(row["seconds"] > 0 and row["rounds"] >= 5 and row["error"] < ERRORS[torch.float32] for row in figures["rows"])
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]


def test_unknown_case_is_an_error(capsys):
    assert main(["report", "--case", "nothing"]) == 2
    assert "no benchmark case fits 'nothing'" in capsys.readouterr().err


@pytest.mark.skipif(not memory.CLEAR_REFS.exists(), reason=f"peak memory is taken from {memory.CLEAR_REFS}")
def test_memory_counts_what_plain_pytorch_keeps():
    """For backward the 5x5's and three rows' results are kept; the sum and the gradients come on top."""
    shape = (4, 16, 64, 128)  # 2 MiB
    images = memory.peak_apart(shape, "PyTorch channels_last", threads=1) / (4 * 4 * 16 * 64 * 128)
    assert 6 < images < 9
