"""The contents of a report: the facts of a run as titles, notes and tables of text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pruneflow.deploy.classifying import snippet
from pruneflow.deploy.forms import Form, table
from pruneflow.report.facts import Facts
from pruneflow.report.plots import sparsity_text
from pruneflow.report.rendering import Document, Section

_MISSING = "–"


def _percent(fraction: float | None) -> str:
    """Format an accuracy.

    Example:
        >>> _percent(0.93214), _percent(None), _percent(float("nan"))
        ('93.21 %', '–', '–')
    """
    return _MISSING if fraction is None or math.isnan(fraction) else f"{100 * fraction:.2f} %"


def _sparsity(fraction: float | None) -> str:
    return _MISSING if fraction is None or math.isnan(fraction) else sparsity_text(fraction)


def _count(number: int | None) -> str:
    return _MISSING if number is None else f"{number:,}"


def _duration(seconds: float) -> str:
    """Format a wall time.

    Example:
        >>> _duration(3.14), _duration(725), _duration(3725)
        ('3.1 s', '12 min 05 s', '1 h 02 min 05 s')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min {rest:02} s" if hours else f"{minutes} min {rest:02} s"


def _points(change: float) -> str:
    return _MISSING if math.isnan(change) else f"{100 * change:+.2f} points".replace("-", "−")


def _verdict(facts: Facts) -> tuple[str, str, bool]:
    """Headline, explanation, and whether the target was reached."""
    dense, final, target = facts["dense"], facts["final"], facts["target"]
    weights = sum(layer["weights"] for layer in facts["layers"])
    pruned = sum(layer["zeros"] for layer in facts["layers"])
    change = final["test_accuracy"] - dense["test_accuracy"]
    what = f"{_sparsity(final['sparsity'])} of {weights:,} prunable weights are pruned"
    accuracy = (
        f"Test accuracy went from {_percent(dense['test_accuracy'])} (dense) to "
        f"{_percent(final['test_accuracy'])} ({_points(change)})."
    )
    if target is None:
        return "Sparsity was not known in advance.", f"{what}. {accuracy}", True
    if facts["costs"] is not None:
        reached = final["removed"] >= target * (1 - 1e-9)
        what = (
            f"{_sparsity(final['removed'])} of the {_costs(facts)} of prunable weights "
            f"{'is' if facts['costs'] == 'latency' else 'are'} removed: {what}"
        )
        over = final["removed"] - target
        if not reached:
            explanation = f"{what} (target {_sparsity(target)}). {accuracy}"
            return "Target not reached.", explanation, False
        return _reached(facts, what, over, accuracy)
    # With a scope per tensor, each tensor rounds its number of pruned weights.
    missing = target * weights - pruned
    if missing > 0.5 * len(facts["layers"]):
        done, planned = len(facts["rounds"]), len(facts["plan"])
        hint = " Methods that remove whole filters only approximate the target."
        explanation = (
            f"{what}, {math.ceil(missing):,} weights short of the target of {_sparsity(target)}, "
            f"after {done} of {planned} rounds.{hint if done == planned else ''} {accuracy}"
        )
        return "Target not reached.", explanation, False
    if not facts["rounds"]:
        return "Nothing was pruned.", f"{what}; no rounds were planned. {accuracy}", True
    return _reached(facts, what, pruned / weights - target if weights else 0.0, accuracy)


_OVERSHOT = 0.005  # fraction of the weights or costs; less may be due to rounding


def _reached(facts: Facts, what: str, over: float, accuracy: str) -> tuple[str, str, bool]:
    target = _sparsity(facts["target"])
    if over <= _OVERSHOT:
        return "Target reached.", f"{what} (target {target}). {accuracy}", True
    parts = {
        "Channels": "whole channels are removed, 16 at a time in wide layers",
        "Block": "whole blocks are removed",
    }
    reason = parts.get(facts["granularity"].partition("(")[0], "weights are removed in groups")
    more = f"{100 * over:.2f} points more than the target of {target}, since {reason}"
    return "Target exceeded.", f"{what}. This is {more}. {accuracy}", True


def _costs(facts: Facts) -> str:
    """What a target counts. Latency is an estimate: a sum of costs per weight."""
    costs = (facts["costs"] or "weights").replace("_", "-")
    return f"estimated {costs}" if costs == "latency" else costs


def _limits(facts: Facts) -> str:
    """A sentence if only part of the test set was used, or ""."""
    tested, pictures = facts["final"]["tested"], facts["final"]["test_pictures"]
    if pictures is None or tested >= pictures:
        return ""
    return (
        f"Only {tested:,} of {pictures:,} test images were used (trainer.limit_test_batches): all "
        "test accuracies refer to these."
    )


def _target(facts: Facts) -> str:
    if facts["target"] is None:
        return "target: not known in advance"
    counted = "" if facts["costs"] is None else f" of {_costs(facts)}"
    return f"target: {_sparsity(facts['target'])}{counted}"


def _before_and_after(facts: Facts) -> Section:
    dense, final, size = facts["dense"], facts["final"], facts["size"]
    weights = sum(layer["weights"] for layer in facts["layers"])
    kept = weights - sum(layer["zeros"] for layer in facts["layers"])
    smaller = size["model_bytes"] < 0.99 * size["dense_bytes"]
    return Section(
        title="Before and after",
        header=("", "dense", "pruned", "change"),
        rows=(
            *(
                (name, _percent(before), _percent(after), _points(after - before))
                for name, before, after in (
                    ("test accuracy", dense["test_accuracy"], final["test_accuracy"]),
                    ("validation accuracy", dense["val_accuracy"], final["val_accuracy"]),
                )
            ),
            (
                "sparsity of prunable weights",
                _sparsity(0.0),
                _sparsity(final["sparsity"]),
                _target(facts),
            ),
            ("prunable weights kept", _count(weights), _count(kept), ""),
            (
                "parameters kept, all counted",
                _count(size["parameters"]),
                _count(size["remaining"]),
                f"compression ratio {size['compression_ratio']:.2f}×",
            ),
            (
                "multiply-adds, one sample",
                _count(size["multiply_adds"]),
                _count(size["remaining_multiply_adds"]),
                f"theoretical speed-up {size['theoretical_speedup']:.2f}×",
            ),
            (
                "model.safetensors, bytes",
                _count(size["dense_bytes"]),
                _count(size["model_bytes"]),
                "" if smaller else "zeros are stored; the file is not smaller",
            ),
            (
                "model.packed, bytes",
                _count(size["dense_bytes"]),
                _count(size["packed_bytes"]),
                f"{size['dense_bytes'] / size['packed_bytes']:.1f}× smaller",
            ),
        ),
        note="The theoretical speed-up is a ratio of multiply-adds, not of measured times.",
    )


def _rounds(facts: Facts) -> Section:
    planned = {line["round"]: line for line in facts["plan"]}
    finished = {line["round"]: line for line in facts["rounds"]}
    rows = [("0 (dense)", "0", *[_MISSING] * 6, _percent(facts["dense"]["val_accuracy"]))]
    for number in sorted({*planned, *finished}):
        plan, done = planned.get(number), finished.get(number)
        rows.append(
            (
                str(number) if done else f"{number} (not run)",
                str(done["epoch"] if done else plan["at"] if plan else _MISSING),
                _percent(plan["amount"]) if plan else _MISSING,
                _sparsity(plan["sparsity"]) if plan else _MISSING,
                _count(plan["kept"]) if plan else _MISSING,
                _sparsity(done["sparsity"]) if done else _MISSING,
                _count(done["kept"]) if done else _MISSING,
                _percent(done["pruned_accuracy"]) if done else _MISSING,
                _percent(done["fine_tuned_accuracy"]) if done else _MISSING,
            )
        )
    return Section(
        title="Plan and rounds",
        header=(
            "round",
            "epoch",
            "amount of the remaining",
            "planned sparsity",
            "planned to keep",
            "measured sparsity",
            "weights kept",
            "just pruned",
            "fine-tuned",
        ),
        rows=tuple(rows),
        note=(
            "A round prunes at the start of its epoch; epochs are counted from 0 over the whole "
            "run. The last two columns are validation accuracy, right after pruning and at the end "
            "of the round."
        ),
    )


def _layers(facts: Facts) -> Section:
    rows = [
        (
            layer["name"],
            " × ".join(str(length) for length in layer["shape"]),
            _count(layer["weights"]),
            _count(layer["weights"] - layer["zeros"]),
            _sparsity(layer["zeros"] / layer["weights"] if layer["weights"] else None),
        )
        for layer in facts["layers"]
    ]
    notes = {
        "Nothing is left of": [
            layer["name"] for layer in facts["layers"] if 0 < layer["weights"] == layer["zeros"]
        ],
        "Left out because frozen": facts["frozen"],
    }
    lines = [f"{what}: {', '.join(names)}." for what, names in notes.items() if names]
    if facts["stay_dense"]:
        lines.append(f"{facts['stay_dense']}.")
    return Section(
        title="Layers",
        header=("tensor", "shape", "weights", "kept", "sparsity"),
        rows=tuple(rows),
        note=" ".join(lines),
    )


def _wall_time(facts: Facts) -> Section:
    times = {stage: _duration(seconds) for stage, seconds in facts["seconds"].items()}
    if facts["dense_cached"]:
        times["dense"] = "from the cache, not trained again"
    return Section("Wall time", header=("stage", "time"), rows=tuple(times.items()))


def _origin(facts: Facts) -> Section:
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return Section(
        title="How it was made",
        header=("what", "value"),
        rows=(
            ("command", facts["command"]),
            ("seed", str(facts["seed"])),
            ("schedule", facts["schedule"]),
            ("importance", facts["importance"]),
            ("granularity", facts["granularity"]),
            ("costs", facts["costs"] or "weights are counted"),
            ("scope", facts["scope"]),
            ("dense epochs", str(facts["dense"]["epochs"])),
            ("versions", versions),
            ("commit", facts["commit"] or "not known"),
            ("machine", facts["machine"]),
        ),
    )


def forms_section(forms: Sequence[Form]) -> Section:
    """The table that compares all forms."""
    header, *rows = table(forms)
    return Section(
        title="Deployment formats",
        header=header,
        rows=tuple(rows),
        note=(
            "Each form is built from its file and measured on the CPU: latency in turns in one "
            "process, peak memory in a separate process (on Linux), accuracy on the test set. "
            "Times are medians ± half the interquartile range; if that is more than 10 %, the time "
            "and ratios with it are marked by ≈ and may differ on an idle machine. In brackets: "
            "the dense network in PyTorch divided by this form; more than 1 is better. No gain: "
            "not smaller than the dense network in PyTorch, or not faster than the fastest dense "
            "form."
        ),
    )


_READ_BY = {
    "model.safetensors": "PyTorch: load_state_dict(safetensors.torch.load_file(FILE))",
    "model.packed": "pruneflow: load_state_dict(pruneflow.deploy.load_packed(FILE))",
    "shrunk.pt2": "PyTorch, without the model's code: torch.export.load(FILE).module()",
    "shrunk.onnx": "ONNX Runtime and other tools that support ONNX",
}


def _files(facts: Facts) -> Section:
    size = facts["size"]
    written: dict[str, int | None] = {
        "model.safetensors": size["model_bytes"],
        "model.packed": size["packed_bytes"],
        **{form["file"]: form["bytes"] for form in facts["forms"] if form["file"] is not None},
    }
    shrunk = any(name.startswith("shrunk") for name in written)
    return Section(
        title="Files",
        header=("file", "bytes", "read by"),
        rows=tuple((name, _count(bytes_), _READ_BY[name]) for name, bytes_ in written.items()),
        note=(
            "The shrunk files accept any batch size, but only images of the size used for testing."
            if shrunk
            else ""
        ),
    )


def _use(facts: Facts, folder: str) -> Section:
    about = facts["classifier"]
    if about["mean"] is None or about["std"] is None:
        return Section(
            title="Use it",
            note=(
                "The datamodule has no `mean` and `std`, so the files do not describe how to "
                "normalise images: load_classifier needs both."
            ),
        )
    picture = f"{folder}/example.png" if facts["example"] is not None else "picture.png"
    shown = "" if facts["example"] is None else f" The class of example.png is {facts['example']}."
    channels, height, width = about["image_shape"]
    return Section(
        title="Use it",
        code=snippet(about, folder, picture),
        note=(
            f"Run this in the folder in which the run was started.{shown} Any image can be used: "
            f"it is converted to {'grey' if channels == 1 else 'RGB'}, cropped and resized to "
            f"{width} × {height} pixels. The class names, mean and std are in report.json and in "
            "the metadata of model.safetensors, model.packed and shrunk.onnx."
        ),
    )


def document(facts: Facts, folder: str) -> Document:
    """The report of a run.

    Args:
        facts: Its results.
        folder: Path of its folder, relative to where it was started.
    """
    verdict, explanation, reached = _verdict(facts)
    per_class = zip(facts["classes"], facts["final"]["test_per_class"], strict=True)
    return Document(
        title=f"Pruning report: {facts['recipe']}",
        verdict=verdict,
        explanation=explanation,
        reached=reached,
        warning=_limits(facts),
        sections=(
            _before_and_after(facts),
            *([forms_section(facts["forms"])] if facts["forms"] else []),
            _files(facts),
            _use(facts, folder),
            _rounds(facts),
            Section(
                title="Plots",
                plots=(
                    ("accuracy", "Accuracy and sparsity over the epochs"),
                    ("rounds", "Validation accuracy against sparsity, round by round"),
                    ("density", "Weights kept in each layer"),
                ),
            ),
            _layers(facts),
            Section(
                title="Test accuracy of each class",
                header=("class", "accuracy"),
                rows=tuple((name, _percent(accuracy)) for name, accuracy in per_class),
            ),
            _wall_time(facts),
            _origin(facts),
        ),
    )
