"""Targets that make hostile files, and see that reading them ends well: ``python -m fuzz.NAME --seconds 60``."""
