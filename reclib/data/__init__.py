"""Data: raw files read, prepared, split and laid out in batches."""
