"""The device half: opens an installed package and runs it. Never imports torch or the host half."""

__version__ = "0.1.0"
