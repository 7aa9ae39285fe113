"""Modality generators: diffusion models and their autoencoders."""
