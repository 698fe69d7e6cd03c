"""`python -m pruneflow`, the only part that uses Hydra."""
