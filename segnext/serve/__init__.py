"""A page on this machine to try a model with."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path

import uvicorn

from ..predict import InputError
from .app import create_app
from .session import Session

HOST = "127.0.0.1"


class Server(uvicorn.Server):
    """Prints its address once it answers, and heeds signals."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(f"http://{HOST}:{sockets[0].getsockname()[1]} (Ctrl-C ends it)", flush=True)


def serve(
    weights: str | Path,
    port: int = 8000,
    *,
    rank: int | None = None,
    short_side: int | None = None,
    device: str = "cpu",
    megabytes: int = 20,
) -> None:
    """Serves the page to this machine alone, until it is interrupted.

    Args:
        weights: what :func:`segnext.load` takes, of a model for photographs with at most 256 classes.
        port: 0 for any that is free. The address is printed.
        rank: of the decomposition, in place of what the checkpoint says.
        short_side: see :func:`segnext.predict.segment`; None for what the checkpoint was trained on. Photographs with more than
            2048 pixels on their longer side count as shrunk to these.
        megabytes: larger files are refused.

    Raises:
        InputError: the port cannot be had, or the model is not for photographs.
        WeightsError: from :func:`segnext.load`.
    """
    with _listen(port) as listener:
        app = create_app(Session(weights, rank=rank, short_side=short_side, device=device), megabytes * 10**6)
        config = uvicorn.Config(app, log_level="warning", server_header=False, timeout_graceful_shutdown=3)  # of uploads
        with suppress(KeyboardInterrupt):  # raised again by uvicorn at its end, if SIGINT was not ignored before
            Server(config).run(sockets=[listener])
        print("ended")


def _listen(port: int) -> socket.socket:
    try:
        return socket.create_server((HOST, port))
    except (OSError, OverflowError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) else "ports end at 65535"
        raise InputError(f"port {port} cannot be used: {reason}; --port names another, 0 any that is free") from error
