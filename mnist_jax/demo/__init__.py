"""The command `demo`: a local web page that predicts a digit while the user draws it."""
