"""Programs behind the figures in benchmarks/README.md: python -m benchmarks.NAME"""
