"""Trained classifiers, and the preparation of pictures for them."""
