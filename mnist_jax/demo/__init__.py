"""The command `python -m mnist_jax.demo`: a local page to draw digits on."""
