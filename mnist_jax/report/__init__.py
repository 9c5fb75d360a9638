"""The command `python -m mnist_jax.report`: a run as one HTML page."""
