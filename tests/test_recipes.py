"""Recipes: the paper's settings, their schedule by hand, files, and fields as options of the command line."""

from __future__ import annotations

import argparse
from dataclasses import asdict, fields, replace

import numpy as np
import pytest

from segnext import recipes
from segnext.cli import options
from segnext.recipes import RECIPES, Recipe, RecipeError

# recipe: (crop, batch, steps of each training, data, window, stride, scale, multiple)
PAPER = {
    "ade20k": (512, 16, [160_000], ["ade20k"], None, None, (2048, 512), 32),
    "cityscapes": (1024, 8, [160_000], ["cityscapes"], 1024, 768, (2048, 1024), 1),
    "coco-stuff": (512, 16, [80_000], ["coco-stuff"], None, None, (2048, 512), 32),
    "pascal-voc": (512, 16, [80_000, 80_000], ["pascal-voc", "pascal-voc"], None, None, (2048, 512), 1),
    "pascal-voc-coco": (512, 16, [600_000, 40_000], ["coco-voc", "pascal-voc"], None, None, (2048, 512), 1),
    "pascal-context": (480, 16, [80_000], ["pascal-context-59"], 480, 320, (520, 520), 1),
    "pascal-context-60": (480, 16, [80_000], ["pascal-context-60"], 480, 320, (520, 520), 1),
    "isaid": (896, 16, [160_000], ["isaid"], 896, 512, (896, 896), 1),
}


def square(side: int | None) -> tuple[int, int] | None:
    return None if side is None else (side, side)


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_settings(name):
    crop, batch, steps, data, window, stride, scale, multiple = PAPER[name]
    stages = RECIPES[name]
    assert [stage.iterations for stage in stages] == steps and [stage.dataset for stage in stages] == data
    for stage in stages:
        assert (stage.crop, stage.batch, stage.scale) == (square(crop), batch, scale)
    first = stages[0]
    assert (first.window, first.stride, first.multiple) == (square(window), square(stride), multiple)
    common = (6e-5, (0.9, 0.999), 0.01, 10.0, 1500, 1e-6, 1.0, 0.1, (0.5, 2.0), 0.75, "imagenet", True)
    for stage in stages:
        assert common == (
            stage.lr, stage.betas, stage.weight_decay, stage.head_lr, stage.warmup, stage.warmup_start, stage.power,
            stage.dropout, stage.ratio, stage.max_share, stage.encoder, stage.distort,
        )  # fmt: skip


def test_the_settings_for_small_data():
    common = {
        "batch": 8, "crop": None, "scale": None, "warmup": 0.05, "balance": 0.3, "precision": "auto", "log_every": 20,
        "save_every": 200, "evaluate_every": 500,
    }  # fmt: skip
    alone = {"encoder": None, "ratio": (0.75, 1.5), "head_lr": 1.0, "drop_path": 0.0}
    assert RECIPES["folder"] == (Recipe(iterations=4000, lr=1e-4, **common),)
    assert RECIPES["scratch"] == (Recipe(iterations=8000, lr=2e-3, **common, **alone),)


def test_second_trainings_use_the_validation_pictures_and_so_are_not_evaluated_on_them():
    for name in ("pascal-voc", "pascal-voc-coco"):
        first, second = RECIPES[name]
        assert (first.val, second.train, second.val) == ("val", "trainval", None)
    assert RECIPES["pascal-voc"][0].train == "trainaug"


def test_evaluation_is_that_of_the_last_training():
    last = recipes.evaluation_recipe("pascal-voc-coco")
    assert (last.dataset, last.val, last.scale) == ("pascal-voc", "val", (2048, 512))
    assert recipes.evaluation_recipe("ade20k") == RECIPES["ade20k"][0]


@pytest.mark.parametrize(
    "step, expected",
    [
        (0, 6e-11),
        (750, 6e-5 * (1e-6 + (1 - 1e-6) / 2)),
        (1499, 6e-5 * (1 - (1 - 1e-6) / 1500)),
        (1500, 6e-5),
        (80_750, 3e-5),
        (159_999, 6e-5 / 158_500),
        (160_000, 0),
    ],
)
def test_learning_rate_of_the_paper(step, expected):
    (recipe,) = RECIPES["ade20k"]
    assert recipe.lr * recipe.lr_factor(step / recipe.iterations) == pytest.approx(expected, rel=1e-6, abs=1e-18)


@pytest.mark.parametrize("progress, expected", [(0.0, 0.0), (0.1, 0.5), (0.2, 1.0), (0.6, 0.25), (1.0, 0.0)])
def test_learning_rate_with_a_share_and_a_power(progress, expected):
    recipe = Recipe(iterations=10, warmup=0.2, warmup_start=0.0, power=2.0)
    assert recipe.lr_factor(progress) == pytest.approx(expected)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seconds": 3.0}, "iterations or seconds"),
        ({"iterations": None}, "iterations or seconds"),
        ({"iterations": None, "seconds": 3.0}, "warm-up below 1"),
        ({"iterations": 1500}, "warm-up of 1500 is not shorter"),
        ({"window": (8, 8)}, "window and stride"),
        ({"window": (8, 8), "stride": (4, 9)}, "gaps"),
        ({"size": "xl"}, "size must be one of t, s, b, l, got 'xl'"),
        ({"precision": "int8"}, "precision must be one of"),
        ({"batch": 0}, "batch must be positive"),
        ({"crop": (32, 0)}, "crop must be positive"),
        ({"max_share": 0.0}, "max_share must be positive"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"betas": (2.0, 0.9)}, "betas must be at least 0 and below 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0"),
        ({"ratio": (2.0, 0.5)}, "ratio must be a low and a high number"),
        ({"crop": 512}, "crop must be two whole numbers or none, got 512"),
        ({"crop": (64,)}, "crop must be two whole numbers"),
        ({"betas": (0.9,)}, "betas must be two numbers"),
        ({"batch": 2.5}, "batch must be a whole number, got 2.5"),
        ({"seed": True}, "seed must be a whole number, got True"),
        ({"lr": None}, "lr must be a number, got None"),
        ({"distort": "no"}, "distort must be true or false, got 'no'"),
        ({"val": 3}, "val must be text or none, got 3"),
    ],
)
def test_impossible_recipes(changes, message):
    with pytest.raises(RecipeError, match=message):
        Recipe(**changes)


def test_recipes_survive_their_file(tmp_path):
    path = tmp_path / "recipe.json"
    for stages in RECIPES.values():
        recipes.write(path, stages, data=["a"])
        assert recipes.read(path) == (stages, {"data": ["a"]})
        assert recipes.recipes(str(path)) == stages


def test_numbers_of_numpy_become_pythons(tmp_path):
    recipe = Recipe(batch=np.int64(2), lr=np.float32(0.5), crop=tuple(np.array([64, 32])), seconds=None)
    assert recipe == Recipe(batch=2, lr=0.5, crop=(64, 32))
    assert {type(recipe.batch), type(recipe.lr), type(recipe.crop[0])} == {int, float}
    recipes.write(tmp_path / "recipe.json", (recipe,))
    assert recipes.recipes(str(tmp_path / "recipe.json")) == (recipe,)


@pytest.mark.parametrize(
    "text, message",
    [("", "is no recipe"), ("[]", "is no recipe"), ('{"recipe": []}', "no training"), ('{"recipe": [{"sze": 1}]}', "no sze")],
)
def test_files_that_are_no_recipes(tmp_path, text, message):
    (tmp_path / "recipe.json").write_text(text)
    with pytest.raises(RecipeError, match=message):
        recipes.recipes(str(tmp_path / "recipe.json"))


def test_unknown_recipes_are_told_the_known_ones(tmp_path):
    with pytest.raises(RecipeError, match="no recipe 'ade'; there are ade20k, cityscapes"):
        recipes.recipes("ade")
    with pytest.raises(RecipeError, match="absent.json: No such file"):
        recipes.recipes(str(tmp_path / "absent.json"))


def test_table_has_every_training():
    lines = recipes.table().splitlines()
    assert len(lines) == 1 + sum(map(len, RECIPES.values()))
    assert lines[2].split() == [
        "cityscapes", "cityscapes", "train", "1024x1024", "8", "160,000", "windows", "of", "1024x1024,", "stride", "768"
    ]  # fmt: skip


def parsed(*arguments: str) -> dict:
    parser = argparse.ArgumentParser()
    options.add_recipe(parser)
    return vars(parser.parse_args(arguments))


def as_words(value) -> str:
    if isinstance(value, tuple):
        return ("x" if isinstance(value[0], int) else ",").join(map(str, value))
    return "none" if value is None else str(value)


@pytest.mark.parametrize("field", fields(Recipe), ids=lambda field: field.name)
def test_every_field_is_an_option(field):
    examples = {
        "val": None, "encoder": "e.pth", "weights": "w.pth", "iterations": 9000, "seconds": 60.5, "crop": (64, 96),
        "scale": (99, 77), "drop_path": 0.25, "window": (64, 96), "stride": (32, 48), "size": "l", "head": "msca",
        "precision": "bfloat16",
    }  # fmt: skip
    value = examples.get(field.name, field.default)
    flag = f"--{field.name.replace('_', '-')}"
    if isinstance(value, bool):
        given = parsed(flag.replace("--", "--no-") if field.default else flag)
        assert given == {field.name: not field.default}
    else:
        assert parsed(flag, as_words(value)) == {field.name: value}
    assert parsed() == {}


def test_options_replace_fields_of_every_training():
    given = {"batch": 4, "crop": (64, 64), "other": 1}
    stages = options.overridden(RECIPES["pascal-voc"], given)
    assert given == {"other": 1}
    assert stages == tuple(replace(stage, batch=4, crop=(64, 64)) for stage in RECIPES["pascal-voc"])


def test_a_training_by_the_clock_keeps_the_share_of_the_warm_up():
    (stage,) = options.overridden(RECIPES["ade20k"], {"seconds": 60.0})
    assert (stage.iterations, stage.seconds, stage.warmup) == (None, 60.0, 1500 / 160_000)
    assert {**asdict(stage), "iterations": 160_000, "seconds": None, "warmup": 1500} == asdict(RECIPES["ade20k"][0])


def test_a_number_of_steps_takes_the_place_of_the_clock():
    by_the_clock = options.overridden(RECIPES["folder"], {"seconds": 4.0})
    (stage,) = options.overridden(by_the_clock, {"iterations": 4000})
    assert stage == RECIPES["folder"][0]
    with pytest.raises(RecipeError, match="give iterations or seconds, one of them: got 2 and 4.0"):
        options.overridden(RECIPES["folder"], {"iterations": 2, "seconds": 4.0})
