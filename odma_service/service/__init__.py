"""The gRPC service: pools by name, and the rpcs on them."""
