"""`odma` and `python -m odma_service`."""

from __future__ import annotations

import os

from odma_service.cli import app

STDERR = 2


def main() -> None:
    """Run the command that sys.argv asks for, and exit."""
    _take_standard_numbers()
    app(prog_name="odma")


def _take_standard_numbers() -> None:
    """Let no file of ours have the number of a closed stdout or stderr: libraries write there."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= STDERR:
        pass
    os.close(descriptor)


if __name__ == "__main__":
    main()
