"""`python -m odma_service` is `odma`."""

from odma_service.cli import main

if __name__ == "__main__":
    main()
