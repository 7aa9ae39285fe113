"""Modality encoders: F_X = ME_X(I_X)."""
