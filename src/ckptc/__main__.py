"""`ckptc`, and `python -m ckptc`: an interrupt while Python loads what a command needs ends it without a traceback."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from typing import NoReturn


def main() -> NoReturn:
    """Entry point of the `ckptc` command."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _leave)
    from ckptc.cli.main import main as command

    command()


def _leave(number: int, frame: object) -> NoReturn:
    with suppress(OSError):
        os.write(2, b"interrupted\n" if number == signal.SIGINT else f"ended by signal {number}\n".encode())
    os._exit(128 + number)  # nothing has been begun


if __name__ == "__main__":
    main()
