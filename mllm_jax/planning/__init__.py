"""Ahead-of-time compilation for TPU slices, and a report of a step's cost there."""
