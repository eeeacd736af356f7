"""The benchmark cases of models and of training steps, the report's table of them, and their scaling."""

import json

import pytest
import torch
from benchmarks import IMAGE, MODEL_ERRORS, MODELS, TINY, TRAINING, TRAINING_ERRORS, small_ceilings, turns, without
from torch.utils._python_dispatch import TorchDispatchMode

from bench import case as bench_case
from bench import cases, models, plain, scaling, training
from bench.__main__ import main
from bench.measure import Runner, error, exact


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


@pytest.mark.parametrize("labels", [False, True], ids=["logits", "labels"])
def test_a_gpus_model_is_the_plain_one(labels):
    images = MODELS[0].inputs()[0]
    with torch.no_grad():
        found, want = (model(TINY, torch.float32, labels)(images) for model in (models.FusedModel, models.PlainModel))
    assert (found == want).float().mean() > 0.99 if labels else (found - want).abs().max() < 1e-5 * want.abs().max()


def test_a_model_exported_by_segnext_has_its_norms_folded(monkeypatch):
    onnx, _ = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    monkeypatch.setattr(models, "onnx_runtime", lambda path: path)

    def operators(label):
        return {node.op_type for node in onnx.load(MODELS[2].contender(label).build()).graph.node}

    assert "BatchNormalization" in operators("ONNX Runtime")
    assert "BatchNormalization" not in operators("ONNX Runtime, exported by segnext")


def test_plain_model_keeps_its_fixed_bases(monkeypatch):
    copied, images = plain.network(models.network(TINY)), MODELS[0].inputs()[0]
    monkeypatch.setattr("segnext_kernels.nn.fixed_uniform", None)
    with torch.no_grad():
        assert copied(images).isfinite().all()


def test_models_lie_on_the_device(monkeypatch):
    monkeypatch.setattr(bench_case, "_device", torch.device("meta"))
    models.network.cache_clear()
    chosen = models.logits_case("segnext_tiny", TINY, IMAGE, torch.bfloat16, on_gpu=True)
    try:
        for label in ("fused", "PyTorch contiguous", "PyTorch channels_last"):
            (y,) = Runner(chosen, chosen.contender(label)).forward()
            assert y.device.type == "meta"
    finally:
        models.network.cache_clear()


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


def test_report_lists_missing_peers_and_times_the_rest(monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    without(monkeypatch, "openvino", "onnxruntime")
    small_ceilings(monkeypatch)
    chosen = [*MODELS, TRAINING[0]]
    monkeypatch.setattr(cases, "CASES", {case.name: case for case in chosen})
    assert main(["report", "--seconds", "0.001", "--without", "*torch.compile*", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "missing peer OpenVINO: openvino not installed" in printed.splitlines()
    figures = json.loads((tmp_path / "report.json").read_text())
    endings, left_out = ("", ", exported by segnext"), "left out by --without"
    compiled = ("torch.compile channels_last", "torch.compile with the loss channels_last", "fused torch.compile channels_last")
    assert figures["missing_peers"] == {
        **{f"ONNX Runtime{ending}": "onnxruntime not installed" for ending in endings},
        **{f"OpenVINO{ending}": "openvino not installed" for ending in endings},
        **dict.fromkeys(compiled, left_out),
    }
    plain_labels = {"PyTorch contiguous", "PyTorch channels_last"}
    for case in chosen:
        timed = {row["label"] for row in figures["rows"] if row["case"] == case.name}
        assert timed == plain_labels | {"fused channels_last" if case in TRAINING else "fused"}
    columns = "| segnext_tiny/2x40x64 | segnext_tiny_labels/40x64 |"
    assert columns in printed and "### segnext, forward, bfloat16" in printed and "### train, step, float32" in printed
    assert len(next(line for line in printed.splitlines() if line.startswith("| fused, float32")).split("|")) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models.png", "report.json", "report.md"]


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
    first, *_, figures = scaling.run(points, 0, TINY, "segnext_tiny")
    assert [[curve["x"] for curve in curves[:1]] for curves in first["axes"].values()] == [[[1024]], [], []]
    assert "### Time against batch" not in scaling.markdown(first)
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
