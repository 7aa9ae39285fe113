"""Named models: presets of the five parts, and the parts as one module."""
