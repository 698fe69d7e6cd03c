"""Pruned weights are +0.0, bit for bit, after each step, whatever the optimizer and training."""

import pytest
import torch
from torch import nn, optim

from pruneflow import InPlace, MaskSet, Pruner
from pruneflow.pruning import masking
from pruneflow.pruning.optimizers import keeps_zeros

OPTIMIZERS = {  # the elementwise ones, with what makes a difference to zeros
    "sgd": (optim.SGD, {"lr": 0.1, "weight_decay": 0.1}),
    "sgd-momentum": (optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
    "sgd-nesterov": (
        optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    ),
    "sgd-tensor": (optim.SGD, {"lr": torch.tensor(0.1), "momentum": 0.9, "weight_decay": 0.1}),
    "adam": (optim.Adam, {"lr": 0.01, "weight_decay": 0.1}),
    "adam-amsgrad": (optim.Adam, {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True}),
    "adamw": (optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "nadam": (optim.NAdam, {"weight_decay": 0.1}),
    "nadamw": (optim.NAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    "radam": (optim.RAdam, {"weight_decay": 0.1}),
    "radamw": (optim.RAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    "adamax": (optim.Adamax, {"weight_decay": 0.1}),
    "rmsprop": (optim.RMSprop, {"weight_decay": 0.1}),
    "rmsprop-momentum": (optim.RMSprop, {"weight_decay": 0.1, "momentum": 0.9, "centered": True}),
    "adagrad": (optim.Adagrad, {"weight_decay": 0.1, "lr_decay": 0.1}),
    "adagrad-initial": (optim.Adagrad, {"initial_accumulator_value": 0.1}),
    "adadelta": (optim.Adadelta, {"weight_decay": 0.1}),
    "asgd": (optim.ASGD, {"weight_decay": 0.1, "t0": 10}),
    "rprop": (optim.Rprop, {}),
}
VARIANTS = {
    "for": {"foreach": False},
    "foreach": {"foreach": True},
    "maximize": {"maximize": True},
    "fused": {"fused": True},
}
FUSED = (optim.SGD, optim.Adam, optim.AdamW, optim.Adagrad)
CASES = [
    pytest.param(lambda p, k=kind, o=options | variant: k(p, **o), id=f"{name}-{label}")
    for name, (kind, options) in OPTIMIZERS.items()
    for label, variant in VARIANTS.items()
    if label != "fused" or kind in FUSED
]


def plain(model, optimizer, backward):
    optimizer.zero_grad()
    backward()
    optimizer.step()


def accumulate(model, optimizer, backward):
    optimizer.zero_grad()
    backward()
    backward()
    optimizer.step()


def clip_norm(model, optimizer, backward):
    optimizer.zero_grad()
    backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()


def clip_value(model, optimizer, backward):
    optimizer.zero_grad()
    backward()
    nn.utils.clip_grad_value_(model.parameters(), 1e-3)
    optimizer.step()


def closure(model, optimizer, backward):
    def evaluate():
        optimizer.zero_grad()
        loss = backward()
        add_noise(model)
        return loss

    assert isinstance(optimizer.step(evaluate), torch.Tensor)


def add_noise(model):
    for parameter in model.parameters():
        parameter.grad.add_(torch.randn_like(parameter), alpha=0.01)


def noise(model, optimizer, backward):
    optimizer.zero_grad()
    backward()
    add_noise(model)
    optimizer.step()


def noise_uncounted(model, optimizer, backward):
    optimizer.zero_grad()
    backward()
    for parameter in model.parameters():
        parameter.grad.data.add_(torch.randn_like(parameter))
    optimizer.step()


def assigned(model, optimizer, backward):
    optimizer.zero_grad()
    backward()
    for parameter in model.parameters():
        parameter.grad = parameter.grad + torch.randn_like(parameter)
    optimizer.step()


class Scaler:
    """Steps by a grad scaler, which skips every tenth of them, as gradients overflow."""

    def __init__(self):
        self.scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
        self.steps = 0

    def __call__(self, model, optimizer, backward):
        self.steps += 1
        optimizer.zero_grad()
        self.scaler.scale(backward(None)).backward()
        if self.steps % 10 == 0:
            model[0].weight.grad.view(-1)[0] = torch.inf
        if self.steps % 2:
            self.scaler.unscale_(optimizer)
        self.scaler.step(optimizer)
        self.scaler.update()


WAYS = {
    "plain": lambda: plain,
    "accumulate": lambda: accumulate,
    "clip_norm": lambda: clip_norm,
    "clip_value": lambda: clip_value,
    "closure": lambda: closure,
    "noise": lambda: noise,
    "assigned": lambda: assigned,
    "scaler": Scaler,
}


class Training:
    """A small network, pruned by half, and its optimizer, which has already stepped."""

    def __init__(self, make, **options):
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 6), nn.Linear(6, 2, bias=False)
        )
        self.optimizer = make(self.model.parameters())
        self.step()
        self.pruner = Pruner(self.model, optimizers=[self.optimizer], **options)
        self.masks = self.pruner.prune_to(0.5)
        self.weights = {name: self.model.get_parameter(name) for name in self.masks}

    def backward(self, run=torch.Tensor.backward):
        loss = self.model(torch.randn(8, 1, 4, 4)).tanh().mean()  # bounded, if it is maximized
        if run is not None:
            run(loss)
        return loss

    def step(self, way=plain):
        way(self.model, self.optimizer, self.backward)

    def zero(self):
        """Whether all bits of all pruned weights are zero."""
        bits = {name: weight.detach().view(torch.int32) for name, weight in self.weights.items()}
        return not any(bits[name][~mask].any() for name, mask in self.masks.items())


@pytest.fixture
def passes(monkeypatch):
    """Addresses of the tensors that are passed over."""
    addresses = []
    clear = masking._clear

    def spy(tensor, bits):
        addresses.append(tensor.data_ptr())
        clear(tensor, bits)

    monkeypatch.setattr(masking, "_clear", spy)
    return addresses


def over_weights(training, passes):
    return sum(weight.data_ptr() in passes for weight in training.weights.values())


@pytest.mark.parametrize("make", CASES)
def test_zeros_stay_through_elementwise_optimizers_without_passes(make, passes):
    training, ways = Training(make), [way() for way in WAYS.values()]
    before = {name: weight.detach().clone() for name, weight in training.weights.items()}
    for step in range(100):
        training.step(ways[step // 4 % len(ways)])
        assert training.zero()
        if step == 0:  # which finds out about the state
            assert over_weights(training, passes)
            passes.clear()
    assert not over_weights(training, passes)
    for name, weight in training.weights.items():
        assert not torch.equal(weight, before[name])


class OwnSGD(optim.SGD):
    """For all that is known, it moves every weight, as it does."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(torch.randn_like(parameter), alpha=1e-3)
        return loss


OTHERS = {
    "subclass": lambda p: OwnSGD(p, lr=0.1, momentum=0.9),
    "adafactor": lambda p: optim.Adafactor(p, weight_decay=0.1),
    "muon": lambda p: optim.Muon([q for q in p if q.dim() == 2], lr=0.1),
    # Decay by a factor below zero makes -0.0, and a division of 0 by 0 NaN.
    "decay beyond zero": lambda p: optim.AdamW(p, lr=1.0, weight_decay=1.5),
    "no epsilon": lambda p: optim.Adam(p, lr=0.1, eps=0.0),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_zeros_stay_through_optimizers_that_move_them(kind):
    options = {"include": ("2.*", "3.*")} if kind == "muon" else {}
    training, ways = Training(OTHERS[kind], **options), [way() for way in WAYS.values()]
    for step in range(100):
        training.step(ways[step // 4 % len(ways)])
        assert training.zero()


def momentum(parameters):
    return optim.SGD(parameters, lr=0.1, momentum=0.9)


def move_some(tensor):
    with torch.no_grad():
        tensor[-1] += 1  # not the pruned weight that stands for all, which is among the first


def move_all_uncounted(tensor):
    tensor.data.add_(1)


def replace_data(tensor):
    tensor.data = tensor.data + 1


moves = pytest.mark.parametrize("move", [move_some, move_all_uncounted, replace_data])


@moves
def test_weights_that_others_move_are_zero_after_the_next_step(move):
    training = Training(momentum)
    for step in range(6):
        if step % 2:
            for weight in training.weights.values():
                move(weight)
        training.step()
        assert training.zero()


@moves
@pytest.mark.parametrize("what", ["weight", "gradient"])
def test_what_a_closure_moves_is_zero_after_its_step(move, what):
    training = Training(momentum)

    def evaluate():
        training.optimizer.zero_grad()
        loss = training.backward()
        for weight in training.weights.values():
            move(weight if what == "weight" else weight.grad)
        return loss

    for _ in range(4):
        training.optimizer.step(evaluate)
        assert training.zero()


@moves
def test_gradients_that_others_move_before_the_step_move_no_pruned_weight(move):
    training = Training(momentum)

    def moved(model, optimizer, backward):
        optimizer.zero_grad()
        backward()
        for weight in training.weights.values():
            move(weight.grad)
        optimizer.step()

    for way in (plain, plain, moved, plain, moved, plain, plain):
        training.step(way)
        assert training.zero()


def test_gradients_of_others_are_no_masked_ones_though_changed_as_often():
    training = Training(momentum)

    def assigned(model, optimizer, backward):
        optimizer.zero_grad()
        backward()
        for weight in training.weights.values():
            last_row = torch.zeros_like(weight)
            last_row[-1] = 1
            other = weight.grad + last_row
            while other._version < weight.grad._version:
                other.add_(0)
            weight.grad = other
        optimizer.step()

    for way in (plain, plain, assigned, plain):
        training.step(way)
        assert training.zero()


def test_weights_without_gradients_are_zero_after_the_step():
    training = Training(momentum)
    training.step()
    training.optimizer.zero_grad()
    for weight in training.weights.values():
        move_some(weight)
    training.optimizer.step()
    assert training.zero()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("what", ["weight", "gradient"])
@pytest.mark.parametrize("register", ["register_step_pre_hook", "register_step_post_hook"])
def test_zeros_stay_though_others_have_hooks_on_the_step(register, what, when):
    training = Training(momentum)
    weights = list(training.weights.values())

    def hook(optimizer, *_):
        for weight in weights:
            move_some(weight if what == "weight" else weight.grad)

    training.step()
    training.step()
    if when == "before":
        training.pruner.remove()
    handle = getattr(training.optimizer, register)(hook)
    if when == "before":
        training.pruner.hold(training.masks)
    for _ in range(4):
        training.step()
        # What others do after us they do for the next step.
        if (register, what, when) != ("register_step_post_hook", "weight", "after"):
            assert training.zero()
    handle.remove()
    for _ in range(3):
        training.step()
        assert training.zero()


@pytest.mark.parametrize("make", [momentum, optim.Adam, optim.Adadelta, optim.RMSprop])
def test_zeros_stay_though_state_is_kept(make):
    training = Training(make, optimizer_state="keep")
    for _ in range(20):
        training.step()
        assert training.zero()


@pytest.mark.parametrize("move", [move_some, move_all_uncounted])
def test_zeros_stay_though_others_move_the_state(move):
    training = Training(momentum)
    training.step()
    training.step()
    for weight in training.weights.values():
        move(training.optimizer.state[weight]["momentum_buffer"])
    for _ in range(4):
        training.step()
        assert training.zero()


@pytest.mark.parametrize("put", ["load_state_dict", "assign"])
def test_zeros_stay_though_state_is_that_of_before_the_prune(put):
    training = Training(momentum, optimizer_state="zero_pruned")
    dense = Training(momentum)
    dense.pruner.remove()
    dense.step()
    training.step()
    training.step()
    if put == "load_state_dict":
        training.optimizer.load_state_dict(dense.optimizer.state_dict())
    else:
        for weight, other in zip(training.weights.values(), dense.weights.values(), strict=True):
            training.optimizer.state[weight] = dict(dense.optimizer.state[other])
    for _ in range(4):
        training.step()
        assert training.zero()


def test_passes_end_once_state_is_zero(passes):
    training = Training(momentum, optimizer_state="keep")
    for _ in range(3):
        training.step()
    passes.clear()
    training.step()
    assert over_weights(training, passes) == len(training.weights)
    training.optimizer.state.clear()
    training.step()
    passes.clear()
    training.step()
    assert training.zero() and not over_weights(training, passes)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # of Adagrad
@pytest.mark.parametrize("kind", [optim.SGD, optim.Adagrad])
def test_zeros_stay_through_sparse_gradients(kind):
    table = nn.Embedding(6, 4, sparse=True)
    optimizer = kind(table.parameters(), lr=0.1)
    mask = Pruner(table, include=("weight",), optimizers=[optimizer]).prune_to(0.5)["weight"]
    for _ in range(5):
        optimizer.zero_grad()
        table(torch.tensor([1, 2, 2, 5])).sum().backward()
        table.weight.grad.coalesce().values().add_(1)
        optimizer.step()
        assert not table.weight.detach().view(torch.int32)[~mask].any()


def test_zeros_stay_in_complex_weights(passes):
    layer = nn.Linear(4, 3, dtype=torch.complex64)
    optimizer = optim.Adam(layer.parameters(), lr=0.1, weight_decay=0.1)
    mask = Pruner(layer, optimizers=[optimizer]).prune_to(0.5)["weight"]
    for _ in range(5):
        passes.clear()
        optimizer.zero_grad()
        layer(torch.randn(5, 4, dtype=torch.complex64)).abs().sum().backward()
        optimizer.step()
        assert not torch.view_as_real(layer.weight.detach())[~mask].view(torch.int32).any()
    assert layer.weight.data_ptr() not in passes


def test_steps_are_not_trusted_again_once_a_pruned_weight_has_moved_uncounted(passes):
    training = Training(momentum)
    for way in (plain, plain, noise_uncounted):
        training.step(way)
        assert training.zero()
    for _ in range(3):
        passes.clear()
        training.step()
        assert over_weights(training, passes) == len(training.weights)


def test_zeros_stay_where_two_optimizers_step_the_same_weights():
    training = Training(momentum)
    training.pruner.remove()
    other = optim.Adam(training.model.parameters(), lr=0.01)
    training.pruner = Pruner(training.model, optimizers=[training.optimizer, other])
    training.pruner.hold(training.masks)
    for _ in range(10):
        training.step()
        assert training.zero()
        training.step(noise)
        assert training.zero()
        other.step()
        assert training.zero()


def test_new_masks_hold_from_the_next_step_on(passes):
    training = Training(momentum)
    for sparsity in (0.6, 0.7, 0.8):
        training.masks = training.pruner.prune_to(sparsity)
        assert training.zero()
        passes.clear()
        for _ in range(3):
            training.step()
            assert training.zero()
    passes.clear()
    training.step()
    assert not over_weights(training, passes)


def test_zeros_stay_through_a_compiled_step():
    training = Training(momentum)
    training.optimizer.step = torch.compile(training.optimizer.step, backend="eager")
    for way in (plain, plain, noise, plain, assigned, plain):
        training.step(way)
        assert training.zero()


def test_weights_are_zero_in_a_checkpoint_whatever_was_done_to_them():
    training = Training(momentum)
    training.step()
    weight = next(iter(training.weights.values()))
    weight.data[-1] += 1
    training.model.state_dict()
    assert training.zero()


def test_large_tensors_are_masked_in_pieces_whatever_their_layout(monkeypatch):
    monkeypatch.setattr(masking, "_PIECE", 10)
    layouts = [
        torch.randn(7, 3),
        torch.randn(3, 50),
        torch.randn(9, 8).t(),
        torch.randn(6, 4, 3, 3).to(memory_format=torch.channels_last),
        torch.randn(64)[::2],
        torch.randn(()),
        torch.randn(0, 3),
    ]
    for weight in layouts:
        layer = nn.Module()
        layer.weight = nn.Parameter(weight.clone(memory_format=torch.preserve_format))
        mask = torch.rand(weight.shape) < 0.5
        InPlace().attach(layer, MaskSet({"weight": mask}), [])
        assert torch.equal(layer.weight.detach(), torch.where(mask, weight, 0))


def test_only_exactly_what_is_listed_is_taken_to_keep_zeros():
    weight = nn.Parameter(torch.ones(2, 2))
    for kind in (optim.Adafactor, optim.LBFGS, optim.Muon, optim.SparseAdam, OwnSGD):
        optimizer = kind([weight])
        optimizer.register_step_pre_hook(lambda *_: None)
        optimizer.register_step_post_hook(lambda *_: None)
        assert not keeps_zeros(optimizer)
