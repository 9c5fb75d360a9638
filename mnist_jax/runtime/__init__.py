"""Signals, locks, devices and processes. Imports nothing else of this package: copy it into your own project."""
