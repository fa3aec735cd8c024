"""What proves and measures ODMA. It needs a source tree and is in no package."""
