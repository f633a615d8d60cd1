"""Exact nearest neighbours among points of a plane."""
