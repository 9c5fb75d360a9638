"""Checkpoints of any JAX state: written by Orbax, with digests, durable commits and quarantine on top.

This folder stands alone; lift it into your own project.
"""
