"""Text out of a trained network."""
