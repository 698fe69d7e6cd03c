import copy
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchvision.models import resnet18
from torchvision.models.resnet import BasicBlock
from unusual import Conv1D

from pruneflow import NM, Block, Channels, Pruner, Random, compute_masks, magnitude, sparsity_report
from pruneflow.deploy import shrink
from pruneflow.structure import layer_types
from pruneflow.structure.costs import multiply_adds

IMAGE = torch.zeros(1, 3, 32, 32)


def small_resnet(width=8):
    torch.manual_seed(0)
    model = resnet18(num_classes=4, norm_layer=nn.BatchNorm2d)
    model.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
    model.bn1 = nn.BatchNorm2d(width)
    model.layer1 = nn.Sequential(block(width, width), block(width, width))
    model.layer2 = nn.Sequential(block(width, 2 * width, stride=2))
    model.layer3 = model.layer4 = nn.Identity()
    model.fc = nn.Linear(2 * width, 4)
    return model


def block(inputs, outputs, stride=1):
    down = None
    if inputs != outputs:
        down = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
    return BasicBlock(inputs, outputs, stride, down)


# -- N of M ---------------------------------------------------------------------------------------


@given(seed=st.integers(0, 99), path=st.lists(st.floats(0, 0.5), max_size=3).map(sorted))
def test_n_of_each_m_stay_in_every_round_and_just_they_in_the_end(seed, path):
    torch.manual_seed(seed)
    weights = {"a": torch.randn(3, 8), "b": torch.randn(2, 4, 3, 3), "c": torch.zeros(2, 4)}
    masks = None
    for round, sparsity in enumerate([*path, 0.5], start=1):
        masks = compute_masks(
            weights,
            sparsity,
            importance=Random(seed),
            granularity=NM(2, 4),
            masks=masks,
            round=round,
        )
        kept = [mask.movedim(1, -1).unflatten(-1, (-1, 4)).sum(-1) for mask in masks.values()]
        assert all((counts >= 2).all() for counts in kept)
    assert all((counts == 2).all() for counts in kept)


def test_the_best_of_each_group_stay_whatever_others_have():
    weights = {"weight": torch.tensor([[9.0, 8.0, 7.0, 6.0, 0.4, 0.1, 0.2, 0.3]])}
    mask = compute_masks(weights, 0.25, importance=magnitude, granularity=NM(2, 4))["weight"]
    assert mask.tolist() == [[True, True, True, True, True, False, False, True]]


def test_refuses_what_groups_cannot_be():
    odd = {"good": torch.ones(4, 8), "odd": torch.ones(4, 6), "bias": torch.ones(8)}
    with pytest.raises(ValueError, match=r"odd \(4, 6\), bias \(8,\); `exclude` them"):
        compute_masks(odd, 0.5, importance=magnitude, granularity=NM(2, 4))
    with pytest.raises(ValueError, match=r"at most 0\.25 with NM"):
        compute_masks({"a": odd["good"]}, 0.5, importance=magnitude, granularity=NM(3, 4))
    for n, m in ((0, 4), (4, 4), (5, 4)):
        with pytest.raises(ValueError, match="0 < n < m"):
            NM(n, m)


def test_sizes_and_seeds_are_whole_numbers_of_any_type():
    assert str(NM(np.int64(2), torch.tensor(4))) == str(NM(2, 4))
    assert str(Block(np.int8(2), torch.tensor(3))) == str(Block(2, 3))
    assert str(Random(torch.tensor(3))) == str(Random(np.int64(3))) == str(Random(3))
    for sizes in ((2.0, 4.0), ("2", "4"), (None, 4)):
        with pytest.raises(ValueError, match="`n` and `m` must be whole numbers"):
            NM(*sizes)
    for sizes in ((1.5, 2), ("1", 2), (None, 2), (1, 0)):
        with pytest.raises(ValueError, match="`rows` and `columns` must be whole numbers"):
            Block(*sizes)


@given(seed=st.integers(0, 99), before=st.floats(0, 0.6), sparsity=st.floats(0, 0.5))
def test_n_of_m_brings_no_pruned_weight_back(seed, before, sparsity):
    torch.manual_seed(seed)
    weights = {"w": torch.randn(8, 16)}
    masks = {"w": torch.rand(8, 16) >= before}
    pruned = 128 - int(masks["w"].sum())
    target = max(sparsity, min(pruned / 128, 0.5))
    if round(target * 128) >= pruned:
        after = compute_masks(
            weights, target, importance=magnitude, granularity=NM(2, 4), masks=masks
        )["w"]
        assert not (after & ~masks["w"]).any()
        left = masks["w"].unflatten(1, (-1, 4)).sum(2).clamp(max=2)
        kept = after.unflatten(1, (-1, 4)).sum(2)
        assert (kept >= left).all()
        if target == 0.5:
            assert torch.equal(kept, left)
        else:
            assert int((~after).sum()) == round(target * 128)


def groups(weight, dim):
    return (weight != 0).movedim(dim, -1).unflatten(-1, (-1, 4)).sum(-1)


def test_n_of_m_counts_along_the_dimension_that_is_multiplied(monkeypatch):
    monkeypatch.setattr(layer_types, "_TYPES", dict(layer_types._TYPES))
    model = nn.ModuleDict(
        {
            "up": nn.ConvTranspose2d(8, 6, 3),
            "linear": nn.Linear(8, 5),
            "conv1d": Conv1D(8, 6),
            "lstm": nn.LSTM(8, 4),
        }
    )
    include = ["*.weight*"]
    with pytest.raises(ValueError, match=r"the input dimension .*conv1d\.weight \(Conv1D\).*regis"):
        Pruner(model, include=include, granularity=NM(2, 4), optimizers=[])
    layer_types.register_layer(Conv1D, input_dim=0)
    Pruner(model, granularity=NM(2, 4), optimizers=[]).prune_to(0.5)
    assert (groups(model["up"].weight, 0) == 2).all()
    assert (groups(model["conv1d"].weight, 0) == 2).all()
    assert (groups(model["linear"].weight, 1) == 2).all()
    assert (groups(model["lstm"].weight_hh_l0, 1) == 2).all()


def test_n_of_m_of_experts():
    experts = {"up": torch.randn(3, 8, 5)}
    granularity = NM(2, 4, dims={"up": 1})
    masks = compute_masks(experts, 0.5, importance=magnitude, granularity=granularity)
    assert (groups(masks["up"], 1) == 2).all()


# -- blocks ---------------------------------------------------------------------------------------


@given(rows=st.integers(1, 4), columns=st.none() | st.integers(1, 5), sparsity=st.floats(0, 0.99))
def test_blocks_go_whole_and_as_few_as_reach_the_target(rows, columns, sparsity):
    torch.manual_seed(rows)
    weights = {"a": torch.randn(7, 2, 3), "b": torch.randn(5, 4)}
    masks = compute_masks(weights, sparsity, importance=magnitude, granularity=Block(rows, columns))
    sizes = []
    for mask in masks.values():
        for band in mask.flatten(1).split(rows):
            for part in band.split(columns or mask[0].numel(), dim=1):
                assert part.all() or not part.any()
                sizes.append(part.numel())
    assert masks.pruned >= sparsity * 62 * (1 - 1e-9)
    assert masks.pruned - max(sizes) < sparsity * 62


def test_blocks_compete_within_their_scope_and_stay_pruned():
    weights = {"a": torch.tensor([[1.0, 1.0, 2.0, 2.0]]), "b": torch.tensor([[8.0, 8.0, 9.0, 9.0]])}
    settings = {"importance": magnitude, "granularity": Block(1, 2)}
    layer = compute_masks(weights, 0.5, scope="layer", **settings)
    assert [m.tolist() for m in layer.values()] == [[[False, False, True, True]]] * 2
    together = compute_masks(weights, 0.5, **settings)
    assert (together["a"].any(), together["b"].all()) == (False, True)
    more = compute_masks({k: -10 / w for k, w in weights.items()}, 0.75, masks=together, **settings)
    assert not more["a"].any()
    with pytest.raises(ValueError, match=r"the present one, 0\.75, got 0.1"):
        compute_masks(weights, 0.1, masks=more, **settings)


@pytest.mark.parametrize("granularity", [None, Block(1, 2)])
def test_blocks_leave_nothing_of_a_tensor_where_weights_do(granularity):
    weights = {"low": torch.full((2, 4), 0.1), "high": torch.full((2, 4), 9.0)}
    masks = compute_masks(weights, 0.5, importance=magnitude, granularity=granularity)
    assert not masks["low"].any() and masks["high"].all()


def test_a_tensor_of_one_block_goes_whole_with_scope_layer():
    weights = {"small": torch.ones(1, 4), "large": torch.ones(5, 8)}
    masks = compute_masks(
        weights, 0.1, importance=magnitude, granularity=Block(1, 8), scope="layer"
    )
    assert [int(mask.sum()) for mask in masks.values()] == [0, 32]


# -- channels -------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("by_cost", [False, True])
def test_channels_go_with_all_that_belongs_to_them_and_shrink_cuts_them_out(scope, by_cost):
    model = small_resnet()
    costs = multiply_adds(model, IMAGE) if by_cost else None
    pruner = Pruner(
        model,
        granularity=Channels(IMAGE),
        scope=scope,
        costs=costs,
        exclude=("fc.*",),
        optimizers=[],
    )
    weights = [name for name in pruner.names if name.endswith("weight")]
    for target in (0.3, 0.6):
        pruner.prune_to(target)
        price = costs or dict.fromkeys(weights, 1.0)
        slots = dict(model.named_parameters())
        total = sum(price[n] * slots[n].numel() for n in weights if slots[n].dim() == 4)
        gone = sum(price[n] * int((slots[n] == 0).sum()) for n in weights if slots[n].dim() == 4)
        assert target <= gone / total < target + 0.15
    pruner.remove()
    # All that is zero is cut out: nothing but whole channels, and nothing of them is left.
    report, small = sparsity_report(model, IMAGE), shrink(model, IMAGE)
    assert sparsity_report(small, IMAGE).multiply_adds == report.remaining_multiply_adds
    assert not any((p == 0).any() for p in small.parameters() if p.dim() > 1)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(small(images), model.eval()(images), rtol=1e-5, atol=1e-6)


def test_layers_lose_the_same_fraction_of_channels_with_scope_layer():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    model[0].weight.data *= 1e-3  # of a scale that would let all of it go first
    pruner = Pruner(model, granularity=Channels(torch.zeros(1, 4)), scope="layer", optimizers=[])
    masks = pruner.prune_to(0.6)
    assert (int(masks["0.bias"].sum()), int(masks["2.bias"].sum())) == (4, 2)


def test_a_channel_counts_what_it_writes_and_what_reads_it():
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 1, bias=False))
    model[0].weight.data = torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    model[2].weight.data = torch.tensor([[9.0, 1.0, 1.0]])  # the first is read by much
    pruner = Pruner(model, granularity=Channels(torch.zeros(1, 2)), optimizers=[])
    masks = pruner.prune_to(0.3)
    assert masks["0.weight"].tolist() == [[True, True], [False, False], [True, True]]
    assert masks["2.weight"].tolist() == [[True, False, True]]


def test_one_channel_of_each_layer_stays_and_wide_layers_keep_whole_vectors():
    model = nn.Sequential(
        nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)
    )
    pruner = Pruner(model, granularity=Channels(torch.zeros(1, 4)), optimizers=[])
    for target in (0.1, 0.5, 0.8, 0.9):
        masks = pruner.prune_to(target)
        for kept in (int(masks["0.bias"].sum()), int(masks["2.bias"].sum())):
            assert kept <= 16 or kept % 16 == 0
    with pytest.raises(ValueError, match="which leaves one channel in each layer"):
        pruner.prune_to(0.9999)
    assert int(pruner.masks["0.bias"].sum()) >= 1


def test_training_goes_on_with_dead_channels_and_momentum():
    model = small_resnet()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-3)
    pruner = Pruner(model, granularity=Channels(IMAGE), optimizers=[optimizer])
    masks = pruner.prune_to(0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 32, 32)).square().sum().backward()
        optimizer.step()
    slots = dict(model.named_parameters())
    assert {name for name in masks if not masks[name].all()} > {"bn1.weight", "bn1.bias"}
    assert all(not slots[name][~mask].any() for name, mask in masks.items())
    assert all(slots[name][mask].all() for name, mask in masks.items() if name.endswith("weight"))


def test_layers_that_are_left_out_keep_their_channels():
    model = small_resnet()
    left_out = ("layer1.0.conv1.weight", "fc.*")
    masks = Pruner(
        model, granularity=Channels(IMAGE), exclude=left_out, scope="layer", optimizers=[]
    ).prune_to(0.4)
    written = masks["layer1.0.bn2.weight"]
    assert "layer1.0.bn1.weight" not in masks  # its channels are written by what is left out
    assert torch.equal(written, masks["bn1.weight"])
    assert not written.all()
    assert torch.equal(masks["layer1.0.conv1.weight"].flatten(2).any(2).any(0), written)


def test_says_what_channels_need():
    model = small_resnet()
    with pytest.raises(ValueError, match=r"`example_input` must be .* got None"):
        Pruner(model, granularity=Channels(), optimizers=[])
    with pytest.raises(ValueError, match="'global' or 'layer' for channels"):
        Pruner(
            model,
            granularity=Channels(IMAGE),
            scope={"fc": ["fc.*"], "others": ["[!f]*"]},
            optimizers=[],
        ).prune_to(0.5)
    with pytest.raises(ValueError, match="computed by an excluded layer"):
        Pruner(model, granularity=Channels(IMAGE), include=("fc.weight",), optimizers=[])
    with pytest.raises(ValueError, match="be a function if `granularity` or `costs` is given"):
        Pruner(
            model,
            importance=torch.nn.utils.prune.L1Unstructured,
            granularity=Channels(IMAGE),
            optimizers=[],
        )


def test_coupling_leaves_the_model_as_it_is():
    model = small_resnet().train()
    before = copy.deepcopy(model.state_dict())
    Pruner(model, granularity=Channels(IMAGE), optimizers=[])
    assert all(module.training for module in model.modules())
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


# -- what a review found --------------------------------------------------------------------------


def two_layers():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    model[0].weight.data[:] = torch.arange(1.0, 9)[:, None]
    model[2].weight.data[:] = torch.arange(1.0, 9)[None]
    return model


def test_scores_may_be_negative():
    pruner = Pruner(
        two_layers(),
        granularity=Channels(torch.zeros(1, 4)),
        importance=lambda name, tensor, context: tensor.abs() - 100,
        optimizers=[],
    )
    assert pruner.prune_to(0.5)["0.bias"].tolist() == [False] * 4 + [True] * 4


@pytest.mark.parametrize("granularity", [Channels(torch.zeros(1, 4)), Block(1, 4)])
def test_weights_pruned_one_by_one_stay_pruned_among_units(granularity):
    model = two_layers()
    model[0].weight.data[:, :2] = 0
    pruner = Pruner(model, granularity=granularity, optimizers=[])
    before = pruner.hold_zeros()
    after = pruner.prune_to(0.4)
    assert not any((after[name] & ~before[name]).any() for name in before)
    assert after["0.weight"].sum() + after["2.weight"].sum() <= 0.6 * 48


def test_halves_with_many_weights():
    model = nn.Sequential(nn.Linear(3000, 30), nn.ReLU(), nn.Linear(30, 2)).half()
    nn.init.normal_(model[0].weight)
    nn.init.normal_(model[2].weight)
    model[0].weight.data[7] *= 0.01
    model[2].weight.data[:, 7] *= 0.01
    pruner = Pruner(model, granularity=Channels(torch.zeros(1, 3000).half()), optimizers=[])
    assert (~pruner.prune_to(0.01)["0.bias"]).nonzero().tolist() == [[7]]


def test_what_is_gone_already_counts_with_scope_layer():
    model = nn.Sequential(
        nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 2)
    )
    model[0].weight.data[:5] = 0
    model[2].weight.data[:, :5] = 0
    pruner = Pruner(model, granularity=Channels(torch.zeros(1, 10)), scope="layer", optimizers=[])
    assert pruner.hold_zeros().pruned == 100
    assert pruner.removed == 100 / 220
    pruner.prune_to(100 / 220)
    assert int((~pruner.weight_masks["0.weight"]).sum()) == 50
    assert pruner.weight_masks.pruned == 100


def test_a_frozen_reader_is_not_pruned_by_itself_after_a_resume():
    model = two_layers()
    model[2].requires_grad_(False)
    pruner = Pruner(model, granularity=Channels(torch.zeros(1, 4)), optimizers=[])
    masks = pruner.prune_to(0.4)
    again = Pruner(model, granularity=Channels(torch.zeros(1, 4)), optimizers=[])
    again.include_unfrozen(pruner.weight_names)
    assert (again.weight_names, again.frozen) == (("0.weight",), ("2.weight",))
    assert torch.equal(again.hold(masks)["2.weight"], masks["2.weight"])


@pytest.mark.parametrize(
    ("missing", "exclude"),
    [
        ("bn1.", ["conv1.weight"]),  # which writes what batch norm holds; so does the residual sum
        ("layer1.0.bn1.", ["layer1.0.conv1.weight"]),
        ("layer1.0.conv2.", ["layer1.0.conv1.weight", "layer1.0.conv2.weight"]),
    ],
)
def test_what_goes_along_with_channels_and_no_optimizer_holds_has_a_remedy(missing, exclude):
    model = small_resnet()
    names = [name for name, _ in model.named_parameters() if name.startswith(missing)]
    trained = [p for name, p in model.named_parameters() if name not in names]

    def pruner(*others, exclude=()):
        optimizers = [torch.optim.SGD(trained, 0.1), *others]
        return Pruner(model, granularity=Channels(IMAGE), exclude=exclude, optimizers=optimizers)

    with pytest.raises(ValueError, match=f"got none that holds {', '.join(names)}") as error:
        pruner()
    [remedy] = re.findall("`exclude` (.*), whose channels these tensors", str(error.value))
    assert set(exclude) <= set(remedy.split(", "))
    assert not {*names} & {*pruner(exclude=remedy.split(", ")).names}
    others = torch.optim.SGD([model.get_parameter(name) for name in names], 0.1)
    assert {*names} <= {*pruner(others).names}
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    pruner()


def test_refuses_before_training_what_cannot_be():
    model, example = two_layers(), torch.zeros(1, 4)
    for wrong in ({"granularity": "channels"}, {"granularity": NM}, {"costs": 9.0}):
        with pytest.raises(TypeError, match=r"`(granularity|costs)` must "):
            Pruner(model, optimizers=[], **wrong)
    with pytest.raises(
        ValueError, match=r"`example_input` must be .* if `costs` is a function, got None"
    ):
        Pruner(model, optimizers=[], costs=multiply_adds)
    for cost in (float("inf"), 0.0, -1.0):
        with pytest.raises(ValueError, match=r"got none for 2\.weight"):
            Pruner(model, costs={"0.weight": 1.0, "2.weight": cost}, optimizers=[])
    with pytest.raises(ValueError, match=r"at most 0\.875, which leaves one channel"):
        Pruner(model, granularity=Channels(example), optimizers=[]).check(0.9)
    with pytest.raises(ValueError, match=r"`example_input` must be .*got ndarray"):
        Pruner(model, granularity=Channels(example.numpy()), optimizers=[])
