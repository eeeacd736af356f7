"""Hosted weights by name: fetched once, their hash checked, kept in torch.hub's folder."""

from __future__ import annotations

import hashlib
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO
from urllib.request import urlopen

import torch
from torch.hub import tqdm  # shows less where tqdm is not installed

from .checkpoint import WeightsError, replacing

TIMEOUT = 30  # seconds without a byte
CHUNK = 1 << 20

_SITE = "https://download.openmmlab.com/mmsegmentation/v0.5"


def _ade20k(size: str, suffix: str) -> str:
    run = f"segnext_mscan-{size}_1x16_512x512_adamw_160k_ade20k"
    return f"{_SITE}/segnext/{run}/{run}_{suffix}.pth"


# Name -> address; every file's name ends in the first digits of its SHA-256.
HOSTED = {
    "ade20k-t": _ade20k("t", "20230210_140244-05bd8466"),
    "ade20k-s": _ade20k("s", "20230214_113014-43013668"),
    "ade20k-b": _ade20k("b", "20230209_172053-b6f6c70c"),
    "ade20k-l": _ade20k("l", "20230209_172055-19b14b63"),
    "imagenet-t": f"{_SITE}/pretrain/segnext/mscan_t_20230227-119e8c9f.pth",
    "imagenet-s": f"{_SITE}/pretrain/segnext/mscan_s_20230227-f33ccdf2.pth",
    "imagenet-b": f"{_SITE}/pretrain/segnext/mscan_b_20230227-3ab7d230.pth",
    "imagenet-l": f"{_SITE}/pretrain/segnext/mscan_l_20230227-cef260d4.pth",
}


def fetch(name: str) -> Path:
    """The local file of hosted weights, downloaded unless a complete copy is there already.

    Raises:
        WeightsError: no network, an incomplete download or a wrong hash; the folder is left as it was, without a bad copy.
    """
    url = HOSTED[name]
    path = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[1])
    expected = path.stem.rsplit("-", 1)[1]
    try:
        if path.exists() and _sha256(path).startswith(expected):
            return path
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            digest = _download(url, file)
            if not digest.startswith(expected):
                raise WeightsError(f"{url} has the wrong content: its SHA-256 begins with {digest[:8]}, not {expected}")
    except (OSError, HTTPException) as error:
        raise WeightsError(f"cannot fetch {url}: {error}. A copy that is there already is taken from {path}") from error
    return path


def _download(url: str, file: BinaryIO) -> str:
    """Streams the address into the file and returns the SHA-256 of what came."""
    digest = hashlib.sha256()
    with urlopen(url, timeout=TIMEOUT) as response:
        size = response.headers.get("Content-Length")
        name, total = url.rsplit("/", 1)[1], size and int(size)
        with tqdm(desc=name, total=total, unit="B", unit_scale=True, leave=False) as progress:
            while chunk := response.read(CHUNK):
                file.write(chunk)
                digest.update(chunk)
                progress.update(len(chunk))
    if total is not None and file.tell() != total:
        raise WeightsError(f"cannot fetch {url}: the download ended after {file.tell()} of {total} bytes")
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
