"""Pruning in a Lightning Trainer."""
