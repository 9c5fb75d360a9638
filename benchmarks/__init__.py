"""The benchmark: this package side by side with PyTorch, Keras and Flax. `scripts/benchmark` prints one table."""
