"""Loads, their partial results, and the verdict."""
