"""Conversion of raw text and media to the arrays of a batch."""
