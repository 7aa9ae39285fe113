"""Ahead-of-time compilation for TPU slices, and the report of what a step costs there."""
