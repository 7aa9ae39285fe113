"""What is about running: the run folder, its lock, metrics, progress, the account of time, stops and several hosts."""
