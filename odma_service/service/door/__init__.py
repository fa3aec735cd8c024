"""Access to the service: callers, their limits, and the handlers that they reach."""
