"""Data sets: read from their source, checked, split and loaded in batches."""
