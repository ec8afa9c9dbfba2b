"""What the notebooks and the long experiments run: one file for each."""
