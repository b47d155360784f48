"""Blocks used by two or more networks."""
