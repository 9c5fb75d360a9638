"""Training: the pure step, the compiled functions, the loop, and what it records."""
