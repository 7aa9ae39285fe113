"""Data sets, a file or a folder each."""
