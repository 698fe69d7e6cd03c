import copy
import pickle
import types
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.utils import prune
from unusual import Lora

from pruneflow import InPlace, MaskSet, Pruner, Random, Reparametrize, fold_model, sparsity
from pruneflow.pruning.selection import Prune


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 10))


def train(network, optimizer, steps=3):
    for seed in range(steps):
        points = torch.randn(8, 10, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        network(points).square().mean().backward()
        optimizer.step()


def test_zeros_hold_through_training_in_any_loop():
    network = model()
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, weight_decay=0.1)
    pruner = Pruner(network, optimizers=[optimizer])
    for target in (0.5, 0.75, 0.9):
        masks = pruner.prune_to(target)
        train(network, optimizer)
        assert masks.pruned == round(target * 400)
        assert sparsity(network) == pytest.approx(target)
    pruner.remove()
    assert len(pruner.masks) == 0


def test_pruning_to_the_same_target_again_changes_nothing():
    pruner = Pruner(model(), optimizers=[], importance=Random(1))
    first = pruner.prune_to(0.5, round=1)
    again = pruner.prune_to(0.5, round=2)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_importance_is_read_from_the_live_weights():
    network = model()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    pruner = Pruner(network, optimizers=[optimizer], scope="layer", include=["0.weight"])
    pruner.prune_to(0.1)
    survivor = pruner.masks["0.weight"].flatten().nonzero()[0]
    network[0].weight.data.view(-1)[survivor] = 10.0
    pruner.prune_to(0.99)
    assert pruner.masks["0.weight"].flatten()[survivor]


def test_nothing_is_changed_when_a_weight_is_not_a_number():
    network = model()
    pruner = Pruner(network, optimizers=[])
    pruner.prune_to(0.5)
    network[2].weight.data[pruner.masks["2.weight"]] = float("nan")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    masks = pruner.masks
    with pytest.raises(ValueError, match=r"NaN or infinity in 2\.weight;"):
        pruner.prune_to(0.9)
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
    assert all(torch.equal(masks[name], pruner.masks[name]) for name in masks)


def test_says_that_zeros_do_not_hold_without_optimizers():
    with pytest.warns(UserWarning, match="`optimizers` was not given"):
        Pruner(model())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Pruner(model(), optimizers=[])


def test_refuses_a_tensor_that_no_optimizer_holds_and_an_all_frozen_model():
    network = model()
    optimizer = torch.optim.SGD(network[0].parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"got none that holds 2\.weight"):
        Pruner(network, optimizers=[optimizer])
    with pytest.raises(ValueError, match="got frozen ones only"):
        Pruner(network.requires_grad_(False), optimizers=[])


def test_refuses_masks_that_are_not_of_the_tensors_to_prune():
    pruner = Pruner(model(), optimizers=[])
    mask = torch.ones(20, 10, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"got none for 2\.weight"):
        pruner.hold(MaskSet({"0.weight": mask}))
    with pytest.raises(ValueError, match=r"got 0\.bias;"):
        pruner.hold(MaskSet({"0.bias": mask}))


def test_optimizer_state_after_a_prune():
    def momentum_after(policy):
        layer = nn.Linear(2, 1, bias=False)
        layer.weight.data = torch.tensor([[0.1, 1.0]])
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.5)
        layer(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        pruner = Pruner(layer, optimizers=[optimizer], optimizer_state=policy)
        pruner.prune_to(0.5)
        state = optimizer.state[layer.weight]
        before = state["momentum_buffer"].tolist() if state else None
        optimizer.zero_grad()
        layer(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        pruner.prune_to(0.5)  # prunes nothing more, hence settles nothing
        after = optimizer.state[layer.weight]["momentum_buffer"].tolist()
        assert layer.weight[0, 0] == 0
        return before, after

    assert momentum_after("keep") == ([[1.0, 1.0]], [[0.5, 1.5]])
    assert momentum_after("zero_pruned") == ([[0.0, 1.0]], [[0.0, 1.5]])
    assert momentum_after("reset") == (None, [[0.0, 1.0]])
    with pytest.raises(ValueError, match="`optimizer_state` must be one of"):
        momentum_after("forget")


def test_adam_forgets_its_moments_only_when_reset():
    def steps_after(policy):
        network = model()
        optimizer = torch.optim.Adam(network.parameters())
        train(network, optimizer)
        mask = Pruner(network, optimizers=[optimizer], optimizer_state=policy).prune_to(0.5)
        state = optimizer.state[network[0].weight]
        if policy == "zero_pruned":
            assert (state["exp_avg_sq"][~mask["0.weight"]] == 0).all()
            assert (state["exp_avg_sq"][mask["0.weight"]] > 0).any()
        train(network, optimizer, steps=1)
        return int(optimizer.state[network[0].weight]["step"])

    assert [steps_after(policy) for policy in ("keep", "zero_pruned", "reset")] == [4, 4, 1]


def test_refuses_a_model_that_torch_prune_holds():
    network = model()
    prune.l1_unstructured(network[0], "weight", 0.5)
    with pytest.raises(ValueError, match=r"torch.nn.utils.prune on 0\.weight; call `fold_model"):
        Pruner(network, optimizers=[])
    fold_model(network)
    assert Pruner(network, optimizers=[]).hold_zeros().pruned == 100


def test_refuses_the_zero_optimizer(tmp_path):
    network = model()
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meeting", world_size=1, rank=0
    )
    try:
        optimizer = ZeroRedundancyOptimizer(network.parameters(), torch.optim.SGD, lr=0.1)
        with pytest.raises(ValueError, match="ZeroRedundancyOptimizer, which updates some"):
            Pruner(network, optimizers=[optimizer])
    finally:
        torch.distributed.destroy_process_group()


class Accelerated(torch.optim.Optimizer):
    """As Accelerate and Hugging Face's Trainer hand out: `__init__` of Optimizer is not called."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    param_groups = property(lambda self: self.optimizer.param_groups)
    state = property(lambda self: self.optimizer.state)

    def step(self, closure=None):
        return self.optimizer.step(closure)

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)


@pytest.mark.parametrize(
    "wrap", [Accelerated, lambda o: Accelerated(Accelerated(o)), LightningOptimizer]
)
def test_zeros_hold_through_wrapped_optimizers(wrap):
    network = model()
    inner = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    train(network, inner)
    optimizer = wrap(inner)
    pruner = Pruner(network, optimizers=[optimizer])
    masks = pruner.prune_to(0.8)
    assert not inner.state[network[0].weight]["momentum_buffer"][~masks["0.weight"]].any()
    train(network, Accelerated(inner))
    assert sparsity(network) == 0.8
    pruner.set_optimizers([optimizer])
    pruner.remove()
    assert not inner._optimizer_step_post_hooks


def test_a_wrapper_around_itself_is_refused():
    wrapper = types.SimpleNamespace()
    wrapper.optimizer = wrapper
    with pytest.raises(TypeError, match="give the optimizer that it wraps"):
        Pruner(model(), optimizers=[wrapper])


def test_what_is_no_optimizer_is_refused_before_anything_is_held():
    network = model()
    for optimizers in ([object()], [network], torch.optim.SGD(network.parameters())):
        with pytest.raises(TypeError, match="`optimizers` must be"):
            Pruner(network, optimizers=optimizers)
    assert not any(parameter._post_accumulate_grad_hooks for parameter in network.parameters())


def replace_layer(network, optimizer):
    network[2] = nn.Linear(20, 10)
    optimizer.add_param_group({"params": list(network[2].parameters())})


def replace_parameter(network, optimizer):
    network[2].weight = nn.Parameter(torch.randn(10, 20))
    optimizer.add_param_group({"params": [network[2].weight]})


def load_by_assignment(network, optimizer):
    network.load_state_dict(model().state_dict(), assign=True)
    optimizer.param_groups[0]["params"] = list(network.parameters())
    optimizer.state.clear()


@pytest.mark.parametrize(
    ("masking", "replace"),
    [
        (InPlace, replace_layer),
        (InPlace, replace_parameter),
        (InPlace, load_by_assignment),
        (Reparametrize, replace_layer),
        (Reparametrize, load_by_assignment),
    ],
)
@pytest.mark.parametrize("noticed", ["step", "round", "end"])
def test_parameters_that_are_replaced_are_held_instead(masking, replace, noticed):
    network = model()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    pruner = Pruner(network, optimizers=[optimizer], masking=masking())
    pruner.prune_to(0.8)
    train(network, optimizer)
    replace(network, optimizer)
    if noticed == "step" and masking is InPlace:
        train(network, optimizer, steps=1)
        assert sparsity(network) == 0.8
    if noticed == "round":
        assert pruner.prune_to(0.9).sparsity == sparsity(network) == 0.9
        train(network, optimizer)
        assert sparsity(network) == 0.9
    reached = pruner.masks.sparsity
    pruner.remove()
    assert sparsity(network) == reached
    assert not any(parameter._post_accumulate_grad_hooks for parameter in network.parameters())


def test_parameters_that_are_replaced_before_the_first_prune_are_pruned():
    network = model()
    pruner = Pruner(network, optimizers=[])
    network[2] = nn.Linear(20, 30)
    assert pruner.prune_to(0.5).weights == 10 * 20 + 20 * 30
    assert sparsity(network) == 0.5


def test_replaced_parameters_that_cannot_be_held_are_refused():
    network = model()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    pruner = Pruner(network, optimizers=[optimizer])
    pruner.prune_to(0.5)
    network[2] = nn.Linear(20, 10)
    with pytest.raises(ValueError, match=r"got none that holds 2\.weight"):
        pruner.prune_to(0.6)
    network[2] = nn.Linear(20, 11)
    with pytest.raises(ValueError, match=r"`masks` must have the shapes .* for 2\.weight"):
        pruner.prune_to(0.6)
    with pytest.raises(ValueError, match=r"`masks` must .* 2\.weight"):
        train(nn.Sequential(network[0], network[1]), optimizer)
    del network[2]
    with pytest.raises(ValueError, match=r"got changes to 2\.weight"):
        pruner.remove()
    assert len(pruner.masks) == 0
    assert not optimizer._optimizer_step_post_hooks


def share_memory(network):
    network[2].weight.data = network[0].weight.data.view(20, 10).t()


def tie(network):
    network[1] = nn.Linear(10, 20)
    network[1].weight = network[0].weight


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize(
    ("change", "why"), [(share_memory, "share memory, got"), (tie, "got changes to 0")]
)
def test_what_is_tied_or_shared_after_the_fact_is_refused(change, why, held):
    network = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 10))
    pruner = Pruner(network, optimizers=[])
    if held:
        pruner.prune_to(0.5)
    change(network)
    with pytest.raises(ValueError, match=why):
        pruner.prune_to(0.6)


def test_tied_weights_that_come_apart_are_refused():
    network = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    network[1].weight = network[0].weight
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    pruner = Pruner(network, optimizers=[optimizer])
    pruner.prune_to(0.5)
    with pytest.raises(ValueError, match=r"got changes to 0\.weight"):
        network.load_state_dict(network.state_dict(), assign=True)
    with pytest.raises(ValueError, match=r"got changes to 0\.weight"):
        pruner.remove()


@pytest.mark.parametrize("of", ["embedding", "frozen", "bias"])
def test_what_shares_memory_with_a_tensor_to_prune_is_refused(of):
    linear = nn.Linear(8, 8)
    other = nn.Embedding(8, 8)
    if of == "bias":
        linear.bias = nn.Parameter(linear.weight.data[0])
    else:
        other.weight = nn.Parameter(linear.weight.data, requires_grad=of == "embedding")
    with pytest.raises(ValueError, match=r"share memory, got 1\.weight and "):
        Pruner(nn.Sequential(other, linear), exclude=[nn.Embedding], optimizers=[])


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_a_copy_of_a_pruner_holds_nothing_and_can_prune(copy_of):
    network = model()
    pruner = Pruner(network, optimizers=[torch.optim.SGD(network.parameters(), lr=0.1)])
    pruner.prune_to(0.5)
    other = copy_of(pruner)
    assert len(other.masks) == 0 and pruner.masks.sparsity == 0.5
    other.prune_to(0.7)
    (optimizer,) = other._optimizers
    train(other.model, optimizer)
    assert (sparsity(other.model), sparsity(network)) == (0.7, 0.5)
    other.remove()
    assert pruner.masks.sparsity == 0.5


def test_costs_of_any_kind_of_number_and_no_others():
    costs = {"0.weight": np.float32(2), "2.weight": torch.tensor(3.0)}
    pruner = Pruner(model(), costs=costs, optimizers=[])
    pruner.prune_to(0.5)
    assert type(pruner.removed) is float and pruner.removed == pytest.approx(0.5, abs=0.01)
    for wrong in ("a", None, torch.ones(2)):
        with pytest.raises(ValueError, match=r"for 0\.weight"):
            Pruner(model(), costs=costs | {"0.weight": wrong}, optimizers=[])


def test_an_optimizer_that_lets_go_of_the_weights_is_noticed():
    network = model()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    pruner = Pruner(network, optimizers=[optimizer])
    pruner.prune_to(0.5)
    optimizer.param_groups[0]["params"] = [p.detach().clone() for p in network.parameters()]
    with pytest.raises(ValueError, match=r"got none that holds 0\.weight, 2\.weight"):
        pruner.prune_to(0.6)


def test_two_pruners_of_one_tensor_count_what_the_other_holds():
    network = model()
    one = Pruner(network, importance=Random(0), optimizers=[])
    other = Pruner(network, importance=Random(1), optimizers=[])
    assert one.prune_to(0.5).sparsity == sparsity(network) == 0.5
    assert other.prune_to(0.5).sparsity == sparsity(network) == 0.5
    assert other.prune_to(0.7).sparsity == sparsity(network) == 0.7
    assert one.prune_to(0.8).sparsity == sparsity(network) == 0.8
    dense = MaskSet({name: torch.ones_like(mask) for name, mask in one.masks.items()})
    with pytest.raises(
        ValueError, match=r"not keep weights that another Pruner holds .*`remove\(\)`"
    ):
        other.hold(dense)
    one.remove()
    assert other.masks.sparsity == 0.7
    other.remove()
    assert Pruner(network, importance=Random(2), optimizers=[]).hold(dense).sparsity == 0


def test_pruners_with_different_maskings_count_what_the_other_holds():
    network = model()
    one = Pruner(network, importance=Random(0), optimizers=[])
    other = Pruner(network, importance=Random(1), optimizers=[], masking=Reparametrize())
    one.prune_to(0.4)
    assert other.prune_to(0.6).sparsity == sparsity(network) == 0.6
    assert one.prune_to(0.8).sparsity == sparsity(network) == 0.8
    other.remove()
    one.remove()
    assert sparsity(network) == 0.8


@pytest.mark.parametrize("wrong", [None, [nn.Linear(2, 2)], nn.Linear])
def test_what_is_no_model_is_refused_by_name(wrong):
    with pytest.raises(TypeError, match=r"`model` must be an nn\.Module"):
        Pruner(wrong, optimizers=[])


def test_tensors_that_start_at_zero_are_not_taken_for_pruned():
    pruner = Pruner(Lora(), optimizers=[])
    with pytest.warns(UserWarning, match=r"up\.weight are zero throughout.*empty=True"):
        assert pruner.hold_zeros().pruned == 0
    assert pruner.hold_zeros(empty=True).pruned == 128
    with pytest.warns(UserWarning, match=r"nothing is left of up\.weight, "):
        Pruner(Lora(), optimizers=[]).prune_to(0.5)


def test_names_once_what_nothing_is_left_of():
    network = model()
    network[2].weight.data *= 0.01
    pruner = Pruner(network, optimizers=[])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruner.prune_to(0.4)
        with pytest.raises(UserWarning, match=r"nothing is left of 2\.weight.*`exclude` them"):
            pruner.prune_to(0.6)
    with pytest.warns(UserWarning, match="nothing is left of .*"):
        pruner.prune_to(0.6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pruner.prune_to(0.7).sparsity == 0.7


def test_says_how_much_stays_dense_unasked():
    network = nn.Sequential(nn.Embedding(50, 10), nn.Linear(10, 10))
    with pytest.warns(UserWarning, match=r"82\.0% of all parameters .*: 0\.weight \(82\.0%\)"):
        Pruner(network, optimizers=[])
    for patterns in ({"exclude": [nn.Embedding]}, {"include": ["*.weight"]}):
        Pruner(network, optimizers=[], **patterns)


@dataclass(frozen=True)
class Swap(Prune):
    """Drop the first weight that is kept and grow the first that is pruned: the count stays."""

    grows = True

    def masks(self, tensors, before, target, context):
        moved = {}
        for name, tensor in tensors.items():
            mask = (
                before[name] != 0 if name in before else torch.ones_like(tensor, dtype=torch.bool)
            )
            flat = mask.flatten().clone()
            kept, gone = flat.nonzero()[0], (~flat).nonzero()[:1].flatten()
            flat[kept], flat[gone] = False, True
            moved[name] = flat.view_as(mask)
        return MaskSet(moved)


def test_a_rule_that_drops_and_grows_alike_many_leaves_no_momentum_where_it_dropped():
    torch.manual_seed(0)
    layer = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    pruner = Pruner(layer, rule=Swap(), optimizers=[optimizer])
    for _ in range(4):
        masks = pruner.prune_to(0.125)
        assert masks.pruned == 1
        layer(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()
        momentum = optimizer.state[layer.weight]["momentum_buffer"]
        assert (momentum[~masks["weight"]] == 0).all()
        assert (layer.weight[~masks["weight"]] == 0).all()


def test_a_rule_that_does_not_say_so_must_not_grow():
    class Silent(Swap):
        grows = False

    layer = nn.Linear(4, 2)
    pruner = Pruner(layer, rule=Silent(), optimizers=[])
    masks = pruner.prune_to(0.125)
    with pytest.raises(
        ValueError, match=r"`rule` must keep pruned weights pruned .* of weight; set"
    ):
        pruner.prune_to(0.125)
    assert torch.equal(pruner.masks["weight"], masks["weight"])


def test_zeros_of_a_tensor_of_which_nothing_is_left_stay():
    layer = nn.Linear(2, 2)
    pruner = Pruner(layer, optimizers=[])
    pruner.hold(MaskSet({"weight": torch.zeros(2, 2, dtype=torch.bool)}))
    assert pruner.hold_zeros().pruned == 4


def test_a_rule_stands_alone():
    layer = nn.Linear(2, 2)
    assert Pruner(layer, rule=Prune(scope="layer"), optimizers=[]).prune_to(0.5).pruned == 2
    for beside in ({"importance": Random(1)}, {"scope": "layer"}, {"costs": {"weight": 1.0}}):
        with pytest.raises(ValueError, match=r"`rule` must be given without `importance`"):
            Pruner(layer, rule=Prune(), optimizers=[], **beside)
    for wrong in (Prune, "magnitude"):
        with pytest.raises(TypeError, match=r"`rule` must be an instance of a mask rule"):
            Pruner(layer, rule=wrong, optimizers=[])
