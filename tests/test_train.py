"""``segnext train``: what it leaves behind, that a killed training ends as if it had not been, and that nothing is lost."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import folders
import pytest
import torch
from PIL import Image

import segnext
from segnext import begin, cli, loop, recipes, run, trainer
from segnext.begin import build, class_weights, label_counts, require_classes
from segnext.checkpoint import WeightsError
from segnext.data import DataError, open_dataset, pairs
from segnext.errors import DeviceError
from segnext.evaluate import Scores
from segnext.images import ImageError
from segnext.palette import IGNORED
from segnext.recipes import RECIPES, RecipeError
from segnext.train import Machine, resume, train
from segnext.trainer import Step

(SCRATCH,) = RECIPES["scratch"]
SHORT = replace(
    SCRATCH,
    iterations=6,
    batch=2,
    crop=(32, 32),
    scale=(64, 32),
    precision="float32",
    log_every=2,
    save_every=2,
    evaluate_every=3,
)
HERE = Machine(workers=0)


@pytest.fixture
def data(tmp_path) -> Path:
    return folders.folder(tmp_path / "data")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A finished run of SHORT."""
    root = tmp_path_factory.mktemp("trained")
    train([SHORT], [folders.folder(root / "data")], root / "run", HERE)
    return root / "run"


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_what_a_training_leaves_behind(trained):
    assert sorted(path.name for path in trained.iterdir() if not path.name.startswith("events.")) == [
        "best.pth", "curves.png", "last.pth", "model.pth", "recipe.json", "train.csv", "val.csv"
    ]  # fmt: skip
    rows, scores = run.read_csv(trained / "train.csv"), run.read_csv(trained / "val.csv")
    assert [int(row["step"]) for row in rows] == [2, 4, 6] and all(float(row["loss"]) > 0 for row in rows)
    assert [int(row["step"]) for row in scores] == [3, 6] and all(0 <= float(row["mIoU"]) <= 1 for row in scores)
    assert Image.open(trained / "curves.png").size[0] > 100
    stages, beside = recipes.read(trained / "recipe.json")
    assert stages == (SHORT,) and beside["machine"] == {"device": "cpu", "workers": 0, "accumulate": 1, "cuda_graph": True}


def test_a_training_leaves_pytorchs_settings(tmp_path, data, monkeypatch):
    seen = []
    monkeypatch.setattr(run.Run, "draw", lambda self: seen.append(torch.backends.cudnn.benchmark))
    for deterministic in (False, True):
        train(
            [replace(SHORT, iterations=1, val=None, deterministic=deterministic)], [data], tmp_path / str(deterministic), HERE
        )
        assert not torch.backends.cudnn.benchmark and not torch.are_deterministic_algorithms_enabled()
    assert seen == [True, False]


def test_kernels_are_not_tuned_for_each_size_of_the_evaluated_pictures(tmp_path, data, monkeypatch):
    seen = []

    def evaluated(*args, **options):
        seen.append(torch.backends.cudnn.benchmark)
        return Scores(torch.eye(10, dtype=torch.int64))

    monkeypatch.setattr("segnext.loop.evaluate", evaluated)
    monkeypatch.setattr(run.Run, "draw", lambda self: seen.append(torch.backends.cudnn.benchmark))
    train([replace(SHORT, iterations=1)], [data], tmp_path / "run", HERE)
    assert seen == [False, True]


def test_figures_are_under_their_names(tmp_path):
    with run.open_run(tmp_path, 0) as records:
        records.log_step(Step(1, loss=9.0, lr=0.1, progress=0.2, seconds=3.0, waited=0.5), 2.0)
        records.log_scores(1, Scores(torch.tensor([[3, 1], [0, 1]])))
    steps, scores = (run.read_csv(tmp_path / f"{name}.csv") for name in ("train", "val"))
    assert steps == [{"step": "1", "loss": "2", "lr": "0.1", "seconds": "3.0000", "waited": "0.5000"}]
    assert scores == [{"step": "1", "mIoU": "0.625000", "mean_accuracy": "0.875000", "pixel_accuracy": "0.800000"}]


def test_the_curves_are_in_tensorboard(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained)).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4, 6]
    assert [event.step for event in events.Scalars("val/mIoU")] == [3, 6]


def step(number: int) -> trainer.Step:
    return trainer.Step(number, loss=0.5, lr=0.1, progress=0.5, seconds=1.0, waited=0.0)


def test_steps_that_are_done_again_are_recorded_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for done, numbers in ((0, (1, 2, 3)), (1, (2, 3, 4))):
        with run.open_run(tmp_path, done) as records:
            for number in numbers:
                records.log_step(step(number), 0.5)
    assert [int(row["step"]) for row in run.read_csv(tmp_path / "train.csv")] == [1, 2, 3, 4]
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]


def test_a_row_that_was_cut_off_is_dropped(tmp_path):
    with run.open_run(tmp_path, 0) as records:
        records.log_step(step(1), 0.5)
    with (tmp_path / "train.csv").open("a") as file:
        file.write("2,0.5")
    with run.open_run(tmp_path, 2) as records:
        records.log_step(step(3), 0.5)
    assert [int(row["step"]) for row in run.read_csv(tmp_path / "train.csv")] == [1, 3]


def test_every_checkpoint_is_a_model(trained):
    for name in ("best.pth", "last.pth", "model.pth"):
        model = segnext.load(trained / name)
        assert (model.classes, model.scale, model.config.drop_path) == (folders.CLASSES, (64, 32), 0.0)
    assert same(weights(trained / "last.pth"), weights(trained / "model.pth"))
    best = max(float(row["mIoU"]) for row in run.read_csv(trained / "val.csv"))
    assert torch.load(trained / "last.pth", weights_only=True)["best"] == pytest.approx(best, abs=1e-6)


def test_a_folder_with_a_training_is_not_overwritten(trained, data):
    with pytest.raises(RecipeError, match="holds a training already; go on with it by --resume"):
        train([SHORT], [data], trained, HERE)


def test_a_folder_of_trainings_can_get_one_of_its_own(trained, data, tmp_path):
    shutil.copytree(trained, tmp_path / "runs" / "folder-t")
    train([replace(SHORT, iterations=1, val=None)], [data], tmp_path / "runs", HERE)
    assert (tmp_path / "runs" / "model.pth").exists()


def test_files_to_begin_with_are_found_from_any_folder(trained, data, tmp_path, monkeypatch):
    monkeypatch.chdir(trained)
    train([replace(SHORT, iterations=1, val=None, weights="model.pth")], [data], tmp_path / "run", HERE)
    (stage,), _ = recipes.read(tmp_path / "run" / "recipe.json")
    assert stage.weights == str(trained / "model.pth")


@pytest.mark.parametrize(
    "batch, accumulate, way", [(8, 1, "--accumulate 2"), (9, 1, "--accumulate 3"), (4, 4, "a smaller --batch or --crop")]
)
def test_the_end_of_a_gpus_memory_is_told(data, tmp_path, monkeypatch, batch, accumulate, way):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("segnext.train.Loop.train", full)
    with pytest.raises(DeviceError, match=f"the memory of cpu is too small; try {way}$"):
        train([replace(SHORT, batch=batch, crop=(64, 64))], [data], tmp_path / "run", replace(HERE, accumulate=accumulate))


def test_a_finished_training_is_finished(trained, capsys):
    before = (trained / "model.pth").stat().st_mtime_ns
    resume(trained)
    assert (trained / "model.pth").stat().st_mtime_ns == before
    on = f"to train on from its weights: --weights {trained / 'model.pth'} --out ANOTHER"
    assert capsys.readouterr().out == f"{trained} is trained to its end; {on}\n"


def test_nothing_is_best_where_nothing_has_a_class(tmp_path, data, capsys):
    for mask in (data / "val" / "masks").iterdir():
        Image.new("L", Image.open(mask).size, IGNORED).save(mask)
    train([replace(SHORT, iterations=1)], [data], tmp_path / "run", HERE)
    assert not (tmp_path / "run" / "best.pth").exists()
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == f"wrote {tmp_path / 'run' / 'model.pth'}; there is no best.pth, since no pixel of val has a class"
    train([replace(SHORT, iterations=1, val=None)], [data], tmp_path / "run 2", HERE)
    assert capsys.readouterr().out.splitlines()[-1] == f"wrote {tmp_path / 'run 2' / 'model.pth'}"


def test_a_resumption_keeps_weights_that_were_better(tmp_path, trained):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "model.pth").unlink()
    state = torch.load(trained / "last.pth", weights_only=True)
    torch.save({**state, "best": 1.0, "due": True}, tmp_path / "run" / "last.pth")
    before = (tmp_path / "run" / "best.pth").stat().st_mtime_ns
    resume(tmp_path / "run")
    assert (tmp_path / "run" / "best.pth").stat().st_mtime_ns == before


def test_a_resumption_on_another_machine(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("segnext.train._stages", lambda stages, roots, out, device, machine, **_: seen.append(machine))
    machine = {"device": "cuda", "workers": 0, "accumulate": 1, "cuda_graph": True}
    recipes.write(tmp_path / "recipe.json", [SHORT], data=["data"], machine=machine)
    resume(tmp_path, device="cpu")
    options = ("--device", "cpu", "--workers", "3", "--accumulate", "2", "--no-cuda-graph")
    assert cli.main(["train", "--resume", str(tmp_path), *options]) == 0
    assert seen == [Machine("cpu", 0, 1, True), Machine("cpu", 3, 2, False)]


COMMAND = [sys.executable, "-m", "segnext", "train"]
OPTIONS = (
    *("--recipe", "scratch", "--batch", "2", "--crop", "32x32", "--scale", "64x32", "--precision", "float32", "--workers", "1"),
    *("--iterations", "12", "--log-every", "3", "--save-every", "1", "--evaluate-every", "6"),
    *("--dropout", "0.5", "--drop-path", "0.3"),
)


def start(*arguments, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


def test_a_killed_training_ends_with_the_same_weights(tmp_path, data):
    """Killed with SIGKILL at a random moment after a new checkpoint, and in the middle of writing one."""
    assert cli.main(["train", "--data", str(data), "--out", str(tmp_path / "unbroken"), *OPTIONS]) == 0
    draw, out = random.Random(7), tmp_path / "killed"
    process = start("--data", data, "--out", out, *OPTIONS)
    kills, unfinished = 0, 0
    while kills < 2 or not unfinished:
        before = written(out / "last.pth")
        wait_for(process, lambda before=before: written(out / "last.pth") != before)
        if kills == 0:
            time.sleep(draw.uniform(0, 0.3))
        else:
            wait_for(process, lambda: list(out.glob(".last.pth.*")))
        assert process.poll() is None, f"it ended after {kills} kills: {process.stderr.read()}"
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills, unfinished = kills + 1, unfinished + bool(list(out.glob(".last.pth.*")))
        process = start("--resume", out)
    assert process.wait(120) == 0, process.stderr.read()
    for name in ("model.pth", "best.pth", "last.pth"):
        assert same(weights(out / name), weights(tmp_path / "unbroken" / name)), name
    optimizers = [torch.load(folder / "last.pth", weights_only=True)["optimizer"] for folder in (out, tmp_path / "unbroken")]
    assert str(optimizers[0]) == str(optimizers[1])
    assert not list(out.glob(".*"))
    for name, columns in (("train", ("step", "loss", "lr")), ("val", run.VAL)):
        rows = [run.read_csv(folder / f"{name}.csv") for folder in (out, tmp_path / "unbroken")]
        figures = [[[row[column] for column in columns] for row in one] for one in rows]
        assert figures[0] == figures[1]


def written(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def wait_for(process: subprocess.Popen, happened) -> None:
    while process.poll() is None and not happened():
        time.sleep(0.0005)


def test_a_training_that_never_wrote_a_checkpoint_begins_anew(tmp_path, trained, data):
    train([SHORT], [data], tmp_path / "run", HERE)
    for name in ("last.pth", "model.pth", "best.pth"):
        (tmp_path / "run" / name).unlink()
    resume(tmp_path / "run")
    assert same(weights(tmp_path / "run" / "model.pth"), weights(trained / "model.pth"))


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, data):
    """The process may write files of 30 MB at most, which the weights alone fit into, and a checkpoint with its moments not."""
    out = tmp_path / "run"
    ended = start("--data", data, "--out", out, *OPTIONS, "--iterations", 4, "--save-every", 2, preexec_fn=small_files)
    assert ended.wait(120) == 2
    error = ended.stderr.read().strip().splitlines()[-1]
    assert error.startswith(f"segnext: cannot write {out}/last.pth: File too large") and "no earlier checkpoint" in error
    assert not list(out.glob("*last.pth*")) and not list(out.glob(".*"))
    resume(out)
    assert (out / "model.pth").exists()


def small_files() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30 << 20, 30 << 20))


def test_what_was_whole_is_told(tmp_path, trained, monkeypatch):
    def full(*args):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    (tmp_path / "last.pth").write_bytes(b"of before")
    monkeypatch.setattr(torch, "save", full)
    loop = trainer.Trainer(segnext.load(trained / "model.pth"), [None], SHORT)
    with run.open_run(tmp_path, 0) as records, pytest.raises(WeightsError, match="last.pth: .*last.pth of before is whole"):
        records.save(loop, 0.0)
    assert (tmp_path / "last.pth").read_bytes() == b"of before"


def test_weights_that_are_not_finite_are_not_kept(tmp_path, data, monkeypatch):
    """A gradient can be infinite where the loss is not: then neither the best nor the last checkpoint is replaced."""
    step = torch.optim.AdamW.step

    def spoiling(self, *args):
        step(self, *args)
        if next(iter(self.state.values()))["step"] == 3:
            self.param_groups[0]["params"][0].data[0] = torch.inf

    monkeypatch.setattr(torch.optim.AdamW, "step", spoiling)
    with pytest.raises(FloatingPointError, match="no longer finite after step 3"):
        train([replace(SHORT, save_every=1, evaluate_every=1)], [data], tmp_path / "run", HERE)
    assert torch.load(tmp_path / "run" / "last.pth", weights_only=True)["done"] == 2
    for name in ("last.pth", "best.pth"):
        state = weights(tmp_path / "run" / name)
        assert all(value.isfinite().all() for value in state.values())


def test_a_loss_that_is_lost_stops_the_training(tmp_path, data, monkeypatch):
    losses = iter([1.0, 1.0, float("nan")])
    loss = trainer.pixel_loss
    monkeypatch.setattr(trainer, "pixel_loss", lambda *args: loss(*args) * next(losses))
    with pytest.raises(FloatingPointError, match=r"the loss became nan in step 3 .*scene_\d, scene_\d.*a smaller lr"):
        train([replace(SHORT, save_every=1)], [data], tmp_path / "run", HERE)
    assert torch.load(tmp_path / "run" / "last.pth", weights_only=True)["done"] == 2
    assert all(value.isfinite().all() for value in weights(tmp_path / "run" / "last.pth").values())


def test_a_vanished_file_is_named_and_costs_nothing(tmp_path, data, capsys, monkeypatch):
    expected = train([SHORT], [data], tmp_path / "unbroken", HERE).state_dict()
    out, file, read = tmp_path / "run", data / "train" / "images" / "scene_2.png", pairs.read_image
    reads = []  # five for the class weights, then five in every round

    def vanishing(path):
        reads.append(path)
        return read(file.with_name("gone.png") if path == str(file) and len(reads) > 10 else path)

    monkeypatch.setattr(pairs, "read_image", vanishing)
    with pytest.raises(ImageError, match="gone.png: no such file"):
        train([SHORT], [data], out, HERE)
    assert torch.load(out / "last.pth", weights_only=True)["done"] >= 2
    monkeypatch.setattr(pairs, "read_image", read)
    assert cli.main(["train", "--resume", str(out)]) == 0
    assert same(expected, weights(out / "model.pth"))


def test_a_worker_that_dies_during_a_step_is_told(tmp_path, data, monkeypatch):
    """Torch tells of it by an error at any place of the main process."""
    step, children = trainer.Trainer._step, multiprocessing.active_children

    def deadly(self, *args):
        if self.done == 2:
            children()[0].kill()
            time.sleep(1)
        return step(self, *args)

    monkeypatch.setattr(trainer.Trainer, "_step", deadly)
    with pytest.raises(DataError, match="a process that reads pictures died"):
        train([SHORT], [data], tmp_path / "run", Machine(workers=1))
    assert torch.load(tmp_path / "run" / "last.pth", weights_only=True)["done"] == 2


def test_two_processes_in_one_folder(trained):
    with run.open_run(trained, 6), pytest.raises(RecipeError, match="another process is training in"), run.open_run(trained, 6):
        pass


def test_a_refused_training_leaves_the_recipe_of_the_other(tmp_path, data):
    """Before there is a checkpoint, too."""
    out = tmp_path / "run"
    out.mkdir()
    with run.open_run(out, 0):
        (out / "recipe.json").write_text("the other's")
        with pytest.raises(RecipeError, match="another process is training in"):
            train([SHORT], [data], out, HERE)
    assert (out / "recipe.json").read_text() == "the other's"


@pytest.mark.parametrize(("batch", "accumulate"), [(1, 1), (2, 2)])
def test_one_value_for_a_batch_norm_is_told(tmp_path, data, batch, accumulate):
    with pytest.raises(RecipeError, match="batch norms need more than one value, and one picture of 32x32 at a time"):
        train([replace(SHORT, batch=batch, crop=(32, 32))], [data], tmp_path / "run", replace(HERE, accumulate=accumulate))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [b"", b"what is this", None], ids=["empty", "text", "weights alone"])
def test_a_damaged_checkpoint_is_told(tmp_path, trained, content):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "model.pth").replace(tmp_path / "run" / "last.pth")
    if content is not None:
        (tmp_path / "run" / "last.pth").write_bytes(content)
    with pytest.raises(WeightsError, match=r"last\.pth (cannot be read, it may be cut short|is no checkpoint to go on from)"):
        resume(tmp_path / "run")


def test_a_process_that_reads_pictures_does_not_keep_the_folder(trained):
    """It lives some seconds longer than a training that was killed."""
    context = multiprocessing.get_context("fork")
    runs = context.Event()
    with run.open_run(trained, 6):
        reader = context.Process(target=lambda: (runs.set(), time.sleep(60)))
        reader.start()
        assert runs.wait(60)
    with run.open_run(trained, 6):
        assert reader.is_alive()
    reader.kill()


def test_a_failed_beginning_can_be_repeated(tmp_path, data):
    with pytest.raises(WeightsError):
        train([replace(SHORT, encoder="absent.pth")], [data], tmp_path / "run", HERE)
    train([replace(SHORT, iterations=1)], [data], tmp_path / "run", HERE)


def test_the_rank_of_weights_survives_a_resumption(tmp_path, data, trained):
    """No tensor shows it."""
    begin = segnext.create("t", 10, rank=5, drop_path=0.0)
    begin.classes = folders.CLASSES
    segnext.save(begin, tmp_path / "begin.pth")
    recipe = replace(SHORT, weights=str(tmp_path / "begin.pth"), iterations=4)
    expected = train([recipe], [data], tmp_path / "unbroken", HERE)
    interrupt(tmp_path / "half", data, recipe)
    resume(tmp_path / "half")
    resumed = segnext.load(tmp_path / "half" / "model.pth")
    assert resumed.config.rank == expected.config.rank == 5 and same(resumed.state_dict(), expected.state_dict())


def test_a_resumption_with_other_classes_is_refused(tmp_path, data):
    interrupt(tmp_path / "run", data, SHORT)
    first, second, *rest = folders.CLASSES
    for classes in ([second, first, *rest], [first, second, *rest, "eleventh"]):
        (data / "classes.txt").write_text("\n".join(classes))
        with pytest.raises(RecipeError, match="the names of the classes in .*data are others than when .*run began"):
            resume(tmp_path / "run")


def test_a_resumption_follows_the_recipe(tmp_path, data):
    """Which somebody may have edited meanwhile."""
    interrupt(tmp_path / "run", data, SHORT)
    stages, beside = recipes.read(tmp_path / "run" / "recipe.json")
    recipes.write(tmp_path / "run" / "recipe.json", [replace(stages[0], lr=1e-7, weight_decay=0.25)], **beside)
    resume(tmp_path / "run")
    state = torch.load(tmp_path / "run" / "last.pth", weights_only=True)["optimizer"]["param_groups"]
    assert {group["peak"] for group in state} == {1e-7, 1e-7 * SHORT.head_lr}
    assert {group["weight_decay"] for group in state} == {0, 0.25}


def test_a_folder_without_a_training_is_told(tmp_path):
    with pytest.raises(RecipeError, match="nothing holds no training to go on with"):
        resume(tmp_path / "nothing")


def test_a_resumption_tells_what_cannot_be_otherwise(tmp_path, data):
    interrupt(tmp_path / "run", data, SHORT)
    stages, beside = recipes.read(tmp_path / "run" / "recipe.json")
    recipes.write(tmp_path / "run" / "recipe.json", [replace(stages[0], head="msca", dropout=0.5)], **beside)
    with pytest.raises(RecipeError, match="head was ham and is msca, dropout was 0.1 and is 0.5; these cannot change"):
        resume(tmp_path / "run")
    recipes.write(tmp_path / "run" / "recipe.json", [replace(stages[0], scale=(100, 50))], **beside)
    assert resume(tmp_path / "run").scale == (100, 50)


@pytest.mark.parametrize("files, refused", [(3, True), (begin.COUNTED + 1, False)], ids=["all counted", "a part counted"])
def test_masks_without_two_classes(files, refused, capsys):
    """As of 0 and 255, where a drawing program's white was meant to be class 1."""
    counts = torch.zeros(256, dtype=torch.int64)
    counts[0], counts[255] = 75, 25
    message = "data: no pixel of the masks that were counted is object; 25% of all are ignored"
    if refused:
        with pytest.raises(DataError, match=f"{message}, so there are no two classes to tell apart"):
            require_classes(counts, ["background", "object"], files, "data")
    else:
        require_classes(counts, ["background", "object"], files, "data")
        assert capsys.readouterr().out == f"{message}\n"
    counts[1] = 1
    require_classes(counts, ["background", "object"], files, "data")
    assert capsys.readouterr().out == ""


def test_masks_of_one_class_are_told_before_training(tmp_path, data):
    for mask in (data / "train" / "masks").iterdir():
        Image.new("L", Image.open(mask).size, 3).save(mask)
    with pytest.raises(DataError, match="no pixel of the masks that were counted is .* and 4 more; 0% of all are ignored"):
        train([SHORT], [data], tmp_path / "run", HERE)


def test_an_evaluation_that_fails_costs_no_steps(tmp_path, data, trained):
    out = tmp_path / "run"
    for failing in ("log_scores", "save_weights"):  # before and after a line of val.csv
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(run.Run, failing, interrupted)
            resume(out) if out.exists() else train([SHORT], [data], out, HERE)
        state = torch.load(out / "last.pth", weights_only=True)
        assert (state["done"], state["due"]) == (3, True)
    resume(out)
    assert same(weights(out / "model.pth"), weights(trained / "model.pth"))
    assert same(weights(out / "best.pth"), weights(trained / "best.pth"))
    assert [row["mIoU"] for row in run.read_csv(out / "val.csv")] == [row["mIoU"] for row in run.read_csv(trained / "val.csv")]


def interrupt(out: Path, data: Path, recipe: recipes.Recipe) -> None:
    """A training that is stopped after its first evaluation, or at its end."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run.Run, "draw", interrupted)
        train([recipe], [data], out, HERE)


def interrupted(self, *args) -> None:
    raise KeyboardInterrupt


def test_the_curves_are_drawn_by_whoever_ends_a_training(tmp_path, data):
    interrupt(tmp_path / "run", data, replace(SHORT, iterations=1, val=None))
    assert not (tmp_path / "run" / "curves.png").exists()
    resume(tmp_path / "run")
    assert (tmp_path / "run" / "curves.png").exists() and (tmp_path / "run" / "model.pth").exists()


def test_two_trainings_carry_the_weights_over_and_swap_the_classifier(tmp_path, data):
    other = folders.folder(tmp_path / "other", train=3, val=1)
    (other / "classes.txt").write_text("\n".join([*folders.CLASSES, "eleventh"]))
    stages = [replace(SHORT, iterations=2), replace(SHORT, iterations=1, lr=1e-12, val=None)]
    train(stages, [data, other], tmp_path / "run", HERE)
    first, second = (tmp_path / "run" / name for name in ("1-folder-train", "2-folder-train"))
    assert not (second / "best.pth").exists() and run.read_csv(second / "val.csv") == []
    before, after = weights(first / "model.pth"), weights(second / "model.pth")
    for name, parameter in segnext.load(second / "model.pth").named_parameters():
        if name.startswith("decode_head.conv_seg."):
            assert after[name].shape[0] == 11 and before[name].shape[0] == 10
        else:
            torch.testing.assert_close(parameter.detach(), before[name], rtol=0, atol=1e-9)


def test_a_killed_second_training_goes_on(tmp_path, data, monkeypatch, capsys):
    stages = [replace(SHORT, iterations=2, seed=1), replace(SHORT, iterations=4)]
    train(stages, [data], tmp_path / "run", HERE)
    second = tmp_path / "run" / "2-folder-train"
    expected = weights(second / "model.pth")
    for name in ("model.pth", "last.pth"):
        (second / name).unlink()
    begun = Mock(wraps=trainer.Trainer)
    monkeypatch.setattr("segnext.train.Trainer", begun)
    capsys.readouterr()
    resume(tmp_path / "run", workers=1)
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'run' / '1-folder-train'} is trained to its end\n")
    assert begun.call_args.kwargs["workers"] == 1 and same(weights(second / "model.pth"), expected)


def test_weights_to_begin_with(data, trained, tmp_path):
    pairs = open_dataset("folder", data, "train")
    given = weights(trained / "model.pth")
    assert same(build(replace(SHORT, weights=str(trained / "model.pth")), pairs).state_dict(), given)
    encoder = build(replace(SHORT, encoder=str(trained / "model.pth")), pairs).state_dict()
    assert same({k: v for k, v in encoder.items() if "backbone" in k}, {k: v for k, v in given.items() if "backbone" in k})
    assert not torch.equal(encoder["decode_head.squeeze.conv.weight"], given["decode_head.squeeze.conv.weight"])
    for other in ({"head": "msca"}, {"size": "b"}):
        with pytest.raises(WeightsError, match="of other size or head than the recipe's: .*model.pth does not fit: ") as raised:
            build(replace(SHORT, weights=str(trained / "model.pth"), **other), pairs)
        assert len(str(raised.value)) < 1000  # a few of the names
    ham = segnext.create("t", 10, rank=4, gradient="one_step", bases="random")
    segnext.save(ham, tmp_path / "ham.pth")
    config = build(replace(SHORT, weights=str(tmp_path / "ham.pth")), pairs).config
    assert (config.rank, config.gradient, config.bases) == (4, "one_step", "random")
    assert build(replace(SHORT, dropout=0.4), pairs).decode_head.dropout.p == 0.4
    with pytest.raises(WeightsError, match="absent.pth.*to train from random weights: --recipe scratch"):
        build(replace(SHORT, encoder=str(tmp_path / "absent.pth")), pairs)


def test_classes_of_other_names_get_a_new_classifier(data, trained):
    pairs, given = open_dataset("folder", data, "train"), weights(trained / "model.pth")
    pairs.classes = [*folders.CLASSES[:-1], "renamed"]
    built = build(replace(SHORT, weights=str(trained / "model.pth")), pairs).state_dict()
    assert {key.rpartition(".")[0] for key in given if not torch.equal(built[key], given[key])} == {"decode_head.conv_seg"}


def test_class_weights_by_hand():
    labels = torch.tensor([[0, 0, 0, 0], [0, 0, 1, 255]], dtype=torch.uint8)
    dataset = [(torch.zeros(3, 2, 4, dtype=torch.uint8), labels)]
    counts = label_counts(dataset)
    assert counts.nonzero().flatten().tolist() == [0, 1, 255] and counts[[0, 1, 255]].tolist() == [6, 1, 1]
    assert class_weights(dataset, ["common", "rare"], 0.0, "data") is None
    with pytest.raises(DataError, match="no two classes"):
        class_weights([(dataset[0][0], labels.clamp(max=0))], ["common", "rare"], 0.0, "data")
    rare = class_weights(dataset, ["common", "rare"], 0.5, "data")
    assert rare[1] / rare[0] == pytest.approx(6**0.5)
    assert (rare * torch.tensor([6 / 7, 1 / 7])).sum() == pytest.approx(1)


@pytest.mark.parametrize(
    "sizes, crop, scale",
    [
        ([(90, 120)], 64, (360, 90)),
        ([(40, 30)], 32, (120, 30)),
        ([(700, 900)], 512, (2048, 512)),
        ([(64, 512)], 64, (512, 64)),
        ([(90, 120), (300, 400), (30, 300)], 64, (360, 90)),
    ],
)
def test_a_folder_decides_on_its_scale(tmp_path, sizes, crop, scale, monkeypatch):
    begun = []

    def begin(recipe, *rest):
        begun.append(recipe)
        raise KeyboardInterrupt

    monkeypatch.setattr("segnext.train._stage", begin)
    for kind in ("images", "masks"):
        (tmp_path / "data" / "train" / kind).mkdir(parents=True)
        for i, size in enumerate(sizes):
            Image.new("L", size[::-1]).save(tmp_path / "data" / "train" / kind / f"{i}.png")
    (tmp_path / "data" / "classes.txt").write_text("one\ntwo")
    with pytest.raises(KeyboardInterrupt):
        train([replace(SCRATCH, val=None)], [tmp_path / "data"], tmp_path / "run", HERE)
    (stage,) = begun
    assert (stage.crop, stage.scale) == ((crop, crop), scale) and stage.precision in ("bfloat16", "float32")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "give --data ROOT, or --resume RUN"),
        (["--data", "{data}", "--recipe", "ade"], "there is no recipe 'ade'"),
        (["--data", "{data}", "--recipe", "ade20k", "--iterations", "10"], "a warm-up of 1500 is not shorter"),
        (["--data", "{data}", "{data}"], "1 trainings: give one folder"),
        (["--data", "{data}/absent"], "absent"),
        (["--resume", "{data}"], "holds no training to go on with"),
        (["--resume", "{data}", "--batch", "3"], "--resume goes by the folder's own recipe"),
        (["--data", "{data}", "--weights", "ade20k-t", "--encoder", "imagenet"], "ade20k-t is a whole model"),
        (["--resume", "{data}", "--recipe", "scratch"], "--resume goes by the folder's own recipe"),
        (
            ["--data", "{data}", "--recipe", "scratch", "--batch", "3", "--accumulate", "2", "--out", "{data}/run"],
            "cannot be dealt out",
        ),
    ],
)
def test_wrong_arguments_are_one_line(data, capsys, arguments, message):
    assert cli.main(["train", *(argument.format(data=data) for argument in arguments)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("segnext: ") and message in error


def test_recipes_are_printed(capsys):
    assert cli.main(["recipes"]) == 0
    assert capsys.readouterr().out.strip() == recipes.table()


def test_learning(tmp_path):
    """Loss falls and IoU rises on pictures that were not trained on."""
    data = folders.folder(tmp_path / "data", train=40, val=10, size=(64, 80))
    recipe = replace(
        SHORT, iterations=80, batch=4, crop=(64, 64), scale=(80, 64), log_every=20, save_every=99, evaluate_every=40
    )
    train([replace(recipe, distort=False)], [data], tmp_path / "run", Machine(workers=1))
    losses = [float(row["loss"]) for row in run.read_csv(tmp_path / "run" / "train.csv")]
    scores = [float(row["mIoU"]) for row in run.read_csv(tmp_path / "run" / "val.csv")]
    assert losses[-1] < 0.85 * losses[0] and scores[-1] > 1.15 * scores[0], (losses, scores)
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["recipe"][0]["lr"] == 2e-3


def test_data_errors_come_before_training(tmp_path, data):
    (data / "train" / "masks" / "scene_1.png").unlink()
    with pytest.raises(DataError, match="scene_1.png: there is no mask"):
        train([SHORT], [data], tmp_path / "run", HERE)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=str)
def test_a_training_that_is_asked_to_stop_loses_no_step(tmp_path, data, trained, monkeypatch, capsys, number):
    before, log_step = signal.getsignal(number), run.Run.log_step

    def ask(self, step, loss):
        log_step(self, step, loss)
        if step.number == 4:
            signal.raise_signal(number)

    monkeypatch.setattr(run.Run, "log_step", ask)
    with pytest.raises(KeyboardInterrupt):
        train([replace(SHORT, save_every=100)], [data], tmp_path / "run", HERE)
    assert signal.getsignal(number) == before
    assert f"stopped after step 4, which {tmp_path / 'run' / 'last.pth'} holds: --resume goes on" in capsys.readouterr().out
    assert torch.load(tmp_path / "run" / "last.pth", weights_only=True)["done"] == 4
    monkeypatch.undo()
    resume(tmp_path / "run")
    assert same(weights(tmp_path / "run" / "model.pth"), weights(trained / "model.pth"))


def test_processes_that_read_pictures_end_with_the_training_and_not_before(tmp_path, data, trained, monkeypatch):
    """A terminal's Ctrl-C and a batch system's SIGTERM come to all processes at once; the step that they come in must end."""
    log_step = run.Run.log_step

    def ask(self, step, loss):
        log_step(self, step, loss)
        if step.number == 2:
            readers = multiprocessing.active_children()
            assert len(readers) == 2
            for number in (signal.SIGINT, signal.SIGTERM):
                for reader in readers:
                    os.kill(reader.pid, number)
            time.sleep(0.5)
            assert all(reader.is_alive() for reader in readers)
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(run.Run, "log_step", ask)
    with pytest.raises(KeyboardInterrupt):
        train([replace(SHORT, save_every=100)], [data], tmp_path / "run", replace(HERE, workers=2))
    assert torch.load(tmp_path / "run" / "last.pth", weights_only=True)["done"] == 2
    assert not multiprocessing.active_children()
    monkeypatch.undo()
    resume(tmp_path / "run")
    assert same(weights(tmp_path / "run" / "model.pth"), weights(trained / "model.pth"))


@pytest.mark.parametrize("step", [3, 6])
def test_an_evaluation_that_is_asked_to_stop_is_done_at_the_resumption(tmp_path, data, trained, monkeypatch, capsys, step):
    """After the last step too; and whether it was asked before or meanwhile."""
    evaluated, log_step = loop._evaluated, run.Run.log_step

    def ask(trainer, *arguments):
        if trainer.done == step:
            signal.raise_signal(signal.SIGTERM)
            raise AssertionError("it went on")
        return evaluated(trainer, *arguments)

    def ask_before(self, of, loss):
        log_step(self, of, loss)
        if of.number == step:
            signal.raise_signal(signal.SIGTERM)

    for name, change in (("meanwhile", (loop, "_evaluated", ask)), ("before", (run.Run, "log_step", ask_before))):
        out = tmp_path / name
        with monkeypatch.context() as patched:
            patched.setattr(*change)
            with pytest.raises(KeyboardInterrupt):
                train([replace(SHORT, log_every=1)], [data], out, HERE)
        assert f"stopped after step {step}, which {out / 'last.pth'} holds" in capsys.readouterr().out
        assert torch.load(out / "last.pth", weights_only=True)["done"] == step
        resume(out)
        assert same(weights(out / "model.pth"), weights(trained / "model.pth"))
        assert same(weights(out / "best.pth"), weights(trained / "best.pth"))
        assert (out / "val.csv").read_text() == (trained / "val.csv").read_text()


def test_a_second_signal_stops_at_once(tmp_path, data, monkeypatch):
    def ask(self, step, loss):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(run.Run, "log_step", ask)
    with pytest.raises(KeyboardInterrupt):
        train([replace(SHORT, save_every=100)], [data], tmp_path / "run", HERE)
    assert not (tmp_path / "run" / "last.pth").exists()


def test_data_that_were_moved(tmp_path, data, trained, monkeypatch, capsys):
    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(run.Run, "log_step", lambda *_: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(KeyboardInterrupt):
            train([SHORT], [data], out, HERE)
    data.rename(tmp_path / "moved")
    with pytest.raises(DataError, match="no such folder"):
        resume(out)
    with pytest.raises(DataError, match="no such folder"):
        resume(out, [tmp_path / "nowhere"])
    assert cli.main(["train", "--resume", str(out), "--data", str(tmp_path / "moved")]) == 0
    assert json.loads((out / "recipe.json").read_text())["data"] == [str(tmp_path / "moved")]
    assert same(weights(out / "model.pth"), weights(trained / "model.pth"))


def test_other_pictures_are_told(tmp_path, data, capsys):
    out, pictures = tmp_path / "run", sorted((data / "train" / "images").iterdir())
    train([SHORT], [data], out, HERE)
    (out / "model.pth").unlink()
    (data / "train" / "masks" / pictures[0].name).with_suffix(".png").unlink()
    pictures[0].unlink()
    resume(out)
    told = f"has {len(pictures) - 1} pictures where it had {len(pictures)}: they come in another order"
    assert told in capsys.readouterr().out


def test_pictures_below_the_least_side_are_enlarged(data):
    for picture in data.glob("train/*/*.png"):
        Image.open(picture).resize((3, 1)).save(picture)
    chosen = begin.resolved(replace(SHORT, scale=None, crop=None), open_dataset("folder", data, "train"), torch.device("cpu"))
    assert (chosen.scale, chosen.crop) == ((32, 8), (32, 32))


def test_the_rank_can_be_given(tmp_path, data):
    pairs, file = open_dataset("folder", data, "train"), tmp_path / "w.pth"
    segnext.save(segnext.create("t", 10), file)
    assert build(replace(SHORT, rank=5), pairs).config.rank == 5
    assert build(replace(SHORT, rank=7, weights=str(file)), pairs).config.rank == 7
