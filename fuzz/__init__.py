"""Fuzz targets: create hostile files and check that reading them ends well: ``python -m fuzz.NAME --seconds 60``."""
