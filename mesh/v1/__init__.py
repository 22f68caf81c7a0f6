"""Generated from protos/mesh/v1; never edited. ``make generate`` rewrites it."""
