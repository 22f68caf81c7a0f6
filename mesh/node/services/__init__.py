"""gRPC services of a node: each method decodes, calls one function, encodes."""
