"""What mmsegmentation's configuration, whose text its checkpoints carry, says of a model and of how it is tested."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .heads import GROUPS
from .model import MEAN, STD

MOST = 1024  # rank and updates that are believed
RESIZE_TO_MULTIPLE = ("AlignResize", "ResizeToMultiple")
CONSTANTS = {"true": True, "false": False}  # as JSON writes them


@dataclass(frozen=True)
class Described:
    """What the text says, as far as it does.

    Attributes:
        config: fields of :class:`segnext.model.Config` that no tensor shows.
        shown: how evaluation shows pictures, as models have it.
        threshold: of the probability from which on a pixel is of the second class, in a model with one output for two.
        other: what this package's models do otherwise, None where it is nothing.
    """

    config: dict[str, Any] = field(default_factory=dict)
    shown: dict[str, Any] = field(default_factory=dict)
    threshold: float = 0.3
    other: str | None = None


def described(meta: Mapping[str, Any]) -> Described:
    """Reads the configuration in a checkpoint's record; nothing of it is run."""
    text = f"{meta.get('cfg')}\n{meta.get('config')}"
    values = _values(text)
    head, ham = (_dict(_find(values, name)) for name in ("decode_head", "ham_kwargs"))
    config = {"rank": _rank(text, values, head), "eval_steps": ham.get("eval_steps", ham.get("EVAL_STEPS"))}
    config = {name: value for name, value in config.items() if isinstance(value, int) and value > 0}
    threshold = head.get("threshold")
    return Described(
        config,
        _shown(values),
        threshold if isinstance(threshold, float) and 0 < threshold < 1 else 0.3,
        next((f"{name} is {value}" for name, value in _unlike(values, head, ham, config)), None),
    )


def _rank(text: str, values: Mapping[str, Any], head: Mapping[str, Any]) -> Any:
    rank = _find(values, "MD_R")
    if rank is None and (found := re.search(r"MD_R['\"]?\s*[=:]\s*(\d{1,9})\b", text)):  # in what could not be parsed
        rank = int(found[1])
    return 64 if rank is None and _kind(head) == "LightHamHead" else rank  # what that head has by default


def _unlike(
    values: Mapping[str, Any], head: Mapping[str, Any], ham: Mapping[str, Any], config: Mapping[str, int]
) -> Iterator[tuple[str, Any]]:
    """Settings that change what a model answers, where their value is not the one that they have here."""
    yield from ((name, value) for name, value in config.items() if value > MOST)
    if head.get("align_corners"):
        yield "align_corners", True
    for name, known in (("MD_S", 1), ("rand_init", True), ("spatial", True)):
        value = ham.get(name, ham.get(name.upper(), known))
        if value != known:
            yield name, value
    if (groups := _find(head, "num_groups") or GROUPS) != GROUPS:
        yield "num_groups", groups
    norm = _dict(_find(values.get("model", {}), "data_preprocessor")) or _dict(values.get("img_norm_cfg"))
    for name, known in (("mean", MEAN), ("std", STD)):
        value = norm.get(name)
        if isinstance(value, list) and value != [round(255 * one, 3) for one in known]:
            yield f"{name} of the images", value
    for name in ("bgr_to_rgb", "to_rgb"):
        if norm.get(name) is False:
            yield name, False


def _shown(values: Mapping[str, Any]) -> dict[str, Any]:
    """Scale, multiple, window and stride of the test pipeline and of test_cfg."""
    tests = values.get("test_dataloader"), _dict(values.get("data")).get("test")
    pipeline = next(filter(None, (_find(one, "pipeline") for one in tests)), None) or values.get("test_pipeline")
    test, shown = _dict(_find(values.get("model", values), "test_cfg")), {}
    for transform in _dicts(pipeline):
        kind = _kind(transform)
        scale, keeps = transform.get("scale"), transform.get("keep_ratio")
        if kind == "MultiScaleFlipAug":  # of 0.x, where resizing keeps the ratio unless it is told otherwise
            inside = [one for one in _dicts(transform.get("transforms")) if _kind(one) in ("Resize", "AlignResize")]
            scale, keeps = transform.get("img_scale"), bool(inside) and inside[0].get("keep_ratio") is not False
        if kind in ("MultiScaleFlipAug", "Resize") and _is_pair(scale) and keeps is True:
            shown["scale"] = (max(scale), min(scale))
        if kind in RESIZE_TO_MULTIPLE:
            divisor = transform.get("size_divisor", 32)
            shown["multiple"] = divisor if _is_size(divisor) else 32
    window, stride = test.get("crop_size"), test.get("stride")
    covers = _is_pair(window) and _is_pair(stride) and all(step <= side for step, side in zip(stride, window, strict=True))
    if test.get("mode") == "slide" and covers:
        shown |= {"window": tuple(window), "stride": tuple(stride)}
    return shown


def _values(text: str) -> dict[str, Any]:
    """The variables of a configuration in Python, or what a dictionary in JSON holds; what cannot be parsed is left out."""
    found: dict[str, Any] = {}
    for part in re.split(r"^(?=\w+\s*=|\{)", text, flags=re.MULTILINE):
        for statement in _parsed(part) or _parsed(part.replace("\\", "\\\\")):  # mmcv does not escape what is in strings
            value = _value(statement.value) if isinstance(statement, (ast.Assign, ast.Expr)) else None
            if isinstance(statement, ast.Assign):
                found |= {target.id: value for target in statement.targets if isinstance(target, ast.Name)}
            else:
                found |= _dict(value)
    return found


def _parsed(text: str) -> list[ast.stmt]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that there are none of
            return ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []


def _value(node: ast.expr) -> Any:
    """A number, text, list or dictionary; None for what is none of these."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(element) for element in node.elts]
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return {key.value: _value(value) for key, value in pairs if isinstance(key, ast.Constant)}
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        return {word.arg: _value(word.value) for word in node.keywords if word.arg is not None}
    return CONSTANTS.get(node.id) if isinstance(node, ast.Name) else None


def _dicts(value: Any) -> Iterator[dict]:
    """All dictionaries in a nest, the outer ones first."""
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    for one in value if isinstance(value, list) else ():
        yield from _dicts(one)


def _find(value: Any, name: str) -> Any:
    """What stands first under a name in a nest; None where nothing does."""
    return next((one[name] for one in _dicts(value) if name in one), None)


def _kind(setting: Mapping[str, Any]) -> str:
    """The class that a setting is of, without its package."""
    return str(setting.get("type")).rpartition(".")[2]


def _dict(value: Any) -> dict:
    return value if isinstance(value, dict) else {}


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 16


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_size, value))
