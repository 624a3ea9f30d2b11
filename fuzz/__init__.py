"""Hostile checkpoints: mutations of small good ones, each of which must load or be refused in one way alone."""
