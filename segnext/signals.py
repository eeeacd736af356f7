"""What asks a training to stop, heard between its steps, and by the training alone."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Ctrl-C, and SIGTERM, which batch systems send some time before they kill: within the block the first of them goes into
    the list and does nothing else, the next one stops at once.

    Only the main thread hears signals; elsewhere the list stays empty.
    """
    heard: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield heard
        return
    process = os.getpid()

    def hear(number: int, frame) -> None:
        if os.getpid() == process:
            if heard:
                raise KeyboardInterrupt
            heard.append(number)

    before = {number: signal.signal(number, hear) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield heard
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def ignore_stop_signals(worker: int) -> None:
    """For the ``worker_init_fn`` of a DataLoader: terminals and batch systems send these signals to all processes at once, and
    a training needs its workers to end its step; they end with it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
