"""The channels of a model: which layers compute and read them, how they are coupled, removal."""
