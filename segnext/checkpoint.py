"""Checkpoint files: what is read from them, in one layout whatever theirs is, and how files are replaced whole."""

from __future__ import annotations

import errno
import json
import os
import pickletools
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from tempfile import TemporaryFile
from typing import Any, BinaryIO
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor

from .errors import SegnextError

WRAPPERS = ("_orig_mod.", "module.", "model.", "net.")  # torch.compile, DistributedDataParallel, somebody's own, in any order
STATES = ("state_dict", "state_dict_ema", "model", "model_ema")  # what a checkpoint calls its tensors, beside other things
TORCH_SUFFIXES, SAFETENSORS_SUFFIX = (".pth", ".pt", ".ckpt", ".tar"), ".safetensors"


class WeightsError(SegnextError, RuntimeError):
    """Weights cannot be had, read, written, or do not fit; the message says why in one sentence."""


def suffix(path: Path) -> str:
    """The path's ending, if it is one that checkpoints have."""
    if path.suffix not in (*TORCH_SUFFIXES, SAFETENSORS_SUFFIX):
        raise WeightsError(f"{path} must end in {', '.join(TORCH_SUFFIXES)} or {SAFETENSORS_SUFFIX}")
    return path.suffix


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a checkpoint under the official names of a whole model, and what the checkpoint says of itself.

    Raises:
        WeightsError: the file cannot be read or holds no named tensors.
        ImportError: safetensors is not installed, and the file is one of its kind.
    """
    reader = _read_safetensors if suffix(path) == SAFETENSORS_SUFFIX else _read_torch
    try:
        checkpoint = reader(path)
    except (ImportError, WeightsError):
        raise
    except Exception as error:  # a damaged file can make the readers raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        reason = "" if isinstance(error, UnicodeDecodeError) else f": {reason}"  # that of a pickle that is none
        raise WeightsError(f"{path} cannot be read, it may be cut short or no checkpoint at all{reason}") from error
    state = None
    if isinstance(checkpoint, dict):
        state = next((checkpoint[name] for name in STATES if isinstance(checkpoint.get(name), dict)), checkpoint)
        state.pop("n_averaged", None)  # of torch's AveragedModel
    if not state or not isinstance(state, dict) or not all(map(_is_named_tensor, state.items())):
        raise WeightsError(f"{path} holds no state_dict of named tensors, as torch.save(model.state_dict(), file) writes it")
    meta = checkpoint.get("meta")
    return official(state), meta if isinstance(meta, dict) else {}


def _is_named_tensor(item: tuple[Any, Any]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], Tensor)


def official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state under the official names of a whole model.

    mmsegmentation's depthwise convolutions sit one level higher; an encoder's checkpoint may lack the prefix and carry a
    classifier ``head.*``, which stays beside the encoder. A second head, which helped in training, is left out, and counters of
    batch norms that are not there, as PyTorch wrote them before it counted, are zero.
    """
    while (prefix := next(iter(state)).partition(".")[0] + ".") in WRAPPERS and all(key.startswith(prefix) for key in state):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    state = {re.sub(r"\.mlp\.dwconv\.(weight|bias)$", r".mlp.dwconv.dwconv.\1", key): value for key, value in state.items()}
    if any(key.startswith("decode_head.") for key in state):
        state = {key: value for key, value in state.items() if not key.startswith("auxiliary_head.")}
        counters = {key.removesuffix("running_var") + "num_batches_tracked" for key in state if key.endswith(".running_var")}
        return {**dict.fromkeys(counters, torch.zeros((), dtype=torch.int64)), **state}
    encoder = {key.removeprefix("backbone."): value for key, value in state.items()}
    return {key if key.startswith("head.") else f"backbone.{key}": value for key, value in encoder.items()}


def plain(value: Any) -> Any:
    """What a checkpoint may hold of a number, or of those in a tuple: Python's own where they are NumPy's."""
    if isinstance(value, tuple):
        return tuple(map(plain, value))
    return value.item() if isinstance(value, np.generic) else value


def check_folder(folder: Path) -> None:
    """Makes a folder that files are to come into, and raises an OSError where nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from error
    try:
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error


def check_file(path: Path) -> None:
    """As :func:`check_folder`, for the folder that :func:`replacing` will write a file into."""
    if not _is_stream(path):
        check_folder(Path(os.path.realpath(path)).parent)


def _is_stream(path: Path) -> bool:
    """Whether there is a pipe or device, which is written as it is."""
    return path.exists() and not path.is_file() and not path.is_dir()


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the path's place once it is complete; if the block fails, nothing is left of it.

    The place is where a link leads to; a pipe or device is written as it is.
    """
    if _is_stream(path):
        with path.open("wb") as file:
            yield file
        return
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name[:40]}.{uuid4().hex}")  # no longer than file systems allow
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the new name with nothing in it
        os.replace(temporary, path)
    except OSError as error:
        full = error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT)  # writing does not say where
        if error.filename != str(temporary) and not full:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """As :func:`replacing`, for a checkpoint, whose folder is made if it isn't there.

    Raises:
        WeightsError: it cannot be written.
    """
    try:
        check_file(path)
        with replacing(path) as file:
            yield file
    except (OSError, RuntimeError) as error:  # torch tells of a full disk in its own way
        raise WeightsError(f"cannot write {path}: {_cause(error)}") from error


def _cause(error: BaseException) -> str:
    """The system's reason, if there is one behind the error."""
    while not isinstance(error, OSError) and (error.__cause__ or error.__context__) is not None:
        error = error.__cause__ or error.__context__
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        meta = (file.metadata() or {}).get("meta", "{}")
        return {"state_dict": {key: file.get_tensor(key) for key in file.keys()}, "meta": json.loads(meta)}  # noqa: SIM118


class _Inert:
    """Stands in for every class and function of a checkpoint that torch does not know to be safe: takes all, does nothing.

    mmengine stores its training history beside the weights, as objects of its own and NumPy's; nobody here needs them.
    """

    def __init__(self, *args) -> None: ...

    def __setstate__(self, state) -> None: ...


def _read_torch(path: Path) -> Any:
    names = _unsafe_globals(path)
    try:
        with torch.serialization.safe_globals([(_Inert, name) for name in names]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        if not names:
            raise
        raise WeightsError(f"{path} cannot be read safely (weights_only) because of {', '.join(names)} in it") from error


def _unsafe_globals(path: Path) -> list[str]:
    """The classes and functions that the checkpoint's pickle names, found without running it."""
    if zipfile.is_zipfile(path):
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    with path.open("rb") as file:  # the format before torch 1.6: four pickles (magic, version, system, checkpoint)
        opcodes = [opcode for _ in range(4) for opcode in pickletools.genops(file)]
    return [argument.replace(" ", ".") for opcode, argument, _ in opcodes if opcode.name == "GLOBAL"]
