"""Ranking metrics, baselines that count, and the statistics of comparisons."""
