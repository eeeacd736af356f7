"""Runs the notebook, and stores its outputs: ``python tests/quickstart.py``."""

from __future__ import annotations

import base64
import io
import os
import tempfile
from pathlib import Path

import nbformat
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

ROOT = Path(__file__).parents[1]
PATH = ROOT / "examples" / "quickstart.ipynb"
CELL_SECONDS = 600  # after which a cell hangs


def read() -> NotebookNode:
    return nbformat.read(PATH, as_version=4)


def execute(notebook: NotebookNode, folder: Path) -> NotebookNode:
    """Runs a copy in a kernel of this Python, on this working tree; a CellExecutionError shows the cell and what it raised.

    Args:
        folder: what the notebook runs in.
    """
    executed = nbformat.from_dict(notebook)
    # Without folders to look for kernels in, there is only the one of this Python, whatever the user has registered.
    specs = KernelSpecManager(kernel_dirs=[])
    manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=specs)
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryDirectory() as settings:  # in place of the user's, which may run code at start
        client = NotebookClient(executed, km=manager, timeout=CELL_SECONDS, record_timing=False, coalesce_streams=True)
        client.extra_arguments = ["--log-level=ERROR"]
        # torchmetrics imports transformers where that is installed, which then misses ipywidgets.
        variables = {"PYTHONPATH": paths, "IPYTHONDIR": settings, "PYTHONWARNINGS": "ignore:IProgress"}
        client.execute(cwd=str(folder), env=os.environ | variables, cleanup_kc=True)  # a given manager is left running
    return executed


def pictures(cell: NotebookNode) -> list[Image.Image]:
    return [
        Image.open(io.BytesIO(base64.b64decode(o.data["image/png"]))) for o in cell.outputs if "image/png" in o.get("data", {})
    ]


def printed(cell: NotebookNode) -> str:
    return "".join(output.text for output in cell.outputs if output.get("name") == "stdout")


def store(notebook: NotebookNode) -> None:
    """Writes an executed notebook with smaller pictures and without what depends on where it ran."""
    notebook.metadata.language_info = {"name": "python"}
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.data = {"image/png": _reduced(output.data["image/png"])}
                output.metadata = {}
    nbformat.write(notebook, PATH)


def _reduced(picture: str) -> str:
    image = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    file = io.BytesIO()
    # The pictures' noise takes much room in full colour. Of PIL's methods this one keeps the legend's colours best.
    image.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        store(execute(read(), Path(folder)))
