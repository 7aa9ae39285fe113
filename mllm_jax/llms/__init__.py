"""LLM backbones: t, S_X = LLM(P_X, F_T)."""
