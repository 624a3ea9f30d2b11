"""Weights in and out, in the formats that other people's software opens."""
