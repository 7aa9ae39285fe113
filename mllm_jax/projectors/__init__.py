"""Input projectors: P_X = IP(F_X)."""
