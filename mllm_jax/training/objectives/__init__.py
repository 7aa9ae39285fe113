"""Objectives: `loss(apply, params, batch, key) -> (scalar, metrics)`, pure functions with a frozen config."""
