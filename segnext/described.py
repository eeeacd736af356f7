"""What mmsegmentation's configuration, whose text its checkpoints carry, says of a model and of how it is tested."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

RESIZE_TO_MULTIPLE = {"AlignResize": 32, "ResizeToMultiple": 32}  # transforms, and the divisor that they have by default
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
    values = _values(str(meta.get("cfg"))) | _values(str(meta.get("config")))
    head, ham = (_dict(_find(values, name)) for name in ("decode_head", "ham_kwargs"))
    steps = ham.get("eval_steps", ham.get("EVAL_STEPS"))
    config = {"rank": _find(values, "MD_R"), "eval_steps": steps}
    threshold = head.get("threshold")
    return Described(
        {name: value for name, value in config.items() if _is_count(value)},
        _shown(values),
        threshold if isinstance(threshold, float) and 0 < threshold < 1 else 0.3,
        next((f"{name} is {value}" for name, value, known in _unlike(head, ham) if value != known), None),
    )


def _unlike(head: Mapping[str, Any], ham: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Settings that change what a model answers, and the value that they have here."""
    yield "align_corners", head.get("align_corners") or False, False
    for name, known in (("MD_S", 1), ("rand_init", True), ("spatial", True)):
        yield name, ham.get(name, known), known


def _shown(values: Mapping[str, Any]) -> dict[str, Any]:
    """Scale, multiple, window and stride of the test pipeline and of test_cfg."""
    pipeline = values.get("test_pipeline") or _find([values.get("test_dataloader"), values.get("data")], "pipeline")
    test, shown = _dict(_find(values.get("model", values), "test_cfg")), {}
    scale = _find(pipeline, "img_scale") or _find(pipeline, "scale")
    if _is_pair(scale) and _find(pipeline, "keep_ratio") is not False:
        shown["scale"] = (max(scale), min(scale))
    for transform in _dicts(pipeline):
        if (divisor := RESIZE_TO_MULTIPLE.get(transform.get("type"))) is not None:
            given = transform.get("size_divisor", divisor)
            shown["multiple"] = given if _is_count(given) else divisor
    window, stride = test.get("crop_size"), test.get("stride")
    if test.get("mode") == "slide" and _is_pair(window) and _is_pair(stride):
        shown |= {"window": tuple(window), "stride": tuple(stride)}
    return shown


def _values(text: str) -> dict[str, Any]:
    """The variables of a configuration in Python, or what a dictionary in JSON holds; {} of other texts."""
    try:
        statements = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    found: dict[str, Any] = {}
    for statement in statements:
        if isinstance(statement, ast.Assign):
            value = _value(statement.value)
            found |= {target.id: value for target in statement.targets if isinstance(target, ast.Name)}
        elif isinstance(statement, ast.Expr):
            found |= _dict(_value(statement.value))
    return found


def _value(node: ast.expr) -> Any:
    """A number, text, list or dictionary; None for what is none of these."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(element) for element in node.elts]
    if isinstance(node, ast.Dict):
        return {_value(key): _value(value) for key, value in zip(node.keys, node.values, strict=True) if _is_key(key)}
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        return {word.arg: _value(word.value) for word in node.keywords if word.arg is not None}
    return CONSTANTS.get(node.id) if isinstance(node, ast.Name) else None


def _is_key(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant)


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


def _dict(value: Any) -> dict:
    return value if isinstance(value, dict) else {}


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_pair(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(map(_is_count, value))
