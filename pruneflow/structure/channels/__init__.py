"""The channels of a model: which layers read and write them, which go together, removal."""
