"""Distillation from a store: estimators of a teacher's distribution, the store of them, and `teach`."""
