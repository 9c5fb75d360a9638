"""Trained classifiers, and preprocessing of images for them."""
