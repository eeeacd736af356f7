"""The benchmark cases compute what their reference computes, and the report says so in a table and in JSON."""

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import case as bench_case
from bench import cases, ceilings, memory, models, operators, output, plain, scaling, training
from bench.__main__ import main
from bench.measure import Runner, error, exact, measure
from bench.report import as_json, markdown, rows
from segnext.model import Config

ERRORS = {torch.float32: 5e-6, torch.bfloat16: 2e-2}  # of the largest value; bfloat16 has 8 bits and sums in PyTorch's order
MODEL_ERRORS = {torch.float32: 1e-5, torch.bfloat16: 6e-2}  # the same for logits, and the share of labels that differ
TRAINING_ERRORS = {torch.float32: 1e-5, torch.bfloat16: 0.5}  # of the first convolution's gradient, through all of autocast
CHANNELS = 33  # fewer than 17: PyTorch's bfloat16 channels_last convolution with 1 x 21 taps does not always return
TINY = Config((32,) * 4, (1,) * 4, (2,) * 4, decoder_channels=32, rank=4, num_classes=7)
IMAGE = (40, 64)
LIMITS = {"copy_gbytes_per_s": 10.0, "float32_gflops_per_s": 100.0, "bfloat16_gflops_per_s": 200.0}
SMALL = [
    *(
        make(CHANNELS, 9, 6, dtype, batch=2)
        for make in (operators.msca_strips_case, operators.dwconv_gelu_case)
        for dtype in ERRORS
    ),
    operators.nmf_case(6, 35, 3, 2),
    *(operators.upsample_cross_entropy_case(5, (4, 3), (9, 8), dtype, batch=2) for dtype in ERRORS),
    *(operators.upsample_argmax_case(5, (4, 3), (9, 8), dtype, batch=2) for dtype in ERRORS),
]
MODELS = [
    *(models.logits_case("segnext_tiny", TINY, IMAGE, dtype, batch=2) for dtype in ERRORS),
    *(models.labels_case("segnext_tiny_labels", TINY, IMAGE, dtype) for dtype in ERRORS),
]
TRAINING = [training.training_case("train_tiny", TINY, IMAGE, dtype, batch=2) for dtype in ERRORS]


def turns(chosen):
    """Every case in every direction with every contender, but for the compiler, which takes long."""
    return [
        pytest.param(case, direction, contender, id=f"{case.name}-{direction}-{contender.label.replace(' ', '-')}")
        for case in chosen
        for direction in case.directions
        for contender in case.contenders
        if "torch.compile" not in contender.name
    ]


def without(monkeypatch, *packages):
    """Makes packages look as if they were not installed."""
    find_spec = bench_case.find_spec
    monkeypatch.setattr(bench_case, "find_spec", lambda name: None if name in packages else find_spec(name))
    monkeypatch.setattr(output, "find_spec", lambda name: None if name in packages else find_spec(name))


@pytest.fixture(autouse=True)
def _small_ceilings(monkeypatch):
    monkeypatch.setattr(ceilings, "COPY", 1 << 16)
    monkeypatch.setattr(ceilings, "SIDE", 64)


@pytest.fixture
def one_small_case(monkeypatch):
    """The registry with a single tiny case."""
    case = operators.dwconv_gelu_case(3, 5, 4, torch.float32)
    monkeypatch.setattr(cases, "CASES", {case.name: case})
    return case


@pytest.mark.parametrize(("case", "direction", "contender"), turns(SMALL))
def test_contender_agrees_with_float64(case, direction, contender):
    assert error(case, Runner(case, contender), direction, exact(case, direction)) < ERRORS[case.dtype]


@pytest.mark.parametrize(("case", "direction", "contender"), turns(MODELS))
def test_model_agrees_with_float64(case, direction, contender):
    if why := contender.why_not():
        pytest.skip(why)
    assert error(case, Runner(case, contender), direction, exact(case, direction)) < MODEL_ERRORS[case.dtype]


@pytest.mark.parametrize(("case", "direction", "contender"), turns(TRAINING))
def test_training_step_agrees_with_float64(case, direction, contender):
    loss, gradient = exact(case, direction)
    found_loss, found_gradient = Runner(case, contender).step()
    torch.testing.assert_close(found_loss.double(), loss, atol=0, rtol=TRAINING_ERRORS[case.dtype] / 10)
    assert (found_gradient - gradient).abs().max() < TRAINING_ERRORS[case.dtype] * gradient.abs().max()


def test_training_step_changes_the_weights():
    runner = Runner(TRAINING[0], TRAINING[0].contender("fused channels_last"))
    losses = [runner.step()[0].item() for _ in range(8)]
    assert losses[-1] < losses[0]
    assert models.network(runner.call.model.config).training is False  # the shared network is another


def test_plain_model_is_the_fused_operators_model():
    model, images = models.network(TINY), MODELS[0].inputs()[0]
    seen = set()

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            seen.add(function.namespace)
            return function(*arguments, **(options or {}))

    with torch.no_grad():
        want = model(images)
        with Recorder():
            found = plain.network(model)(images)
    assert (found - want).abs().max() < 1e-5 * want.abs().max()
    assert seen == {"aten"}


def test_plain_model_has_the_same_weights_of_its_own():
    model = models.network(TINY)
    copied = plain.network(model)
    for (name, mine), (other, theirs) in zip(model.named_parameters(), copied.named_parameters(), strict=True):
        assert name == other and torch.equal(mine, theirs) and mine.data_ptr() != theirs.data_ptr()


def test_listing_cases_builds_no_model(monkeypatch):
    for module in (models, training):
        monkeypatch.setattr(module, "network", None)
        monkeypatch.setattr(module, "complexity", None)
    assert [case.name for case in cases._registry()] == list(cases.CASES)


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
            seen.add(result.dtype)
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
    case = operators.dwconv_gelu_case(2, 3, 5, torch.bfloat16)
    assert case.work("forward") == (2 * (30 + 30 + 2 * 10), 2 * 9 * 30)
    assert case.work("backward") == (2 * (3 * 30 + 2 * 20), 4 * 9 * 30)
    assert case.work("step") == (2 * (4 * 30 + 2 * 20), 6 * 9 * 30)


def test_work_of_a_model_is_what_the_paper_counts_but_for_the_upsampling():
    case = cases.CASES["segnext_t/512x512/bfloat16"]
    assert case.work("forward").flops == 2 * (6591770624 - 4 * 150 * 512 * 512)
    parameters = models.complexity(cases.SIZES["t"], (512, 512), False)[0]
    assert case.work("forward").bytes == 2 * parameters + 4 * 3 * 512 * 512 + 2 * 150 * 64 * 64
    step = cases.CASES["train_t/2x512x512/float32"].work("step")
    assert step.flops == 2 * 3 * 2 * 6591770624


def test_registry_has_every_model():
    for dtype in ("float32", "bfloat16"):
        names = [f"segnext_{size}/512x512/{dtype}" for size in "tsbl"]
        names += [f"segnext_t_labels/1024x2048/{dtype}", f"train_t/2x512x512/{dtype}"]
        assert set(names) <= set(cases.CASES)


def test_ceilings():
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


def test_report_lists_missing_peers_and_times_the_rest(monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    without(monkeypatch, "openvino", "onnxruntime")
    chosen = [*MODELS, TRAINING[0]]
    monkeypatch.setattr(cases, "CASES", {case.name: case for case in chosen})
    compiled = ("torch.compile", "fused torch.compile")
    assert main(["report", "--seconds", "0", "--without", *compiled, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "missing peer OpenVINO: openvino not installed" in printed.splitlines()
    figures = json.loads((tmp_path / "report.json").read_text())
    assert figures["missing_peers"] == {"ONNX Runtime": "onnxruntime not installed", "OpenVINO": "openvino not installed"}
    plain_labels = {"PyTorch contiguous", "PyTorch channels_last"}
    for case in chosen:
        timed = {row["label"] for row in figures["rows"] if row["case"] == case.name}
        assert timed == plain_labels | {"fused channels_last" if case in TRAINING else "fused"}
    columns = "| segnext_tiny/2x40x64 | segnext_tiny_labels/40x64 |"
    assert columns in printed and "### segnext, forward, bfloat16" in printed and "### train, step, float32" in printed
    assert len(next(line for line in printed.splitlines() if line.startswith("| fused, float32")).split("|")) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models.png", "report.json", "report.md"]


def test_report_without_matplotlib_says_so(one_small_case, monkeypatch, tmp_path, capsys):
    without(monkeypatch, "matplotlib")
    assert main(["report", "--seconds", "0", "--without", "torch.compile", "--out", str(tmp_path)]) == 0
    assert "no plots: matplotlib not installed" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md"]


def test_exponent_of_a_power_law():
    x = [256, 512, 2048]
    assert scaling.exponent(x, [3e-9 * value**1.25 for value in x]) == pytest.approx(1.25)
    assert scaling.exponent([1, 2], [8.0, 4.0]) == pytest.approx(-1)
    assert scaling.exponent([1], [8.0]) is None


def test_scaling_measures_every_axis(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    without(monkeypatch, "openvino", "onnxruntime")
    threads = torch.get_num_threads()
    points = scaling.grid(sides=((32, 32), (32, 64)), batches=(1, 2))
    points["threads"] = [scaling.Point((32, 64), 1, count) for count in (1, 2)]
    figures = scaling.run(points, 0, TINY, "segnext_tiny")
    assert torch.get_num_threads() == threads
    contenders = [f"{name} {dtype}" for dtype in ("float32", "bfloat16") for name in ("fused", "PyTorch channels_last")]
    assert {axis: [curve["label"] for curve in curves] for axis, curves in figures["axes"].items()} == {
        axis: contenders for axis in ("image", "batch", "threads")
    }
    assert [curves[0]["x"] for curves in figures["axes"].values()] == [[1024, 2048], [1, 2], [1, 2]]
    text = scaling.markdown(figures)
    assert "### Time against batch" in text and "| contender | 32x32 | 32x64 | exponent |" in text
    scaling.plot(figures, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_unknown_case_is_an_error(capsys):
    assert main(["report", "--case", "nothing"]) == 2
    assert "no benchmark case fits 'nothing'" in capsys.readouterr().err


needs_peak = pytest.mark.skipif(not memory.CLEAR_REFS.exists(), reason=f"peak memory is taken from {memory.CLEAR_REFS}")


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


def test_every_kind_of_problem_has_its_contenders():
    labels = {name.partition("/")[0]: problem.labels for name, problem in memory.PROBLEMS.items()}
    assert set(labels) == {"msca_strips", "upsample_cross_entropy", "train_t", "segnext_t_labels"}
    assert all(any(label.startswith("fused") for label in found) for found in labels.values())
    assert not any("torch.compile" in label for found in labels.values() for label in found)
    assert all(p.small.contender(label) for p in memory.PROBLEMS.values() for label in p.labels)
