"""What one training run needs around the loop in main.py."""
