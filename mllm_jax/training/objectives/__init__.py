"""Objectives: a pure `loss(apply, params, batch, key) -> (scalar, metrics)` and a `check`, with a frozen config."""
