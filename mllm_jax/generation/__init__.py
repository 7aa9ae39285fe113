"""Sampling and cache-driven generation."""
