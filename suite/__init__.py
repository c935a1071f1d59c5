"""The suite behind the scripts. Imports run one way; tests/test_layout.py holds the order."""
