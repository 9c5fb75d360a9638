"""Train a digit classifier that may be stopped at any moment and carries on exactly where it was."""
