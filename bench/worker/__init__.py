"""Measure the tokens/s of workers, direct and through the queen, against llama-cpp-python's own server."""
