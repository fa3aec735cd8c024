"""Processes are killed at work, and what is left is compared with what was acknowledged."""
