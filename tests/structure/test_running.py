import random
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from pruneflow import Channels, Pruner, latency, multiply_adds, remove_channels, sparsity_report
from pruneflow.deploy import export_onnx, shrink, sparse_compile
from pruneflow.structure.channels.coupling import find_coupling
from pruneflow.structure.running import arguments, evaluating, tensors_in

pytestmark = pytest.mark.filterwarnings("ignore:.*neither pruned nor counted")
EXAMPLE = torch.zeros(2, 4)
SEEN = []


def note(*_):
    SEEN.append(1)


class Busy(nn.Module):
    """Does in its forward pass what libraries do in theirs, and more."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 3), nn.Linear(3, 2)
        self.table = nn.Embedding(3, 4, max_norm=0.1)
        self.register_buffer("steps", torch.zeros(2))
        self.register_buffer("level", torch.tensor(torch.nan))
        self.seen, self.known, self.names, self.last = [[0]], {"a": {"b": 1}}, {"x"}, deque([1], 2)
        self.config = SimpleNamespace(output_hidden_states=False, seen=[])
        self.cache, self.ready, self.teacher = torch.zeros(2, 3), False, [nn.Linear(2, 2)]

    def forward(self, x):
        if not self.ready:
            self.register_forward_hook(note)
            self.table.register_forward_hook(note, with_kwargs=True, prepend=True)
            self.table.register_forward_pre_hook(note)
            self.teacher[0].register_forward_hook(note)
            self.ready = True
        self.table(torch.zeros(1, dtype=torch.int64))  # writes its weight
        self.steps += 1
        self.level = torch.ones(())
        self.cache[0] = torch.rand(3) + random.random() + np.random.rand()
        self.seen[0].append(1)
        self.known["a"]["c"] = 2
        self.names.add("y")
        self.config.output_hidden_states = True
        self.config.seen.append(1)
        self.last.append(2)
        self.extra = nn.Linear(1, 1)
        self.gain = nn.Parameter(torch.ones(1))
        self.table.weight.requires_grad_(False)
        if not torch.fx._symbolic_trace.is_fx_symbolic_tracing():  # refused while tracing
            self.head.weight.data = self.head.weight.data.clone()
        self.train()
        torch.set_grad_enabled(True)
        return self.head(self.body(x).relu())


def state(value):
    """All there is, by identity and by value, one thing a line."""
    return "\n".join(map(str, parts(value)))


def parts(value, path=""):
    if isinstance(value, nn.Module):
        yield path, type(value), id(value)
        yield from parts(vars(value), path)
    elif isinstance(value, torch.Tensor):
        yield path, id(value), value.data_ptr(), value.requires_grad, value.tolist()
    elif isinstance(value, dict):
        yield path, id(value), list(value)
        for key, each in value.items():
            yield from parts(each, f"{path}.{key}")
    elif isinstance(value, list | deque | tuple):
        yield path, id(value), len(value)
        for index, each in enumerate(value):
            yield from parts(each, f"{path}[{index}]")
    else:
        yield path, id(value), str(value), id(getattr(value, "seen", None))


RUNS = {
    "sparsity_report": sparsity_report,
    "multiply_adds": multiply_adds,
    "latency": lambda model, example: latency(model, example, repeats=1),
    "Channels": lambda model, example: Pruner(model, granularity=Channels(example), optimizers=[]),
    "remove_channels": remove_channels,
    "shrink": shrink,
}


@pytest.mark.parametrize("name", RUNS)
def test_a_model_is_left_as_it_was(name):
    torch.manual_seed(0)
    model = Busy().train()
    model.table.eval()
    loss = model.body(torch.ones(1, 4)).sum() + model.table.weight.sum()
    before, generators = state(model), (torch.get_rng_state(), random.getstate(), np.random.rand())
    np.random.seed(0)
    RUNS[name](model, EXAMPLE)
    assert state(model) == before
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]
    assert np.random.rand() == np.random.RandomState(0).rand()
    assert torch.is_grad_enabled()
    loss.backward()  # what was computed before can still be differentiated
    model(EXAMPLE)
    SEEN.clear()
    model(EXAMPLE)
    assert len(SEEN) == 3


def test_a_model_is_left_as_it_was_by_an_error_too():
    model = Busy()
    before = state(model)
    with pytest.raises(ValueError, match=r"`example_input` must be a valid input of Busy, .*3x5"):
        sparsity_report(model, torch.zeros(3, 5))
    assert state(model) == before


def test_buffers_of_any_kind_may_be_there():
    model = nn.Linear(2, 2)
    model.register_buffer("wide", torch.ones(1).expand(2, 3))
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    model.register_buffer("conjugate", torch.zeros(2, dtype=torch.complex64).conj())
    model.register_buffer("none", None)
    model.register_buffer("number", torch.tensor(True))
    assert sparsity_report(model, torch.zeros(1, 2)).multiply_adds == 4
    with torch.inference_mode():
        frozen = nn.BatchNorm1d(2)
    with evaluating(frozen, torch.zeros(1, 2)):
        frozen.running_mean.data = torch.ones(2)
    assert not frozen.running_mean.any()
    meta = torch.zeros(1, 2, device="meta")
    assert multiply_adds(model.to("meta"), meta) == {"weight": 1}


@pytest.mark.parametrize("name", RUNS)
def test_lazy_layers_are_refused_and_stay_lazy(name):
    model = nn.Sequential(nn.LazyLinear(3), nn.ReLU(), nn.Linear(3, 2))
    ours = r"`model` must have initialized parameters, got .* lazy layers: 0;"
    with pytest.raises(ValueError, match=f"{ours}|LazyModule"):  # PyTorch says it as well
        RUNS[name](model, EXAMPLE)
    assert isinstance(model[0], nn.LazyLinear)


class Several(nn.Module):
    """Takes more than a tensor."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x, y=None, *, scale=1.0, joined=True):
        hidden = self.a(x)
        if y is not None:
            hidden = hidden + self.b(y)
        hidden = hidden.relu()
        return self.head(hidden if joined else hidden.view(-1, 8)) * scale


class Nested(Several):
    def forward(self, batch, *more, **named):
        x = {**batch, "y": batch["rest"][0], **named}
        return {"out": [super().forward(x["x"], x["y"]) + sum(more)]}


ONE, TWO = torch.randn(3, 4), torch.randn(3, 4)
EXAMPLES = {
    "tuple": (Several, (ONE, TWO)),
    "list": (Several, [ONE, TWO]),
    "dict": (Several, {"x": ONE, "y": TWO}),
    "settings": (Several, {"y": TWO, "x": ONE, "scale": 2.0, "joined": True}),
    "nested": (Nested, ({"x": ONE, "rest": [TWO]},)),
    "starred": (Nested, ({"x": ONE, "rest": (TWO,)}, torch.ones(2), torch.ones(2))),
    "nested in a dict": (Nested, {"batch": {"rest": [TWO]}, "x": ONE}),
}


def pruned(kind):
    torch.manual_seed(0)
    model = kind().double()
    with torch.no_grad():
        for layer in (model.a, model.b):
            layer.weight[:3], layer.bias[:3] = 0, 0
        model.head.weight[:, :3] = 0
    return model


def doubled(example):
    return tree_map(lambda x: x.double() if isinstance(x, torch.Tensor) else x, example)


def called(model, example):
    args, kwargs = arguments(example)
    (result,) = tree_leaves(model(*args, **kwargs))
    return result


@pytest.mark.parametrize("name", EXAMPLES)
def test_several_arguments_are_followed(name):
    kind, example = EXAMPLES[name]
    example, model = doubled(example), pruned(kind)
    expected = called(model, example)
    assert sparsity_report(model, example).remaining_multiply_adds == 3 * (20 + 20 + 10)
    assert multiply_adds(model, example) == {"a.weight": 3, "b.weight": 3, "head.weight": 3}
    assert all(seconds > 0 for seconds in latency(model, example, repeats=1).values())
    assert find_coupling(model, example).units == 8
    pruner = Pruner(model, granularity=Channels(example), optimizers=[])
    pruner.prune_to(0.3)
    pruner.remove()
    small = shrink(model, example)
    assert small.a.out_features == small.head.in_features == 5
    torch.testing.assert_close(called(small, example), expected)
    assert remove_channels(model, example) == 3
    torch.testing.assert_close(called(model, example), expected)


def test_a_graph_takes_the_arguments_of_the_example(tmp_path):
    example = doubled({"x": ONE, "y": TWO, "scale": 2.0, "joined": False})
    model = pruned(Several)
    small = shrink(model, example, fixed_size=True)
    assert isinstance(small, torch.fx.GraphModule)
    torch.save(small, tmp_path / "small.pt")
    for graph in (small, torch.load(tmp_path / "small.pt", weights_only=False)):
        torch.testing.assert_close(graph(**example), model(**example))
        with pytest.raises(AssertionError, match=r"an argument must be 2\.0"):
            graph(**example | {"scale": 3.0})
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Flatten(), nn.Linear(4, 2))
    small = shrink(model, (torch.randn(1, 2, 1, 1),), fixed_size=True)
    with pytest.raises(AssertionError, match=r"fixed size \(2, 1, 1\)"):
        small(torch.randn(1, 2, 2, 2))


@pytest.mark.parametrize("name", ["tuple", "dict", "settings"])
def test_several_inputs_are_exported(name, tmp_path):
    pytest.importorskip("onnxscript", reason="needs pip install 'pruneflow[deploy]'")
    onnx = pytest.importorskip("pruneflow.deploy.onnx")
    kind, example = EXAMPLES[name]
    model = kind()
    export_onnx(model, example, tmp_path / "model.onnx")
    run = onnx.OnnxModel(tmp_path / "model.onnx")
    other = tree_map(lambda x: x[:2] if isinstance(x, torch.Tensor) else x, example)
    expected = called(model, other)
    torch.testing.assert_close(run(*tensors_in(other)), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"`batch` must be .* and .*, got torch.float32 of shape"):
        run(ONE)
    with pytest.raises(
        ValueError, match=r"same batch size in all tensors, got .*\(3, 4\), \(1, 4\)"
    ):
        export_onnx(model, (ONE, TWO[:1]), tmp_path / "other.onnx")


@pytest.mark.parametrize("run", [*RUNS.values(), sparse_compile])
@pytest.mark.parametrize("example", [EXAMPLE.numpy(), "abc", 3, {"z": EXAMPLE}, (EXAMPLE,) * 9])
def test_what_the_model_does_not_take_is_refused_by_name(run, example):
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"`example_input` must be .* got "):
        run(model, example)


def test_the_sparse_runtime_takes_one_tensor():
    with pytest.raises(
        ValueError, match=r"`example_input` must be one tensor, .* got tuple; .*shr"
    ):
        sparse_compile(Several(), (ONE, TWO))


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("run", [shrink, sparse_compile])
def test_models_that_keep_activations_are_copied(run):
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    example = torch.randn(2, 4)
    model[0].last = model(example)
    torch.testing.assert_close(run(model, example)(example), model(example), rtol=1e-4, atol=1e-5)
    assert model[0].last.requires_grad
    if run is shrink:  # hooks are no matter for the sparse runtime
        nn.utils.weight_norm(model[2])
        torch.testing.assert_close(run(model, example)(example), model(example))


def test_what_pytorch_hangs_on_a_model_looks_after_itself():
    model = nn.Linear(4, 2)
    model.state = type("FSDPState", (), {"__module__": "torch.distributed.fsdp", "ready": False})()
    model.register_forward_hook(lambda module, *_: setattr(module.state, "ready", True))
    sparsity_report(model, EXAMPLE)
    assert model.state.ready


def test_views_of_parameters_may_be_given_to_layers():
    class ClassToken(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.token, self.norm = nn.Parameter(torch.zeros(1, 4)), nn.LayerNorm(4)

        def forward(self, x):
            return super().forward(x + self.norm(self.token.expand(len(x), -1)))

    model = ClassToken()
    assert multiply_adds(model, EXAMPLE) == {"weight": 2.0}
    assert all(parameter.requires_grad for parameter in model.parameters())
