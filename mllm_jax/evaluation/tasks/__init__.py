"""Tasks, one short file a benchmark."""
