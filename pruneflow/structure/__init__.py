"""Inspects models without pruning them: parameters, zeros, costs and channels."""
