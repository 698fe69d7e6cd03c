"""Looks at any model and prunes nothing: its parameters, zeros, costs and channels."""
