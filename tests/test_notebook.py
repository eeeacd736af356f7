"""The notebook examples/quickstart.ipynb: it runs, what it shows is right, and it is stored as it ran."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import nbformat
import numpy as np
import pytest
import quickstart
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook

PICTURES = ("train", "predict", "gradcam")  # the cells that show one


def code(read: NotebookNode) -> dict[str, NotebookNode]:
    """The code cells by their ids, which say what they are about."""
    return {cell.id: cell for cell in read.cells if cell.cell_type == "code"}


def kinds(cell: NotebookNode) -> list[tuple[str, bool]]:
    """What kinds of outputs there are, and which are pictures; not warnings, which depend on the machine."""
    return [(o.output_type, "image/png" in o.get("data", {})) for o in cell.outputs if o.get("name") != "stderr"]


def ruff(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ruff", *map(str, arguments)]
    return subprocess.run(command, cwd=quickstart.ROOT, capture_output=True, text=True)


def numbers(pattern: str, text: str) -> list[float]:
    return [float(number) for number in re.findall(pattern, text)]


@pytest.fixture(scope="module")
def stored() -> NotebookNode:
    return quickstart.read()


@pytest.fixture(scope="module")
def executed(stored, tmp_path_factory) -> dict[str, NotebookNode]:
    folder = tmp_path_factory.mktemp("notebook")
    try:
        cells = code(quickstart.execute(stored, folder))
    except CellExecutionError as error:
        pytest.fail(str(error), pytrace=False)
    assert [path.name for path in folder.iterdir()] == ["quickstart.pth"]
    return cells


@pytest.mark.parametrize("cell", ["compare", "patch"])
def test_operators_do_what_plain_pytorch_does(executed, cell):
    text = quickstart.printed(executed[cell])
    differences = numbers(r"(?:output differs|gradient) by (\S+),", text)
    assert len(differences) == {"compare": 4, "patch": 2}[cell]
    assert max(differences) < 1e-4, text


def test_explain_names_who_serves(executed):
    assert re.search(r"^\w+: serves$", quickstart.printed(executed["explain"]), re.MULTILINE)
    assert "'isa'" in executed["explain"].outputs[-1].data["text/plain"]


def test_fused_models_give_the_same_logits(executed):
    text = quickstart.printed(executed["model"])
    assert "logits [1, 19, 32, 32], labels [1, 256, 256]" in text
    float32, bfloat16 = numbers(r"logits differ by (\S+),", text)
    assert float32 < 1e-4 and bfloat16 < 0.05, text


def test_training_beats_chance(executed):
    text = quickstart.printed(executed["evaluate"])
    ((miou, accuracy),) = re.findall(r"mIoU (\S+), pixel accuracy (\S+)", text)
    (chance,) = numbers(r"always the most frequent class: (\S+)\)", text)
    assert 0.1 < chance < float(accuracy) - 0.25, text
    assert float(miou) > 0.2, text  # one class everywhere gives less than 0.1


@pytest.mark.parametrize("cell", PICTURES)
def test_shows_a_picture(executed, cell):
    (picture,) = quickstart.pictures(executed[cell])
    assert min(picture.size) >= 150
    assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 20


def test_patch_swaps_three_and_leaves_one(executed):
    text = quickstart.printed(executed["patch"])
    assert "swapped: 3\n" in text and "left alone: 1\n" in text
    assert "mlp2: act is GELU by tanh" in text


def test_saved_model_is_the_same(executed):
    assert quickstart.printed(executed["save"]) == "the same labels: True\n"


def test_stored_as_it_runs(stored, executed):
    for name, cell in code(stored).items():
        assert kinds(cell) == kinds(executed[name]), f"{name} is stored otherwise than it runs: python tests/quickstart.py"


def test_stored_form(stored):
    nbformat.validate(stored)
    cells = code(stored)
    assert [cell.execution_count for cell in cells.values()] == list(range(1, len(cells) + 1))
    assert [name for name, cell in cells.items() if quickstart.pictures(cell)] == list(PICTURES)
    assert not any(cell.metadata for cell in stored.cells)
    outputs = [output for cell in cells.values() for output in cell.outputs]
    assert not [output.text for output in outputs if output.get("name") == "stderr"]
    assert not re.search(r"[\"' ]/\w+/|site-packages|Warning", json.dumps(outputs)), "a path or a warning is in the outputs"
    assert quickstart.PATH.stat().st_size < 300_000


def test_linters_look_at_it():
    pytest.importorskip("ruff", reason="make lint brings ruff")
    listed = ruff("check", "--show-files", ".").stdout.splitlines()
    assert str(quickstart.PATH) in listed
    for command in (("check",), ("format", "--check")):
        done = ruff(*command, quickstart.PATH)
        assert done.returncode == 0, done.stdout + done.stderr


def test_an_error_is_told(tmp_path):
    broken = new_notebook(cells=[new_code_cell("print(1)"), new_code_cell("known = 1\nknown.unknown")])
    with pytest.raises(CellExecutionError, match=r"(?s)known\.unknown.*AttributeError.*no attribute 'unknown'"):
        quickstart.execute(broken, tmp_path)
