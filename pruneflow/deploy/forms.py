"""The deliverable table: what each form of a pruned model is worth, measured side by side.

Every form is first compared with the model it stands for, and has no figures where it computes
something else. Latencies are measured in one process in which the forms take turns, so that
whatever else the machine does touches them alike; peak memory is measured in a process for each.
"""

from __future__ import annotations

import copy
import math
import pickle
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor, nn

from pruneflow.deploy.building import Builder, Built, Run, in_pytorch
from pruneflow.deploy.peak import peak_bytes

_MOST_TURNS, _FEWEST_TURNS = 7, 3
_SECONDS = 20.0  # for all forms at one batch size, unless the fewest turns take longer
# Seconds of a turn: without work, with what is not timed, and timed; shorter runs are repeated.
# ONNX Runtime's threads go on spinning for 30 ms, and whoever comes next would be the slower.
_REST, _WARM_UP, _BURST = 0.04, 0.015, 0.015
# Times that spread by more are noisy: measured anew, up to so many times in all, and else marked.
_NOISY, _MOST_TRIES = 0.1, 2
# What counts as a gain: bytes, peaks and times differ by a little anyhow.
_SMALLER, _LIGHTER, _FASTER = 0.99, 0.95, 1.05
_MISSING = "–"


class Form(TypedDict):
    """One form of the model, in plain builtins; what was not measured is None or has no entry."""

    name: str
    file: str | None  # its name in the folder; None where it was only weighed
    bytes: int | None  # of its file
    peak_bytes: int | None  # of memory, while it runs the largest batch
    seconds: dict[str, float]  # batch size -> median time of a run
    spread: dict[str, float]  # batch size -> half the interquartile range of that / its median
    speedup: dict[str, float]  # batch size -> median over the turns of dense in PyTorch / this
    throughput: float | None  # samples a second, at the best batch size
    accuracy: float | None  # what `evaluate` says of this very form
    note: str  # why there are no figures, or what was said while it was built


def measure_forms(
    dense: nn.Module,
    pruned: nn.Module,
    example_input: Tensor,
    folder: str | Path,
    *,
    evaluate: Callable[[Run], float] | None = None,
    batches: Sequence[int] = (1, 16, 128),
    threads: int | None = None,
) -> list[Form]:
    """Build each form of a pruned model; measure its size, memory, time and accuracy on the CPU.

    The forms are: dense, in PyTorch and in ONNX Runtime; the pruned model with plain zeros; packed
    and loaded again; shrunk, in PyTorch and in ONNX Runtime; and compiled by the sparse runtime,
    from the packed file, shrunk where it takes that. PyTorch runs images in `channels_last` where
    that is faster for the dense model at the largest batch. A form that cannot be built, or
    computes something else, has a note that says so and no figures.

    Args:
        dense: The model before pruning.
        pruned: The model with exact zeros. Both are left as they are.
        example_input: A batch of one, of real data: outputs are compared on it.
        folder: Gets `model.packed`, `shrunk.pt2` (for `torch.export.load`) and `shrunk.onnx`; the
            shrunk ones of an earlier run are deleted first.
        evaluate: Gives the accuracy of a function from a batch on the CPU to outputs.
        batches: Batch sizes to time; peak memory is measured at the largest.
        threads: Number of threads of every form; None takes PyTorch's.

    Returns:
        The forms, dense in PyTorch first.

    Raises:
        ValueError: If `example_input` is no batch of one, or a batch size or `threads` is below 1.

    Example:
        `print(markdown(measure_forms(dense, pruned, image, "outputs/forms")))`
    """
    if example_input.dim() == 0 or len(example_input) != 1:
        raise ValueError(
            "`example_input` is expected to be a batch of one, but a tensor of shape "
            f"{tuple(example_input.shape)} came; give example_input[:1]"
        )
    if not batches or min(batches) < 1:
        raise ValueError(f"`batches` is expected to hold sizes from 1 on, but {batches!r} came")
    if threads is not None and threads < 1:
        raise ValueError(f"`threads` is expected to be 1 or more, but {threads} came")
    dense, pruned = (copy.deepcopy(model).cpu().eval() for model in (dense, pruned))
    example = example_input.detach().cpu()
    inputs = {size: example.repeat(size, *[1] * (example.dim() - 1)) for size in sorted(batches)}
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads or before)
        with tempfile.TemporaryDirectory() as scratch:
            layout = _faster_layout(dense, inputs[max(batches)])
            builder = Builder(dense, pruned, example, Path(folder), Path(scratch), layout)
            built, notes = builder.build()
            runs = {name: form.run for name, form in built.items()}
            times = {size: _calmest_turns(runs, batch) for size, batch in inputs.items()}
            forms = []
            for name, note in notes.items():
                form = _form(name, note)
                if name in built:
                    _add_times(form, times)
                    file = built[name].file
                    form["bytes"] = file.stat().st_size
                    form["file"] = file.name if file.parent == builder.folder else None
                    if evaluate is not None:
                        with torch.no_grad():
                            form["accuracy"] = evaluate(built[name].run)
                forms.append(form)
            _add_peaks(forms, built, inputs[max(batches)], Path(scratch))
            return forms
    finally:
        torch.set_num_threads(before)


def table(forms: Sequence[Form]) -> list[tuple[str, ...]]:
    """Put forms into a table of text.

    Of the times of a run stands the median, and after ± half of their interquartile range; where it
    is more than a tenth, the time and all ratios that it enters into have a ≈ before them. In
    brackets stands dense in PyTorch divided by this form: more than 1 is better. A form that is
    not smaller than dense, in its file or in memory, or not 1.05 times as fast as the fastest dense
    form at a batch size, is told to be no gain there.

    Args:
        forms: As `measure_forms` gives them.

    Returns:
        The header, and a row for each form.
    """
    dense = forms[0]
    batches = list(dense["seconds"])
    header = (
        *("form", "file, MB", "peak memory, MB"),
        *(f"batch {batch}, ms" for batch in batches),
        *("samples/s", "accuracy", "note"),
    )
    rows = [
        (
            form["name"],
            *(_megabytes(form[key], dense[key]) for key in ("bytes", "peak_bytes")),
            *(
                _time(form, dense, batch) if batch in form["seconds"] else _MISSING
                for batch in batches
            ),
            _samples(form),
            _MISSING if form["accuracy"] is None else f"{100 * form['accuracy']:.2f} %",
            " ".join(filter(None, (form["note"], _no_gain(form, forms)))),
        )
        for form in forms
    ]
    return [header, *rows]


def _time(form: Form, dense: Form, batch: str) -> str:
    """Format a time with its spread and its ratio to that of dense.

    Example:
        >>> dense = {**_form("dense", ""), "seconds": {"1": 0.003}, "spread": {"1": 0.02}}
        >>> noisy = {"seconds": {"1": 0.001}, "speedup": {"1": 3.0}, "spread": {"1": 0.3}}
        >>> _time({**dense, "speedup": {"1": 1.0}}, dense, "1")
        '3 ± 2 % (1.00×)'
        >>> _time({**dense, **noisy}, dense, "1")
        '≈1 ± 30 % (≈3.00×)'
    """
    own, reference = ("≈" if f["spread"][batch] > _NOISY else "" for f in (form, dense))
    time = f"{own}{_figure(1000 * form['seconds'][batch])} ± {100 * form['spread'][batch]:.0f} %"
    return f"{time} ({own or reference}{_ratio(form['speedup'][batch])})"


def _samples(form: Form) -> str:
    if form["throughput"] is None:
        return _MISSING
    noisy = any(spread > _NOISY for spread in form["spread"].values())
    return f"{'≈' if noisy else ''}{form['throughput']:,.0f}"


def markdown(forms: Sequence[Form]) -> str:
    r"""Put forms into a Markdown table, as `table` has it.

    Args:
        forms: As `measure_forms` gives them.

    Example:
        >>> dense = {**_form("dense", ""), "bytes": 4_000_000, "accuracy": 0.8}
        >>> print(markdown([dense, {**dense, "name": "packed", "bytes": 100_000}]))
        | form | file, MB | peak memory, MB | samples/s | accuracy | note |
        | --- | ---: | ---: | ---: | ---: | --- |
        | dense | 4 (1.00×) | – | – | 80.00 % |  |
        | packed | 0.1 (40.0×) | – | – | 80.00 % |  |
    """
    header, *rows = (
        [" ".join(cell.replace("|", "\\|").split()) for cell in row] for row in table(forms)
    )
    rule = ["---", *("---:" for _ in header[1:-1]), "---"]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def _form(name: str, note: str) -> Form:
    return {
        "name": name,
        "file": None,
        "bytes": None,
        "peak_bytes": None,
        "seconds": {},
        "spread": {},
        "speedup": {},
        "throughput": None,
        "accuracy": None,
        "note": note,
    }


# -- measuring -------------------------------------------------------------------------------------


def _faster_layout(network: nn.Module, batch: Tensor) -> torch.memory_format:
    if batch.dim() != 4:
        return torch.contiguous_format
    layouts = (torch.contiguous_format, torch.channels_last)
    rows, pixels = (
        in_pytorch(copy.deepcopy(network).to(memory_format=layout), layout) for layout in layouts
    )
    try:
        times = _take_turns({"rows": rows, "pixels": pixels}, batch, most=_FEWEST_TURNS)
    except RuntimeError:  # a model that views its images as rows
        return torch.contiguous_format
    faster = statistics.median(times["pixels"]) < statistics.median(times["rows"])
    return torch.channels_last if faster else torch.contiguous_format


@torch.inference_mode()
def _take_turns(
    runs: Mapping[str, Run], batch: Tensor, most: int = _MOST_TURNS
) -> dict[str, list[float]]:
    for run in runs.values():
        _seconds(run, batch, 0)  # what the first run allocates and compiles is not timed
    times: dict[str, list[float]] = {name: [] for name in runs}
    began = time.perf_counter()
    for turn in range(most):
        if turn >= _FEWEST_TURNS and time.perf_counter() - began > _SECONDS:
            break
        for name, run in runs.items():
            # Caches are the last form's, and its threads wait for work, spinning for a while.
            time.sleep(_REST)
            _seconds(run, batch, _WARM_UP)
            times[name].append(_seconds(run, batch, _BURST))
    return times


def _calmest_turns(runs: Mapping[str, Run], batch: Tensor) -> dict[str, list[float]]:
    """Take turns, and again while what else the machine does makes them noisy and time is left."""
    began, tries = time.perf_counter(), list[tuple[float, dict[str, list[float]]]]()
    while True:
        times = _take_turns(runs, batch)
        tries.append((max(map(_spread, times.values())), times))
        worst, calmest = min(tries, key=lambda found: found[0])
        passed = time.perf_counter() - began
        if worst <= _NOISY or len(tries) == _MOST_TRIES or passed > _SECONDS:
            return calmest


def _spread(samples: Sequence[float]) -> float:
    """Half the interquartile range, relative to the median.

    Example:
        >>> _spread([1.0, 2.0, 2.0, 2.0, 9.0]), _spread([1.0, 2.0, 3.0])
        (0.0, 0.25)
    """
    first, median, third = statistics.quantiles(samples, n=4, method="inclusive")
    return (third - first) / 2 / median


def _seconds(run: Run, batch: Tensor, least: float) -> float:
    """The mean time of as many runs as take `least` seconds, and of one at least."""
    count, began = 0, time.perf_counter()
    while True:
        run(batch)
        count += 1
        passed = time.perf_counter() - began
        if passed >= least:
            return passed / count


def _add_times(form: Form, times: Mapping[int, Mapping[str, Sequence[float]]]) -> None:
    for size, samples in times.items():
        own = samples[form["name"]]
        form["seconds"][str(size)] = statistics.median(own)
        form["spread"][str(size)] = _spread(own)
        form["speedup"][str(size)] = statistics.median(
            one / other for one, other in zip(samples["dense"], own, strict=True)
        )
    form["throughput"] = max(int(size) / seconds for size, seconds in form["seconds"].items())


def _add_peaks(
    forms: Sequence[Form], built: Mapping[str, Built], batch: Tensor, scratch: Path
) -> None:
    if sys.platform != "linux":
        return
    models: dict[str, tuple[Path, Path]] = {}
    peaks: dict[str, int | str] = {}
    for name, own in built.items():
        model, inputs = own.file, scratch / f"{own.layout}.pt"
        try:
            if own.network is not None:
                model = scratch / f"{name}.pt"
                torch.save(own.network, model)
        except (RuntimeError, AttributeError, TypeError, pickle.PicklingError) as error:
            peaks[name] = str(error)
        else:
            if not inputs.exists():
                torch.save(batch.contiguous(memory_format=own.layout), inputs)
            models[name] = model, inputs
    measured = peak_bytes(list(models.values()), torch.get_num_threads())
    peaks.update(zip(models, measured, strict=True))
    for form in forms:
        peak = peaks.get(form["name"])
        if isinstance(peak, str):
            said = f"Peak memory was not measured: {peak.rstrip('.')}."
            form["note"] = f"{form['note']} {said}".strip()
        else:
            form["peak_bytes"] = peak


# -- the table's text ------------------------------------------------------------------------------


def _no_gain(form: Form, forms: Sequence[Form]) -> str:
    """Say in what a form is no smaller than dense, or no faster than the fastest dense form.

    Example:
        >>> def form(name, size, seconds):
        ...     return {**_form(name, ""), "bytes": size, "seconds": seconds}
        >>> dense = form("dense", 100, {"1": 3.0, "16": 9.0})
        >>> fast = form("dense, ONNX Runtime", 100, {"1": 1.0, "16": 6.0})
        >>> _no_gain(fast, [dense, fast])
        ''
        >>> _no_gain(form("plain zeros", 100, {"1": 2.9, "16": 9.0}), [dense])
        'No gain here in size or in speed.'
        >>> _no_gain(form("shrunk", 50, {"1": 1.5, "16": 3.0}), [dense, fast])
        'No gain here in speed at batch 1.'
    """
    dense = [other for other in forms if other["name"].startswith("dense")]
    if form in dense or not form["seconds"]:
        return ""
    slow = [
        batch
        for batch, seconds in form["seconds"].items()
        if seconds * _FASTER > min(d["seconds"][batch] for d in dense if d["seconds"])
    ]
    missing = []
    if (form["bytes"] or 0) > _SMALLER * (forms[0]["bytes"] or 0):
        missing.append("in size")
    if (form["peak_bytes"] or 0) > _LIGHTER * (forms[0]["peak_bytes"] or math.inf):
        missing.append("in memory")
    if slow:
        where = "" if len(slow) == len(form["seconds"]) else f" at batch {' and '.join(slow)}"
        missing.append(f"in speed{where}")
    return f"No gain here {' or '.join(missing)}." if missing else ""


def _megabytes(size: int | None, dense: int | None) -> str:
    if size is None:
        return _MISSING
    return f"{_figure(size / 1e6)} ({_ratio(dense / size)})" if dense else _figure(size / 1e6)


def _figure(number: float) -> str:
    """Format to three digits.

    Example:
        >>> _figure(0.4123), _figure(44.78), _figure(1234.5)
        ('0.412', '44.8', '1,234')
    """
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"


def _ratio(number: float) -> str:
    return f"{number:.2f}×" if number < 10 else f"{number:.1f}×"
