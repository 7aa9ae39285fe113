"""Tasks, metrics and the report."""
