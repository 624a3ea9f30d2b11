"""Tokenizers: opening one, training one."""
