"""Noise schedules and the steps of diffusion samplers."""
