"""The training loop: what it computes, that it can be stopped and continued to the bit, and how it ends."""

from __future__ import annotations

import copy
import io
import itertools
import time
from dataclasses import replace
from unittest.mock import Mock

import pytest
import small
import torch
import torch.nn.functional as F
from torch import nn

from segnext import distributed
from segnext import trainer as trainer_module
from segnext.data import Scenes
from segnext.data.augment import augmentation
from segnext.evaluate import Scores, evaluate
from segnext.images import ImageError
from segnext.loop import Loop, fit
from segnext.optimizer import parameter_groups
from segnext.recipes import Recipe, RecipeError
from segnext.trainer import Step, Trainer, pixel_loss, precision

SCENES = Scenes(8, (32, 48))
RECIPE = Recipe(iterations=40, batch=4, lr=5e-3, head_lr=1.0, warmup=0.05, precision="float32")


def small_model(**changes):
    return small.model(num_classes=10, **{"drop_path": 0.0, **changes})


def tiny_model() -> nn.Module:
    """Without batch norm, so that a batch in parts gives the gradients of the whole batch."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=4, padding=1), nn.GELU(), nn.Dropout(0.2), nn.Conv2d(8, 10, 1))


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    "changes",
    [{}, {"precision": "bfloat16"}, {"precision": "float16"}, {"balance": 0.3}],
    ids=lambda x: "-".join(map(str, x.values())),
)
def test_fit_lowers_the_loss(changes):
    model = small_model()
    before = evaluate(model, SCENES, 10)
    weights = torch.linspace(0.5, 1.5, 10) if "balance" in changes else None
    losses = fit(model, SCENES, replace(RECIPE, **changes), class_weights=weights)
    assert len(losses) == 40 and not model.training
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])
    assert evaluate(model, SCENES, 10).pixel_accuracy > before.pixel_accuracy + 0.2


def test_fit_in_steps_is_reproducible():
    recipe = replace(RECIPE, iterations=3, batch=2, warmup=0)
    losses = [fit(small_model(), SCENES, replace(recipe, seed=seed)) for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


def test_fit_ends_with_its_time():
    start = time.perf_counter()
    losses = fit(small_model(), SCENES, replace(RECIPE, iterations=None, seconds=1.0))
    assert losses and 0.9 < time.perf_counter() - start < 5


def trainer(recipe: Recipe = RECIPE, model: nn.Module | None = None, **options) -> Trainer:
    augment = augmentation((32, 32), (48, 32))
    return Trainer(model or small_model(dropout=0.3, drop_path=0.3, bases="random"), SCENES, recipe, augment=augment, **options)


@pytest.mark.parametrize("name", ["float32", "float16"])
def test_a_continued_training_ends_with_the_same_bits(name):
    recipe = replace(RECIPE, iterations=7, batch=4, precision=name)
    unbroken = trainer(recipe)
    steps = list(unbroken.steps())
    first = trainer(recipe)
    for _ in itertools.islice(first.steps(), 3):
        pass
    file = io.BytesIO()
    torch.save(first.state(), file)
    file.seek(0)
    torch.manual_seed(99)
    second = trainer(recipe, small.model(5, num_classes=10, dropout=0.3, drop_path=0.3, bases="random"), workers=1)
    second.load(torch.load(file, weights_only=True))
    later = list(second.steps())
    assert [step.number for step in later] == [4, 5, 6, 7]
    assert [step.loss for step in later] == [step.loss for step in steps[3:]]
    assert same(unbroken.model.state_dict(), second.model.state_dict())
    assert str(unbroken.optimizer.state_dict()) == str(second.optimizer.state_dict())
    assert unbroken.scaler.state_dict() == second.scaler.state_dict()


def test_a_training_goes_on_in_another_precision():
    first, second = trainer(RECIPE), trainer(replace(RECIPE, precision="float16"))
    second.load(first.state())
    assert second.scaler.is_enabled() and next(iter(second.steps())).number == 1


def test_a_continued_training_has_the_time_that_was_left():
    loop = trainer(replace(RECIPE, iterations=None, seconds=2.0))
    loop.load({**loop.state(), "seconds": 1.5})
    assert loop.progress == 0.75


def test_a_batch_in_parts_gives_the_gradients_of_the_whole(monkeypatch):
    monkeypatch.setattr(
        trainer_module, "set_lr", lambda optimizer, factor: [group.update(lr=1.0) for group in optimizer.param_groups]
    )
    states = []
    for parts in (1, 2, 4):
        model = tiny_model().eval()
        monkeypatch.setattr(model, "train", Mock())  # nothing is dropped: parts draw otherwise than the whole
        loop = trainer(replace(RECIPE, iterations=1, warmup=0), model, accumulate=parts)
        loop.optimizer = torch.optim.SGD(loop.optimizer.param_groups, lr=1.0)
        (step,) = loop.steps()
        states.append((step.loss, model.state_dict()))
    for loss, state in states[1:]:
        assert loss == pytest.approx(states[0][0], rel=1e-6)
        for key, value in state.items():
            torch.testing.assert_close(value, states[0][1][key], rtol=1e-5, atol=1e-7)


def test_parts_of_a_batch_draw_for_themselves(monkeypatch):
    seeds = []
    loss = trainer_module.pixel_loss
    monkeypatch.setattr(trainer_module, "pixel_loss", lambda *args: seeds.append(torch.initial_seed()) or loss(*args))
    list(trainer(replace(RECIPE, iterations=1, warmup=0), tiny_model(), accumulate=4).steps())
    assert len(set(seeds)) == 4


def test_batches_that_cannot_be_dealt_out():
    with pytest.raises(RecipeError, match="a batch of 4 cannot be dealt out: 1 processes, 3 parts each"):
        trainer(accumulate=3)


def test_what_a_batch_norm_sees_at_once(monkeypatch):
    trainer(replace(RECIPE, batch=1, crop=(40, 40)))  # four values at the encoder's end
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(RecipeError, match="one picture of 32x32 at a time"):
        trainer(replace(RECIPE, batch=2, crop=(32, 32), sync_norm=False))


def test_nothing_to_train_on():
    with pytest.raises(RecipeError, match="no pictures to train on"):
        fit(tiny_model(), Scenes(0, (32, 48)), RECIPE)


def test_the_recipe_reaches_the_optimizer():
    recipe = replace(RECIPE, betas=(0.8, 0.95), weight_decay=0.03)
    groups = Trainer(copy.deepcopy(small_model()), SCENES, recipe).optimizer.param_groups
    assert {group["betas"] for group in groups} == {(0.8, 0.95)}
    assert {group["weight_decay"] for group in groups} == {0.03, 0.0}


def test_the_schedule_reaches_the_optimizer():
    loop = trainer(replace(RECIPE, iterations=5, warmup=2, warmup_start=0.0, lr=0.01, head_lr=10.0))
    rates = []
    for step in loop.steps():
        rates.append((step.lr, [group["lr"] for group in loop.optimizer.param_groups]))
    expected = [0, 0.005, 0.01, 0.01 * 2 / 3, 0.01 / 3]
    assert [lr for lr, _ in rates] == pytest.approx(expected)
    assert [groups for _, groups in rates] == [pytest.approx([lr, lr, 10 * lr, 10 * lr]) for lr in expected]


def test_parameter_groups():
    model = small_model()
    groups = parameter_groups(model, Recipe(lr=2.0, head_lr=10.0, weight_decay=0.01))
    of = {id(p): (group["peak"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(of) == sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    expected = {
        "backbone.patch_embed1.proj.0.weight": (2, 0.01),
        "backbone.patch_embed1.proj.1.weight": (2, 0),
        "backbone.patch_embed2.norm.bias": (2, 0),
        "backbone.block1.0.norm1.weight": (2, 0),
        "backbone.block1.0.layer_scale_1": (2, 0.01),
        "backbone.block1.0.attn.proj_1.bias": (2, 0.01),
        "backbone.norm4.weight": (2, 0),
        "decode_head.squeeze.conv.weight": (20, 0.01),
        "decode_head.squeeze.gn.weight": (20, 0),
        "decode_head.conv_seg.bias": (20, 0.01),
    }
    assert {name: of[id(model.get_parameter(name))] for name in expected} == expected


@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 2.0, 1.0])], ids=["equal", "weighted"])
def test_loss_is_over_all_pixels(weights):
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 4, 5, requires_grad=True), torch.randint(3, (2, 16, 20))
    labels[0, :5], labels[1, 3:, 2] = 255, 255
    loss = pixel_loss(logits, labels, weights)
    full = F.interpolate(logits, (16, 20), mode="bilinear")
    expected = F.cross_entropy(full, labels, weights, ignore_index=255, reduction="sum") / labels.numel()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(one, logits)[0] for one in (loss, expected)))


def test_a_batch_without_labels_teaches_nothing():
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    loss = pixel_loss(logits, torch.full((1, 8, 8), 255))
    loss.backward()
    assert loss == 0 and not logits.grad.any()


def test_a_loss_that_is_not_finite_is_told_with_its_pictures():
    model = small_model()
    nn.init.constant_(model.decode_head.conv_seg.bias, float("nan"))
    loop = Trainer(model, SCENES, RECIPE)
    with pytest.raises(FloatingPointError, match=r"the loss became nan in step 1 .* on picture \d, picture \d, .*a smaller lr"):
        list(loop.steps())
    loop = Trainer(model, SCENES, RECIPE)
    with pytest.raises(FloatingPointError, match="no longer finite after step 0"):
        loop.require_finite()
    Trainer(small_model(), SCENES, RECIPE).require_finite()


def test_the_best_weights_are_those_of_the_best_evaluation(monkeypatch):
    scores = [Scores(torch.tensor([[right, wrong], [wrong, right]])) for right, wrong in ((2, 1), (6, 7), (4, 3))]
    monkeypatch.setattr("segnext.loop._evaluated", Mock(side_effect=scores))
    loop = Loop(Mock(), Mock(), SCENES, -1.0, [], False, 0)
    for _ in scores:  # of mIoU 0.5, 0.3, 0.4
        loop._evaluate()
    loop.run.save_weights.assert_called_once_with(loop.trainer, "best.pth")
    assert loop.best == 0.5


def test_a_logged_loss_is_the_mean_since_the_last():
    recipe = replace(RECIPE, log_every=2, save_every=9)
    loop = Loop(Mock(recipe=recipe), Mock(), None, -1.0, [], False, 0)
    for number, loss in enumerate((1.0, 3.0, 5.0, 9.0), 1):
        loop._after(Step(number, loss, 0.1, number / 9, 1.0, 0.0))
    assert [call.args[1] for call in loop.run.log_step.call_args_list] == [2, 7]


class Vanishing(Scenes):
    names = [f"scene {i}" for i in range(8)]

    def __getitem__(self, index: int):
        if index == 3:
            raise ImageError("scene_3.png: no such file")
        return super().__getitem__(index)


def test_a_vanished_picture_is_named():
    with pytest.raises(ImageError, match="^scene_3.png: no such file$"):
        fit(small_model(), Vanishing(8, (32, 48)), RECIPE)


def test_compiled_training(monkeypatch):
    """Through the tracer and autograd of torch.compile; what it generates is tested with the model."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compile(model, backend="aot_eager", fullgraph=True))
    recipe = replace(RECIPE, iterations=3, warmup=0)
    plain, compiled = (fit(small_model(dropout=0.0), SCENES, replace(recipe, compile=flag)) for flag in (False, True))
    assert compiled == pytest.approx(plain, rel=1e-3)


def test_waiting_for_data_is_measured():
    class Slow(Scenes):
        def __getitem__(self, index: int):
            time.sleep(0.05)
            return super().__getitem__(index)

    steps = list(Trainer(copy.deepcopy(small_model()), Slow(8, (32, 48)), replace(RECIPE, iterations=2, warmup=0)).steps())
    assert all(0.2 <= step.waited < step.seconds for step in steps)


@pytest.mark.parametrize("supported", [False, True])
def test_bfloat16_is_chosen_by_the_device(monkeypatch, supported):
    """Neither the processor decides for a GPU nor a GPU for the processor."""
    isa = "avx2" if supported else "avx512_bf16"
    monkeypatch.setattr(trainer_module.segnext_kernels, "build_info", lambda: {"isa": isa})
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: supported)
    chosen = {name: precision("auto", torch.device(name)) == "bfloat16" for name in ("cuda:0", "cpu", "meta")}
    assert chosen == {"cuda:0": supported, "cpu": not supported, "meta": False}
    monkeypatch.setattr(trainer_module.segnext_kernels, "build_info", lambda: {"isa": None})  # nothing is compiled
    assert precision("auto", torch.device("cpu")) == "float32"
    assert precision("float16", torch.device("cpu")) == "float16"
