"""Rounds within a Lightning Trainer."""
