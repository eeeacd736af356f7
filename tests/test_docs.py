"""The documentation: it builds, names everything that is public, and its command lines and links are those of today."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch.distributed.run
from PIL import Image
from torch import nn

import bench.__main__
import segnext
import segnext.cli
import segnext_kernels
from segnext.cli.options import overridden
from segnext.data import DATASETS
from segnext.recipes import RecipeError, recipes

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "csrc/cuda/README.md", ROOT / "bench/NOTES.md"]
PAGES += sorted([*(ROOT / "bench/notes").glob("*.md"), *(ROOT / "docs").glob("*.md")])
PUBLIC = {
    "operators.html": [
        *(f"segnext_kernels.{name}" for name in segnext_kernels.__all__),
        *(
            f"segnext_kernels.nn.{name}"
            for name, value in vars(segnext_kernels.nn).items()
            if isinstance(value, type) and issubclass(value, nn.Module) and value.__module__ == "segnext_kernels.nn"
        ),
    ],
    "models.html": [f"segnext.{name}" for name in segnext.__all__],
}
SNIPPETS = {
    "README.md": 4,
    "docs/gpu.md": 1,
    "docs/index.md": 1,
    "docs/models.md": 1,
    "docs/operators.md": 2,
    "docs/training.md": 2,
}
OF_TORCHRUN = {"--nnodes", "--rdzv-endpoint"}

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


@pytest.mark.parametrize(("page", "name"), [(page, name) for page, names in PUBLIC.items() for name in names])
def test_public_names_are_documented(site, page, name):
    first, last = name.rsplit(".", 1)
    heading = rf'id="{re.escape(first)}(\.\w+)?\.{last}" class="doc doc-heading"'  # a module may lie between them
    assert re.search(heading, (site / page).read_text())


def test_docstrings_become_markdown(site):
    for page in PUBLIC:
        assert not re.search(r":(func|class|meth|data):|::</p>", (site / page).read_text())
    written = [name for name in segnext_kernels.__all__ if "Equivalent to::" in getattr(segnext_kernels, name).__doc__]
    blocks = re.findall(r'<p>Equivalent to:</p>\s*<div class="highlight">', (site / "operators.html").read_text())
    assert len(blocks) == len(written) > 10


def test_the_site_loads_nothing_from_elsewhere(site):
    for page in site.rglob("*.html"):
        loaded = re.findall(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=\"?(https?://[^\s\">]+)", page.read_text())
        assert not loaded, page


def code(page: Path) -> tuple[list[str], list[str]]:
    """The lines of a page's blocks of code, and its other pieces of code."""
    text = page.read_text()
    fenced = re.compile(r"^```.*?\n(.*?)^```", re.MULTILINE | re.DOTALL)
    blocks = [line for block in fenced.findall(text) for line in block.splitlines()]
    text = fenced.sub("", text)
    blocks += re.findall(r"^ {4}(?![-*\d ])(.+)", text, re.MULTILINE)
    return blocks, re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)


def commands(line: str) -> Iterator[list[str]]:
    """The words of the commands in a line of a shell, comments and what stands for more left out."""
    words: list[str] = []
    for word in shlex.split(line, comments=True):
        words += [kept] if (kept := word.removesuffix(";").removesuffix("...")) else []
        if word.endswith(";"):
            yield words
            words = []
    yield words


def parse(words: list[str], relaxed: bool) -> bool:
    """Parses a command of this project, else returns False."""
    if words[:1] == ["torchrun"]:
        torchrun = torch.distributed.run.get_args_parser().parse_args(words[1:])
        words = [torchrun.training_script, *torchrun.training_script_args] if torchrun.module else []
    if words[:1] == ["segnext"]:
        parser, words = segnext.cli._parser(), words[1:]
        words = ["cpu" if before == "--device" else word for before, word in zip(["", *words], words, strict=False)]
    elif words[:3] == ["python", "-m", "bench"]:
        parser, words = bench.__main__._parser(), words[3:]
    else:
        return False
    adapt(parser, relaxed)
    check_names(vars(parser.parse_args(words)))
    return True


def adapt(parser: argparse.ArgumentParser, relaxed: bool) -> None:
    """Forbids shortened options. ``relaxed``: anything may be left out, since in a sentence a command is only named."""
    parser.allow_abbrev = False
    for action in parser._actions:
        if relaxed:
            action.required = False
            if not action.option_strings and action.nargs in (None, "+"):
                action.nargs = "?" if action.nargs is None else "*"
        for child in subparsers(action):
            adapt(child, relaxed)


def check_names(given: dict[str, object]) -> None:
    """The names that are looked up only when a command runs, and the values of a recipe's fields."""
    recipe = given.get("recipe")
    if recipe is not None and not recipe.endswith(".json"):
        fields = {name: value for name, value in given.items() if not isinstance(value, list)}  # table2 has several weights
        overridden(recipes(recipe), fields)
    dataset = given.get("dataset", "folder")
    assert dataset in DATASETS or dataset == "NAME", f"there is no data set {dataset}"


def subparsers(action: argparse.Action) -> Iterator[argparse.ArgumentParser]:
    if isinstance(action, argparse._SubParsersAction):
        yield from action.choices.values()


def options(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        yield from action.option_strings
        for child in subparsers(action):
            yield from options(child)


@pages
def test_command_lines_parse(page, capsys):
    blocks, spans = code(page)
    found = 0
    for line, relaxed in [*((line, False) for line in blocks), *((span, True) for span in spans)]:
        if not re.match(r"(segnext|torchrun|python -m bench)\b(?![./\-])", line):
            continue
        for words in commands(line):
            try:
                found += parse(words, relaxed)
            except (SystemExit, RecipeError, AssertionError) as error:
                pytest.fail(f"{page.name}: {line}\n{error}\n{capsys.readouterr().err}")
    if page.name in ("gpu.md", "reproducing.md", "training.md", "NOTES.md") or page == ROOT / "README.md":
        assert found > 5  # or the search is broken


def given() -> dict[str, object]:
    """What the snippets leave to the reader."""
    x, images = torch.rand(1, 4, 8, 8), torch.randn(2, 3, 64, 64)
    labels = torch.randint(19, (2, 64, 64))
    return {
        "torch": torch,
        "segnext": segnext,
        "sk": segnext_kernels,
        "x": x,
        "conv": nn.Conv2d(4, 8, 3),
        "y": torch.rand_like(x),
        "weights": segnext_kernels.nn.AttentionModule(4).strip_weights(),
        "weight": torch.rand(4, 1, 3, 3),
        "bias": torch.rand(4),
        "scale": torch.rand(4),
        "keep": None,
        "bases": torch.rand(1, 4, 3),
        "logits": torch.rand(2, 19, 8, 8),
        "target": labels,
        "images": images,
        "loader": [(images, labels)],
        "model": segnext.create("t"),
        "train": lambda model: model(images).sum().backward(),
    }


@pages
def test_snippets_run(page, tmp_path, monkeypatch):
    """Of Python, in a folder of their own; hosted weights are stood in for by random ones. docs/gpu.md's needs a GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(segnext, "load", lambda name: segnext.create(name[-1]).eval())
    monkeypatch.setattr(segnext, "load_encoder", lambda model, name: None)
    Image.new("RGB", (64, 48)).save("photo.jpg")
    snippets = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert len(snippets) == SNIPPETS.get(str(page.relative_to(ROOT)), 0)
    names = given() if snippets else {}
    for snippet in snippets if page.name != "gpu.md" or torch.cuda.is_available() else []:
        exec(snippet.replace("[...]", "[]"), names)


@pages
def test_options_and_targets_exist(page):
    known = {*options(segnext.cli._parser()), *options(bench.__main__._parser()), *OF_TORCHRUN}
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    blocks, spans = code(page)
    for piece in [*blocks, *spans]:
        if piece.startswith("--"):
            assert piece.split()[0] in known, piece
        if target := re.match(r"make ([\w-]+)", piece):
            assert target[1] in targets, piece


@pages
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path = target.split("#")[0]
        if path and not target.startswith(("https://", "http://")):
            assert (page.parent / path).is_file(), target


def test_drawings_are_shown_and_described():
    shown = dict(re.findall(r"!\[([^\]]{20,})\]\(drawings/([\w.]+)\)", (ROOT / "docs/kernels.md").read_text()))
    files = sorted((ROOT / "docs/drawings").iterdir())
    assert sorted(shown.values()) == [file.name for file in files]
    for file in files:
        assert ElementTree.parse(file).getroot().tag.endswith("svg")
