"""The rpcs: each one parses, decides and answers."""
