"""Backends run the steps the engine plans: `reference` in numpy, `cuda` through pycuda."""
