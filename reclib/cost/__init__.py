"""FLOPs, memory, time and price of a run, computed without torch."""
