"""Tasks, a short file for each benchmark."""
