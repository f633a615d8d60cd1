"""Operators of ``fast``: each in a folder of its own, with all of its forms."""
