"""Tests of the operators, one file an operator, on every path."""
