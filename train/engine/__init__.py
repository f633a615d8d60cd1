"""The training loop and everything that survives it."""
