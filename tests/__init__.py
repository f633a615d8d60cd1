"""Tests of training and of what surrounds the twins: weights that ship, benchmarks, notebooks, set-up."""
