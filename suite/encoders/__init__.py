"""Models and tokenizers from the Hub or a folder and back, and fast kernels for a CPU."""
