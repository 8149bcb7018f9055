"""The numpy backend: runs anywhere, and is the oracle of every kernel test."""
