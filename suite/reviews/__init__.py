"""From files and the Hub to labelled reviews, their split, and the batches of an epoch."""
