"""gRPC services of a node: each handler decodes, calls one function, encodes."""
