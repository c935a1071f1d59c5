"""Grids of runs, and finished runs side by side: statistics, reports, plots."""
