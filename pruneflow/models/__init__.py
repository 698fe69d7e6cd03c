"""Networks, losses, the training step and learning-rate schedules, independent of pruning."""

from pruneflow.models.classifier import Classifier
from pruneflow.models.losses import CrossEntropy, Loss
from pruneflow.models.lr_schedules import constant, cosine, multistep, one_cycle
from pruneflow.models.networks import load_state, load_weights, small_cnn, torchvision_model

__all__ = [
    "Classifier",
    "CrossEntropy",
    "Loss",
    "constant",
    "cosine",
    "load_state",
    "load_weights",
    "multistep",
    "one_cycle",
    "small_cnn",
    "torchvision_model",
]
