"""What asks a training to stop, heard between its steps, and by the training alone."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Signals:
    """heard: whether one came. at_once: one raises KeyboardInterrupt where it comes, even the first."""

    heard: bool = False
    at_once: bool = False

    @contextmanager
    def stopping_at_once(self) -> Iterator[None]:
        """For what loses nothing by it."""
        self.at_once = True
        try:
            yield
        finally:
            self.at_once = False


@contextmanager
def stop_signals() -> Iterator[Signals]:
    """Ctrl-C, and SIGTERM, which batch systems send some time before they kill: within the block the first of them is heard and
    does nothing else, the next one stops at once.

    Only the main thread hears signals.
    """
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    process = os.getpid()

    def hear(number: int, frame) -> None:
        if os.getpid() == process:
            at_once, signals.heard = signals.heard or signals.at_once, True
            if at_once:
                raise KeyboardInterrupt

    before = {number: signal.signal(number, hear) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def ignore_stop_signals(worker: int) -> None:
    """For the ``worker_init_fn`` of a DataLoader: terminals and batch systems send these signals to all processes at once, and
    a training needs its workers to end its step; they end with it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
