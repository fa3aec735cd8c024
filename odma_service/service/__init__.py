"""The gRPC service: pools by name, and the rpcs that are put to them."""
