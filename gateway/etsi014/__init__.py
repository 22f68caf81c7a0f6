"""ETSI GS QKD 014 V1.1.1: schema, routes, errors, and the OpenAPI description of what is served."""
