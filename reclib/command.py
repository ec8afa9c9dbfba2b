"""What every command of the shell does alike: errors in one line, a quiet end where nobody reads on."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong and where to look."""

    def error(self, message: str) -> NoReturn:
        """Leave with exit code 2."""
        self.exit(2, f"{self.prog}: {message} (--help tells more)\n")


def exit_code(main: Callable[[], int]) -> int:
    """Carry a command out; return its code: 130 interrupted, 141 where nobody reads on (`... | head`)."""
    try:
        try:
            return main()
        finally:
            sys.stdout.flush()  # what a closed pipe refuses is refused here, and not while Python ends
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else it is told once more at the end
        return 128 + signal.SIGPIPE
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
