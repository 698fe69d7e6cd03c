"""Pruning in plain PyTorch: schedules, importances, granularities, masks and the Pruner."""
