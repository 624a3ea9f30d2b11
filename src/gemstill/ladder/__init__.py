"""Students of several sizes, from scratch and distilled, seed by seed, against the baselines a sceptic would choose."""
