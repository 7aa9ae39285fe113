"""Building blocks that do not depend on any model."""
