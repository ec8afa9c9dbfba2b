"""A process that ends with the one that started it, however that one ended.

A killed parent cannot tell its children, so they look: `start_with` gives a child the pid of its parent, and
`hold` in the child interrupts it once it has another. Kernels have such a look of their own (ipykernel's).
"""

from __future__ import annotations

import os
import signal
import threading
import time

_VARIABLE = "RECLIB_PARENT"
PATIENCE = 20.0  # seconds that an interrupted process has to put things away


def start_with() -> dict[str, str]:
    """Return the environment for a child that calls `hold`."""
    return os.environ | {_VARIABLE: str(os.getpid())}


def hold() -> None:
    """Interrupt this process when its parent is gone, and end it if that does not help.

    Does nothing in a process that was not started by `start_with`.
    """
    parent = os.environ.pop(_VARIABLE, None)  # not for our own children, whose parent is another
    if parent is not None:
        threading.Thread(target=_look, args=(int(parent),), daemon=True, name="lifeline").start()


def _look(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(PATIENCE)
    os._exit(1)
