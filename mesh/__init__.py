"""keymesh: the same secret key at two places, with information-theoretic security."""

__version__ = "0.1.0"
