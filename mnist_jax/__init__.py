"""Train a digit classifier that may be stopped at any moment and carries on exactly where it was."""

__version__ = "0.4.0"  # Raise it with each change after which a run would end in other bits.
