"""gemstill: make and run strong small language models."""
