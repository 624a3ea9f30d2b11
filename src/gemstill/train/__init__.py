"""One training loop: objectives, optimizer, schedule, parallelism, state, metrics."""
