"""ODMA: memory management for KV caches that must stay contiguous."""

__version__ = "0.1.0"
