"""Benchmarks: one short file each, with a function that gives its tasks."""
