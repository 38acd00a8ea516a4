"""Approximate nearest neighbours: the parts of serve/index.py."""
