"""Stages, objectives, the one train step and the loop around it."""
