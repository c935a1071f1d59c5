"""A trained model at work: label, explain, export. Nothing here imports suite.training."""
