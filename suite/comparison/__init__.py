"""Run grids of settings, and compare finished runs: statistics, reports, plots."""
