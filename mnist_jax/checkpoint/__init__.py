"""Checkpoints of any JAX state: Orbax writes the arrays, with digests, durable commits and quarantine on top.

This package imports nothing else of this project; copy it into your own.
"""
