"""The deliverable table: every form is measured, or says why not; figures come from the forms."""

import json
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pruneflow.deploy import building, forms
from pruneflow.deploy.forms import markdown, measure_forms, table
from pruneflow.run.deploy_task import write_forms

NAMES = [
    "dense",
    "dense, ONNX Runtime",
    "plain zeros",
    "packed",
    "shrunk",
    "shrunk, ONNX Runtime",
    "sparse runtime",
]


class Pass(nn.Module):
    """Another form of a network, that takes longer or gives something else."""

    def __init__(self, network, seconds=0.0, shift=0.0):
        super().__init__()
        self.network, self.seconds, self.shift = network, seconds, shift

    def forward(self, batch):
        time.sleep(self.seconds)
        return self.network(batch) + self.shift


def network(seed):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)]
    return nn.Sequential(*layers).train()


@pytest.fixture
def dense():
    return network(0)


@pytest.fixture
def pruned():
    pruned = network(1)
    pruned[3].weight.data[:, 10:] = 0
    return pruned


@pytest.fixture
def image():
    return torch.randn(1, 3, 8, 8)


@pytest.fixture
def quick(monkeypatch):
    """Few and short turns, no fresh processes; all forms in PyTorch."""
    monkeypatch.setattr(forms, "_BURST", 0)
    monkeypatch.setattr(forms, "_WARM_UP", 0)
    monkeypatch.setattr(forms, "_MOST_TURNS", 3)
    monkeypatch.setattr(forms, "peak_bytes", lambda models, threads: [1_000_000] * len(models))
    monkeypatch.setattr(building, "shrink", lambda model, example, fixed_size: model)
    monkeypatch.setattr(building, "sparse_compile", lambda model, example, threads: Pass(model))
    monkeypatch.setattr(building, "export_onnx", lambda model, example, path: path.touch())
    monkeypatch.setattr(building, "OnnxModel", None)


@pytest.fixture
def measured(quick, dense, pruned, image, tmp_path):
    """Measure with some parts replaced: a function from arguments to forms by name."""

    def measure(**arguments):
        found = measure_forms(dense, pruned, image, tmp_path, batches=(2, 1), **arguments)
        assert [form["name"] for form in found] == NAMES
        return {form["name"]: form for form in found}

    return measure


def test_every_form_has_its_figures(dense, pruned, image, tmp_path, monkeypatch):
    for name in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(name, reason="needs pip install 'pruneflow[deploy]'")
    monkeypatch.setattr(forms, "_MOST_TURNS", 3)
    monkeypatch.setattr(forms, "peak_bytes", lambda models, threads: [1_000_000] * len(models))
    batch = torch.randn(5, 3, 8, 8)
    found = measure_forms(
        dense,
        pruned,
        image,
        tmp_path,
        evaluate=lambda run: float(run(batch).argmax(1).float().mean()),
        batches=(1, 4),
        threads=1,
    )
    assert [form["name"] for form in found] == NAMES
    notes = [form["note"] for form in found]
    what_is_left = notes.pop(4)
    assert notes == [""] * 6
    models = [dense] * 2 + [pruned] * 5
    for form, model in zip(found, models, strict=True):
        assert form["accuracy"] == float(model.eval()(batch).argmax(1).float().mean())
        assert list(form["seconds"]) == list(form["speedup"]) == ["1", "4"]
        assert form["throughput"] == max(1 / form["seconds"]["1"], 4 / form["seconds"]["4"])
        assert form["peak_bytes"] == 1_000_000
    sizes = {form["name"]: form["bytes"] for form in found}
    assert sizes["dense"] == sizes["plain zeros"] > 4 * (288 * 4 + 8 * 27)
    assert sizes["packed"] == sizes["sparse runtime"] == (tmp_path / "model.packed").stat().st_size
    assert sizes["packed"] < sizes["dense"] / 2
    files = ["model.packed", "shrunk.pt2", "shrunk.onnx", "model.packed"]
    assert [form["file"] for form in found] == [None] * 3 + files
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(set(files))
    program = torch.export.load(tmp_path / "shrunk.pt2").module()
    assert torch.allclose(program(batch), pruned(batch), atol=1e-5)
    left, parameters = (sum(p.numel() for p in m.parameters()) for m in (program, dense))
    assert left < parameters
    assert what_is_left.startswith(f"{left:,} of {parameters:,} parameters and ")
    assert sizes["shrunk"] == (tmp_path / "shrunk.pt2").stat().st_size
    assert sizes["shrunk, ONNX Runtime"] == (tmp_path / "shrunk.onnx").stat().st_size
    assert json.loads(json.dumps(found)) == found


def test_models_threads_and_gradients_are_left_as_they_were(measured, dense, pruned):
    before = torch.get_num_threads()
    states = [{n: t.clone() for n, t in m.state_dict().items()} for m in (dense, pruned)]
    seen = []
    measured(threads=before + 1, evaluate=lambda run: seen.append(torch.get_num_threads()) or 0.5)
    assert set(seen) == {before + 1}
    assert torch.get_num_threads() == before
    for model, state in zip((dense, pruned), states, strict=True):
        assert all(module.training for module in model.modules())
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_a_form_that_is_refused_gives_the_reason(measured, monkeypatch):
    def missing(model, example, path):
        raise ImportError("`onnxscript` must be installed ...; run pip install 'pruneflow[deploy]'")

    def refused(model, example, fixed_size):
        raise ValueError("`model` must be traceable by torch.fx")

    monkeypatch.setattr(building, "export_onnx", missing)
    monkeypatch.setattr(building, "shrink", refused)
    found = measured()
    assert found["dense, ONNX Runtime"]["note"] == "needs pip install 'pruneflow[deploy]'"
    for name in ("shrunk", "shrunk, ONNX Runtime"):
        assert found[name]["note"] == "`model` must be traceable by torch.fx"
        assert found[name]["bytes"] is None and not found[name]["seconds"]
    assert found["packed"]["seconds"]


def test_the_shrunk_forms_of_an_earlier_run_are_not_left_for_those_of_this_one(
    measured, monkeypatch, tmp_path, dense, pruned
):
    def refused(model, example, fixed_size):
        raise ValueError("`model` must be traceable by torch.fx")

    monkeypatch.setattr(building, "shrink", refused)
    for again in (
        measured,
        lambda: write_forms(dense, pruned, [], tmp_path, batches=(), threads=None),
    ):
        for name in ("shrunk.pt2", "shrunk.onnx", "mine.onnx"):
            (tmp_path / name).write_bytes(b"of another model")
        again()
        assert {path.name for path in tmp_path.iterdir()} == {"model.packed", "mine.onnx"}


def test_a_form_that_computes_something_else_has_no_figures(measured, monkeypatch):
    monkeypatch.setattr(
        building, "sparse_compile", lambda model, example, threads: Pass(model, shift=0.01)
    )
    form = measured(evaluate=lambda run: 1.0)["sparse runtime"]
    assert form["note"].startswith("Not measured: its outputs are ")
    assert not form["seconds"] and form["accuracy"] is None and form["bytes"] is None


def test_a_program_that_computes_something_else_is_not_written(measured, monkeypatch, tmp_path):
    monkeypatch.setattr(building, "shrink", lambda model, example, fixed_size: Pass(model, shift=1))
    form = measured()["shrunk"]
    assert form["note"].startswith(
        "shrunk.pt2 was not written: once loaded, its outputs for a batch"
    )
    assert form["bytes"] is None and form["file"] is None
    assert not list(tmp_path.glob("*.pt2"))


def test_where_peak_memory_cannot_be_told_it_is_left_out(measured, monkeypatch):
    monkeypatch.setattr(forms, "sys", SimpleNamespace(platform="darwin"))
    found = measured()
    assert found["dense"]["seconds"]
    for form in found.values():
        assert form["peak_bytes"] is None and "memory was" not in form["note"]


def test_what_one_form_loads_does_not_reach_the_others(measured, monkeypatch):
    def damaged(path):
        return {name: tensor + 1 for name, tensor in building_load(path).items()}

    building_load = building.load_packed
    monkeypatch.setattr(building, "load_packed", damaged)
    found = measured()
    assert found["packed"]["note"].startswith("Not measured: its outputs are ")
    assert found["plain zeros"]["seconds"] and found["shrunk"]["seconds"]


def test_what_a_form_warns_of_while_it_is_built_is_its_note(measured, monkeypatch):
    def without_compiler(model, example, threads):
        import warnings

        warnings.warn("no compiler: the dense model runs; set CXX", stacklevel=2)
        return model

    monkeypatch.setattr(building, "sparse_compile", without_compiler)
    form = measured()["sparse runtime"]
    assert form["note"] == "no compiler: the dense model runs; set CXX"
    assert form["seconds"]


def test_peak_memory_that_cannot_be_measured_is_noted(measured, monkeypatch):
    said = "ModuleNotFoundError: No module named 'mine'"
    monkeypatch.setattr(
        forms, "peak_bytes", lambda models, threads: [1, said, *range(2, len(models))]
    )
    found = measured()
    form = found["plain zeros"]
    assert form["peak_bytes"] is None and form["seconds"]
    assert form["note"] == f"Peak memory was not measured: {said}."
    assert found["dense"]["peak_bytes"] == 1 and found["packed"]["peak_bytes"] == 2


def test_a_class_that_cannot_be_pickled_loses_peak_memory_alone(quick, pruned, image, tmp_path):
    class Local(nn.Module):
        def forward(self, batch):
            return batch.flatten(1)

    found = measure_forms(Local(), Local(), image, tmp_path, batches=(1,))
    assert found[0]["seconds"] and found[0]["peak_bytes"] is None
    assert "Local" in found[0]["note"]


def test_times_and_speedup_are_those_of_the_form(measured, monkeypatch):
    monkeypatch.setattr(
        building, "sparse_compile", lambda model, example, threads: Pass(model, seconds=0.02)
    )
    found = measured()
    slow, dense = found["sparse runtime"], found["dense"]
    assert slow["seconds"]["1"] >= 0.02
    assert slow["speedup"]["2"] < 0.5
    assert dense["speedup"] == {"1": 1.0, "2": 1.0}


def test_a_network_that_views_its_images_as_rows_runs(quick, image, tmp_path):
    class Rows(nn.Module):
        def forward(self, batch):
            return (batch + 1).view(len(batch), -1)

    found = measure_forms(Rows(), Rows(), image, tmp_path, batches=(2,))
    assert found[0]["seconds"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"example_input": torch.ones(2, 3, 8, 8)}, r"`example_input` .*, got .* \(2, 3, 8, 8\)"),
        ({"example_input": torch.tensor(1.0)}, r"`example_input` .*, got .* \(\)"),
        ({"example_input": torch.ones(1, 5)}, "Expected 3D .* input to conv2d"),
        ({"batches": ()}, r"`batches` .*, got \(\)"),
        ({"batches": (0, 4)}, r"`batches` .*, got \(0, 4\)"),
        ({"threads": 0}, "`threads` .*, got 0"),
    ],
)
def test_refusals(quick, dense, pruned, image, tmp_path, arguments, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        measure_forms(
            dense,
            pruned,
            **{"example_input": image, "folder": tmp_path, "batches": (1,)} | arguments,
        )
    assert not list(tmp_path.iterdir())


def form(name, size, times, note=""):
    seconds = dict(zip(("1", "16"), times, strict=True)) if times else {}
    return {
        "name": name,
        "file": None,
        "bytes": size,
        "peak_bytes": size and 2 * size,
        "seconds": seconds,
        "spread": dict.fromkeys(seconds, 0.02),
        "speedup": {batch: 0.008 / time for batch, time in seconds.items()},
        "throughput": 16 / times[1] if times else None,
        "accuracy": 0.8058 if times else None,
        "note": note,
    }


def test_the_table_says_what_is_a_gain_and_what_is_not():
    rows = table(
        [
            form("dense", 44_800_000, (0.008, 0.008)),
            form("dense, ONNX Runtime", 44_800_000, (0.001, 0.006)),
            form("plain zeros", 44_799_000, (0.008, 0.008)),
            form("packed", 1_120_000, (0.008, 0.008)),
            form("shrunk, ONNX Runtime", 20_000_000, (0.00096, 0.003)),
            form("sparse runtime", 1_120_000, (0.0005, 0.002), "said."),
            form("shrunk", None, None, "needs pip install 'pruneflow[deploy]'"),
        ]
    )
    assert rows[0] == (
        *("form", "file, MB", "peak memory, MB", "batch 1, ms", "batch 16, ms"),
        *("samples/s", "accuracy", "note"),
    )
    assert rows[1][1:] == (
        *("44.8 (1.00×)", "89.6 (1.00×)", "8 ± 2 % (1.00×)", "8 ± 2 % (1.00×)"),
        *("2,000", "80.58 %", ""),
    )
    assert rows[6][1:] == (
        *("1.12 (40.0×)", "2.24 (40.0×)", "0.5 ± 2 % (16.0×)", "2 ± 2 % (4.00×)"),
        *("8,000", "80.58 %", "said."),
    )
    assert rows[7][1:] == (*["–"] * 6, "needs pip install 'pruneflow[deploy]'")
    assert [row[-1] for row in rows[2:6]] == [
        "",
        "No gain here in size or in memory or in speed.",
        "No gain here in speed.",
        "No gain here in speed at batch 1.",
    ]


def test_noisy_times_and_the_ratios_they_enter_into_are_marked():
    dense, packed = (form(name, 1000, (0.008, 0.008)) for name in ("dense", "packed"))
    packed["spread"]["1"], dense["spread"]["16"] = 0.3, 0.11
    (dense_cells, packed_cells) = ([row[3], row[4], row[5]] for row in table([dense, packed])[1:])
    assert dense_cells == ["8 ± 2 % (1.00×)", "≈8 ± 11 % (≈1.00×)", "≈2,000"]
    assert packed_cells == ["≈8 ± 30 % (≈1.00×)", "8 ± 2 % (≈1.00×)", "≈2,000"]


class Wavering:
    """A run that takes longer in every second burst, as long as it is disturbed."""

    def __init__(self, disturbed):
        self.disturbed, self.bursts = disturbed, 0

    def __call__(self, run, batch, least):
        if least:
            self.bursts += 1
        return 1.0 if self.bursts > self.disturbed else 1.0 + self.bursts % 4


@pytest.mark.parametrize(("disturbed", "tries", "noisy"), [(0, 1, 0), (14, 2, 0), (10**6, 2, 1)])
def test_noisy_times_are_measured_again_but_not_for_ever(monkeypatch, disturbed, tries, noisy):
    wavering = Wavering(disturbed)
    monkeypatch.setattr(forms, "_seconds", wavering)
    monkeypatch.setattr(forms, "_REST", 0)
    times = forms._calmest_turns({"dense": lambda batch: batch}, torch.ones(1))
    assert wavering.bursts == tries * 2 * forms._MOST_TURNS
    assert (forms._spread(times["dense"]) > forms._NOISY) == noisy


def test_markdown_holds_the_cells_of_the_table():
    lines = markdown([form("dense", 8_000_000, (0.008, 0.008), "a|b\nc")]).splitlines()
    assert lines[1] == "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |"
    assert lines[2].endswith("| 2,000 | 80.58 % | a\\|b c |")
    assert len(lines) == 3
