"""Evaluation of a model: benchmarks, memorization, privacy, safety."""
