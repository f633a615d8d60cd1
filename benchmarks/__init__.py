"""Time and memory of the fast twin, measured only after its parity tests pass: ``python -m benchmarks.run``."""
