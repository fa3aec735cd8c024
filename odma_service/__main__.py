"""`odma` and `python -m odma_service`."""

from __future__ import annotations

from odma_service.cli import app


def main() -> None:
    """Run the command that sys.argv asks for, and exit."""
    app(prog_name="odma")


if __name__ == "__main__":
    main()
