"""A page in a browser: pools as maps of memory, live. See `odma web`."""

from odma_service.web.app import application

__all__ = ["application"]
