"""Signals, locks, devices and processes. Imports nothing else of this package: lift it into your own project."""
