"""A run's report: one HTML file that opens offline, and the table for the terminal."""
