"""A load, its partial results, and the verdict."""
