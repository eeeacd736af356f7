"""Docstrings as Markdown: they are written to be read in a terminal."""

from __future__ import annotations

import re
from pathlib import Path

import griffe

ROOT = Path(__file__).parents[1]
ROLE = re.compile(r":(?:func|class|meth|data):`([\w.]+)`")


class Docstrings(griffe.Extension):
    """Turns ``::`` before code into a colon, one-line sections into paragraphs, and roles into links where they lead."""

    def on_object(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring is None:
            return
        text = re.sub(r"::$", ":", obj.docstring.value, flags=re.MULTILINE)
        text = re.sub(r"^(Shape|Source): ", r"\n**\1:** ", text, flags=re.MULTILINE)
        obj.docstring.value = ROLE.sub(lambda role: _link(role[1], obj), text)


def _link(name: str, obj: griffe.Object) -> str:
    path = name if "." in name else f"{obj.module.path}.{name}"
    module = ROOT / path.replace(".", "/")
    if module.is_dir() or module.with_suffix(".py").exists():  # segnext_kernels.nmf is a function, and its package too
        path += f".{path.rpartition('.')[2]}"
    return f'<autoref identifier="{path}" optional>`{name}`</autoref>'
