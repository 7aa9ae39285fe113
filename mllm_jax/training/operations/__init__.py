"""Operation of a run: its folder, its lock, metrics, progress, goodput, stops and several hosts."""
