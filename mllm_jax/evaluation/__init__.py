"""Tasks, scorers and the report."""
