"""The sparse runtime for CPUs: a model's graph becomes a plan that native code runs in one pass."""

from pruneflow.deploy.runtime.model import SparseModel, sparse_compile

__all__ = ["SparseModel", "sparse_compile"]
