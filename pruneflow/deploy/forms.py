"""Compare the forms in which a pruned model can be deployed: size, memory, latency, accuracy.

Each form must first give the outputs of the model it was built from; otherwise it is not measured.
Latencies are measured in one process in which the forms take turns, so that other load affects all
of them alike; peak memory is measured in one process for each form.
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
from pruneflow.errors import expect

_MOST_TURNS, _FEWEST_TURNS = 7, 3
_SECONDS = 20.0  # for all forms at one batch size, unless the fewest turns take longer
# Seconds of a turn: pause, warm-up and timed runs, repeated to fill that time. Threads of ONNX
# Runtime keep spinning for 30 ms, which would slow down the next form.
_REST, _WARM_UP, _BURST = 0.04, 0.015, 0.015
# Times with a larger spread are noisy: measured again, up to so many times, and otherwise marked.
_NOISY, _MOST_TRIES = 0.1, 2
# What counts as a gain: bytes, peaks and times always vary a little.
_SMALLER, _LIGHTER, _FASTER = 0.99, 0.95, 1.05
_MISSING = "–"


class Form(TypedDict):
    """One form of the model, in plain builtins; None or missing where not measured."""

    name: str
    file: str | None  # its name in the folder; None if it is only measured
    bytes: int | None  # size of its file
    peak_bytes: int | None  # peak memory with the largest batch
    seconds: dict[str, float]  # batch size -> median time of a run
    spread: dict[str, float]  # batch size -> half the interquartile range / median
    speedup: dict[str, float]  # batch size -> median over turns of dense in PyTorch / this form
    throughput: float | None  # samples per second, at the best batch size
    accuracy: float | None  # result of `evaluate`
    note: str  # why it was not measured, or warnings from building it


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
    """Build each form of a pruned model and measure size, memory, time and accuracy on the CPU.

    The forms are: dense, in PyTorch and in ONNX Runtime; the pruned model with zeros; packed and
    loaded again; shrunk, in PyTorch and in ONNX Runtime; and compiled by the sparse runtime from
    the packed file, shrunk if that is supported. PyTorch uses `channels_last` for images if that is
    faster for the dense model at the largest batch. A form that cannot be built, or gives other
    outputs, is not measured and has a note with the reason.

    Args:
        dense: The model before pruning.
        pruned: The model with exact zeros. Neither model is modified.
        example_input: A batch of one with real data; outputs are compared on it.
        folder: Folder for `model.packed`, `shrunk.pt2` (for `torch.export.load`) and `shrunk.onnx`;
            shrunk forms of an earlier run are deleted first.
        evaluate: Returns the accuracy of a function that maps a batch on the CPU to outputs.
        batches: Batch sizes to time; peak memory is measured at the largest.
        threads: Number of threads for every form; None for PyTorch's current number.

    Returns:
        The forms, starting with dense in PyTorch.

    Raises:
        ValueError: If `example_input` is not a batch of one, or a batch size or `threads` is below
            1.

    Example:
        `print(markdown(measure_forms(dense, pruned, image, "outputs/forms")))`
    """
    got = f"a tensor of shape {tuple(example_input.shape)}"
    single = example_input.shape[:1] == (1,)
    expect(single, "example_input", "be a batch of one", got, "pass example_input[:1]")
    valid = batches and min(batches) >= 1
    expect(valid, "batches", "hold at least one size, all at least 1", batches, "try (1, 16, 128)")
    valid = threads is None or threads >= 1
    expect(valid, "threads", "be at least 1", threads, "pass None for PyTorch's number of threads")
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
    """Format forms as a table of text.

    Times are medians ± half the interquartile range; if that is more than a tenth, the time and all
    ratios with it are marked by ≈. In brackets is dense in PyTorch divided by this form: more than
    1 is better. A note says where a form is no gain: its file or memory is not smaller than that of
    dense, or it is not 1.05 times as fast as the fastest dense form at some batch size.

    Args:
        forms: The result of `measure_forms`.

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
    """Format a time with its spread and the speed-up over dense.

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
    r"""Format forms as a Markdown table; see `table`.

    Args:
        forms: The result of `measure_forms`.

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
    except RuntimeError:  # such as a `view` that needs contiguous images
        return torch.contiguous_format
    faster = statistics.median(times["pixels"]) < statistics.median(times["rows"])
    return torch.channels_last if faster else torch.contiguous_format


@torch.inference_mode()
def _take_turns(
    runs: Mapping[str, Run], batch: Tensor, most: int = _MOST_TURNS
) -> dict[str, list[float]]:
    for run in runs.values():
        _seconds(run, batch, 0)  # the first run allocates and compiles
    times: dict[str, list[float]] = {name: [] for name in runs}
    began = time.perf_counter()
    for turn in range(most):
        if turn >= _FEWEST_TURNS and time.perf_counter() - began > _SECONDS:
            break
        for name, run in runs.items():
            # The caches hold data of the previous form, and its threads may still be spinning.
            time.sleep(_REST)
            _seconds(run, batch, _WARM_UP)
            times[name].append(_seconds(run, batch, _BURST))
    return times


def _calmest_turns(runs: Mapping[str, Run], batch: Tensor) -> dict[str, list[float]]:
    """Take turns, repeatedly while they are noisy and there is time left."""
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
    """The mean time of as many runs as fill `least` seconds, at least one."""
    count, began = 0, time.perf_counter()
    while True:
        run(batch)
        count += 1
        passed = time.perf_counter() - began
        if passed >= least:
            return passed / count


def _add_times(form: Form, times: Mapping[int, Mapping[str, Sequence[float]]]) -> None:
    for size, samples in times.items():
        seconds = samples[form["name"]]
        form["seconds"][str(size)] = statistics.median(seconds)
        form["spread"][str(size)] = _spread(seconds)
        form["speedup"][str(size)] = statistics.median(
            one / other for one, other in zip(samples["dense"], seconds, strict=True)
        )
    form["throughput"] = max(int(size) / median for size, median in form["seconds"].items())


def _add_peaks(
    forms: Sequence[Form], built: Mapping[str, Built], batch: Tensor, scratch: Path
) -> None:
    if sys.platform != "linux":
        return
    models: dict[str, tuple[Path, Path]] = {}
    peaks: dict[str, int | str] = {}
    for name, form_built in built.items():
        model, inputs = form_built.file, scratch / f"{form_built.layout}.pt"
        try:
            if form_built.network is not None:
                model = scratch / f"{name}.pt"
                torch.save(form_built.network, model)
        except (RuntimeError, AttributeError, TypeError, pickle.PicklingError) as error:
            peaks[name] = str(error)
        else:
            if not inputs.exists():
                torch.save(batch.contiguous(memory_format=form_built.layout), inputs)
            models[name] = model, inputs
    measured = peak_bytes(list(models.values()), torch.get_num_threads())
    peaks.update(zip(models, measured, strict=True))
    for form in forms:
        peak = peaks.get(form["name"])
        if isinstance(peak, str):
            reason = f"Peak memory was not measured: {peak.rstrip('.')}."
            form["note"] = f"{form['note']} {reason}".strip()
        else:
            form["peak_bytes"] = peak


# -- the table's text ------------------------------------------------------------------------------


def _no_gain(form: Form, forms: Sequence[Form]) -> str:
    """Name where a form is not smaller than dense, or not faster than the fastest dense form.

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
