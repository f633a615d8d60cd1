"""Scores of predictions against targets, and the official result files."""
