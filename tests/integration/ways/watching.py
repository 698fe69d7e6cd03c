"""Callbacks that look at the zeros while a Trainer trains, or disturb it."""

import copy

import lightning as L
import torch

from pruneflow import PruningCallback


def held(trainer):
    """The masks that are held now, by name."""
    return {
        name: mask
        for callback in trainer.callbacks
        if isinstance(callback, PruningCallback) and callback.pruner
        for name, mask in callback.pruner.masks.items()
    }


def assert_zeros(state_dict, masks):
    """Pruned weights are exactly zero in a state dict, which has the keys of the plain model."""
    state = {name.replace("_orig_mod.", ""): value for name, value in state_dict.items()}
    for name, mask in masks.items():
        assert int(state[name][~mask].count_nonzero()) == 0, name


def hooks(model):
    """How many hooks modules and parameters have."""
    kinds = ("_forward_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks")
    per_module = [len(getattr(module, kind)) for module in model.modules() for kind in kinds]
    return per_module + [len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()]


class Watch(L.Callback):
    """Zeros hold after every batch, in validation and in checkpoints; notes each epoch's sparsity.

    Stands last, so that it sees what the other callbacks have done.
    """

    def __init__(self):
        self.sparsities = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        masks, state = held(trainer), pl_module.state_dict()
        assert_zeros(state, masks)
        # What is trained, where torch.nn.utils.prune would only hide what it has pruned.
        trained = {name.removesuffix("_orig"): p for name, p in pl_module.named_parameters()}
        assert_zeros(state | trained, masks)

    def on_validation_batch_end(self, trainer, pl_module, *_):
        assert_zeros(pl_module.state_dict(), held(trainer))

    def on_train_epoch_end(self, trainer, pl_module):
        masks = held(trainer)
        trainer.save_checkpoint(f"{trainer.default_root_dir}/epoch.ckpt")
        saved = torch.load(f"{trainer.default_root_dir}/epoch.ckpt", weights_only=True)
        states = [saved["state_dict"]]
        if "current_model_state" in saved:  # of WeightAveraging: the model beside its average
            states.append(saved["current_model_state"])
        if "StochasticWeightAveraging" in saved["callbacks"]:
            states.append(saved["callbacks"]["StochasticWeightAveraging"]["average_model_state"])
        for state in states:
            assert_zeros(state, masks)
        weights = sum(mask.numel() for mask in masks.values())
        pruned = sum(int((~mask).sum()) for mask in masks.values())
        self.sparsities.append(round(pruned / weights, 1) if masks else 0)


class Overflow(L.Callback):
    """Makes gradients overflow as each epoch starts, so that the grad scaler skips the step."""

    steps = 0

    def on_train_start(self, trainer, pl_module):
        trainer.optimizers[0].register_step_post_hook(self.count)

    def count(self, *_):
        self.steps += 1

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0 and trainer.current_epoch > 0:
            trainer.precision_plugin.scaler.update(2.0**40)

    def on_train_end(self, trainer, pl_module):
        assert self.steps <= trainer.global_step - (trainer.max_epochs - 1)


class Twin(L.Callback):
    """Copies the model after each batch: the copy is as sparse, and a model of its own."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        twin, before = copy.deepcopy(pl_module), copy.deepcopy(pl_module.state_dict())
        assert_zeros(twin.state_dict(), held(trainer))
        optimizer = twin.configure_optimizers()
        twin.training_step(batch, batch_idx).backward()
        optimizer.step()
        after = pl_module.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)


class Freeze(L.Callback):
    """Freezes the first layer from one epoch on."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            pl_module.network[0].requires_grad_(False)
