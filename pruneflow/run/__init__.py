"""`python -m pruneflow`; Hydra is used here only."""
