"""One round, with PyTorch alone: from scores to masks that are held."""
