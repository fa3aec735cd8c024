"""Who may come in, how many at once, and how a handler is called."""
