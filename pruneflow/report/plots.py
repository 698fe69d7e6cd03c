"""The figures of a report: plain numbers in, matplotlib figures out.

They use matplotlib's object-oriented API, so that a report does not change the pyplot state of a
notebook, and the colour-blind safe palette of Okabe and Ito.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

_BLUE, _SKY, _ORANGE, _GREEN, _GREY = "#0072B2", "#56B4E9", "#D55E00", "#009E73", "#6b6b6b"
_WIDTH, _DPI = 9.0, 150  # inches, dots per inch: 1350 px wide


def _figure(height: float) -> Figure:
    return Figure(figsize=(_WIDTH, height), dpi=_DPI, layout="constrained", facecolor="white")


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)


def _percent_axis(axes: Axes) -> None:
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{100 * value:g} %" if value < 1.0001 else "")
    )


def _spaced(positions: Sequence[float], gap: float) -> list[int]:
    """Indices of ascending positions at least `gap` apart, always including the last.

    Example:
        >>> _spaced([0, 1, 2, 3, 9, 10], gap=2)
        [0, 2, 5]
    """
    kept: list[int] = []
    for index, position in enumerate(positions):
        crowded = kept and position - positions[kept[-1]] < gap
        if not crowded and positions[-1] - position >= gap:
            kept.append(index)
    return [*kept, len(positions) - 1] if positions else []


def _series(
    history: Sequence[Mapping[str, float | str | None]], key: str
) -> tuple[list[float], list[float]]:
    """Epochs finished and values of one column, without missing values."""
    pairs = [
        (float(epoch) + 1, float(value))
        for row in history
        if (value := row.get(key)) is not None and (epoch := row.get("epoch")) is not None
    ]
    return [x for x, _ in pairs], [y for _, y in pairs]


def sparsity_text(fraction: float) -> str:
    """Format a sparsity with two significant digits of the density, so it is never 100 %.

    Example:
        >>> [sparsity_text(fraction) for fraction in (0.0, 0.98, 0.99951, 0.999995)]
        ['0.00 %', '98.00 %', '99.951 %', '99.99950 %']
    """
    remaining = 100 * (1 - fraction)
    digits = 1 - math.floor(math.log10(remaining)) if 0 < remaining < 1 else 2
    return f"{100 * fraction:.{min(max(digits, 2), 10)}f} %"


def accuracy_figure(
    history: Sequence[Mapping[str, float | str | None]],
    rounds: Sequence[tuple[int, int, float]],
    dense_epochs: int,
) -> Figure:
    """Draw training and validation accuracy over the epochs, and the sparsity below them.

    Args:
        history: One row per epoch with `epoch` (from 0), `train_accuracy`, `val_accuracy` and
            `sparsity`; any of them may be None.
        rounds: (round, epoch at whose start it pruned, accuracy right after pruning).
        dense_epochs: Number of epochs of the dense phase, which is shaded.

    Example:
        >>> history = [{"epoch": 0, "train_accuracy": 0.5, "val_accuracy": 0.6, "sparsity": 0.0}]
        >>> upper, lower = accuracy_figure(history, rounds=[], dense_epochs=1).axes
        >>> upper.get_ylabel(), lower.get_ylabel()
        ('accuracy', 'sparsity')
    """
    figure = _figure(height=6)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    for key, label, colour, shape in (
        ("train_accuracy", "training", _ORANGE, "--"),
        ("val_accuracy", "validation", _BLUE, "-"),
    ):
        epochs, values = _series(history, key)
        marker = "o" if len(epochs) <= 60 else ""
        upper.plot(epochs, values, shape, color=colour, label=label, marker=marker, markersize=3.5)
    if rounds:
        drops = [accuracy for *_, accuracy in rounds]
        starts = [epoch for _, epoch, _ in rounds]
        label = "validation, just pruned"
        upper.plot(starts, drops, "v", color=_BLUE, markerfacecolor="white", label=label)

    ends, sparsities = _series(history, "sparsity")
    xs = [x for end in ends for x in (end - 1, end)]
    ys = [y for sparsity in sparsities for y in (sparsity, sparsity)]
    lower.plot(xs, ys, color=_GREEN, label="sparsity", clip_on=False)
    lower.fill_between(xs, ys, color=_GREEN, alpha=0.2, linewidth=0)
    lower.set(ylim=(0, 1.05), ylabel="sparsity", xlabel="epochs finished")
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))

    every_end, _ = _series(history, "epoch")
    first = min([end - 1 for end in every_end], default=0)
    last = max([*every_end, first + 1, dense_epochs])
    margin = (last - first) / 100
    for axes in (upper, lower):
        _plain(axes)
        _percent_axis(axes)
        if first < dense_epochs:
            label = "dense phase" if axes is upper else ""
            axes.axvspan(first, dense_epochs, color="#ececec", zorder=0, label=label)
        for _, epoch, _ in rounds:
            axes.axvline(epoch, color=_GREY, linewidth=0.8, linestyle=":", zorder=1)
    upper.set(ylabel="accuracy", xlim=(first - margin, last + margin))
    if rounds:
        shown = [rounds[i] for i in _spaced([epoch for _, epoch, _ in rounds], (last - first) / 35)]
        top = upper.secondary_xaxis("top")
        top.set_xticks([epoch for _, epoch, _ in shown], [str(number) for number, *_ in shown])
        top.set_xlabel("round (dotted: it prunes here)")
        top.spines["top"].set_visible(False)
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    return figure


def _shortened(name: str, length: int = 44) -> str:
    """Shorten the longest parts of a long name, so that its numbers remain readable.

    Example:
        >>> _shortened("encoder.blocks.11.attention.projection.weight", length=34)
        'enco….bloc….11.atte….proj….weig…'
        >>> _shortened("0")
        '0'
    """
    if len(name) <= length:
        return name
    parts = name.split(".")
    for limit in range(max(len(part) for part in parts), 2, -1):
        cut = [part if len(part) <= limit else part[: limit - 1] + "…" for part in parts]
        if sum(len(part) + 1 for part in cut) <= length + 1:
            return ".".join(cut)
    return "…" + name[1 - length :]


def density_figure(layers: Sequence[tuple[str, int, int]]) -> Figure:
    """Draw the density of each layer; logarithmic if any is below 20 %.

    Args:
        layers: (name, weights kept, weights); a layer without weights counts as empty.

    Example:
        >>> figure = density_figure([("conv.weight", 90, 100), ("fc.weight", 1, 100)])
        >>> figure.axes[0].get_xscale()
        'log'
    """
    figure = _figure(height=1.4 + 0.24 * max(len(layers), 2))
    axes = figure.subplots()
    densities = [kept / max(weights, 1) for _, kept, weights in layers]
    rows = range(len(layers))
    axes.barh(rows, densities, height=0.72, color=_SKY)
    overall = sum(kept for _, kept, _ in layers) / max(sum(n for *_, n in layers), 1)
    smallest = min((density for density in [*densities, overall] if density > 0), default=1.0)
    if smallest < 0.2:
        # The left edge is at half the smallest density, so that even this bar has a length.
        axes.set_xscale("log")
        axes.set_xlim(smallest / 2, 1)
        decades = -math.log10(smallest)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("weights kept (logarithmic)")
    else:
        axes.set_xlim(0, 1)
        axes.set_xlabel("weights kept")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    names = [_shortened(name.removesuffix(".weight")) for name, *_ in layers]
    axes.set_yticks(rows, names, fontsize=8.5, parse_math=False)
    axes.set_ylim(len(layers) - 0.4, -0.6)  # the first layer on top
    counts = axes.twinx()
    counts.set_ylim(axes.get_ylim())
    labels = [f"{kept:,} of {weights:,}" for _, kept, weights in layers]
    counts.set_yticks(rows, labels, fontsize=8.5, color=_GREY)
    for side in (axes, counts):
        _plain(side)
        side.grid(visible=False)
        side.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#e4e4e4", linewidth=0.8)
    if overall:
        label = f"all layers together: {100 * overall:.3g} % kept"
        axes.axvline(overall, color=_ORANGE, linestyle="--", linewidth=1.5, label=label)
        figure.legend(loc="outside upper center", frameon=False)
    return figure


def rounds_figure(dense: float, rounds: Sequence[tuple[float, float, float]]) -> Figure:
    """Draw accuracy against sparsity, one point per round, on an axis of log(weights kept).

    The upper panel shows the fine-tuned networks; the lower one the whole range, including the
    networks right after pruning.

    Args:
        dense: Validation accuracy of the dense network.
        rounds: (sparsity, accuracy right after pruning, accuracy after fine-tuning) of each round;
            one with a NaN is left out.

    Example:
        >>> figure = rounds_figure(0.95, [(0.5, 0.80, 0.94), (0.75, 0.60, 0.93)])
        >>> [tick.get_text() for tick in figure.axes[1].get_xticklabels()]
        ['dense', '50.00', '75.00']
    """
    figure = _figure(height=6)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    rounds = [line for line in rounds if all(math.isfinite(value) for value in line)]
    kept = [max(1 - sparsity, 1e-6) for sparsity, *_ in rounds]
    pruned = [accuracy for _, accuracy, _ in rounds]
    tuned = [accuracy for *_, accuracy in rounds]
    for axes in (upper, lower):
        axes.axhline(dense, color=_GREY, linestyle="--", linewidth=1.2, label="dense", zorder=1)
        axes.plot(1, dense, "s", color=_GREY)
        axes.plot([1, *kept], [dense, *tuned], "-", color=_BLUE, linewidth=1)
        axes.plot(kept, tuned, "o", color=_BLUE, label="fine-tuned", zorder=3)
        _plain(axes)
        _percent_axis(axes)
    lower.vlines(kept, pruned, tuned, color=_BLUE, alpha=0.35, linewidth=1)
    lower.plot(
        kept,
        pruned,
        "v",
        color=_BLUE,
        markerfacecolor="white",
        label="just pruned, not fine-tuned",
        zorder=4,
    )
    upper.set_ylabel("validation accuracy, close up")
    lower.set_ylabel("whole range")
    # At least two percentage points high, so that noise looks like noise.
    heights = [height for height in (dense, *tuned) if math.isfinite(height)] or [0.0]
    low, high = min(heights), max(heights)
    room = max(0.12 * (high - low), (0.02 - (high - low)) / 2)
    bottom, top = low - room, high + 2 * room
    upper.set_ylim(bottom, top)
    lower.update_datalim([(1, bottom), (1, top)])  # never narrower than the close-up
    lower.margins(y=0.08)
    lower.autoscale_view()

    farthest = min([*kept, 0.9])
    positions = [0.0, *(-math.log(fraction) for fraction in kept)]
    shown = _spaced(positions, -math.log(farthest) / 14)
    for index in shown:
        if index:
            x, y = kept[index - 1], tuned[index - 1]
            upper.annotate(
                f"{100 * y:.2f}",
                (x, y),
                xytext=(0, 8),
                textcoords="offset points",
                ha="center",
                fontsize=8.5,
                color=_BLUE,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
                zorder=2.5,  # over the lines, under its neighbours' points
            )
    lower.set_xscale("log")
    lower.set_xlim(farthest ** (-1 / 25), farthest ** (1 + 1 / 25))
    lower.xaxis.set_minor_locator(NullLocator())
    names = ["dense", *(sparsity_text(sparsity).removesuffix(" %") for sparsity, *_ in rounds)]
    lower.set_xticks([[1.0, *kept][i] for i in shown], [names[i] for i in shown])
    lower.set_xlabel("sparsity in % (spaced by the logarithm of the weights kept)")
    if not rounds:
        upper.text(0.5, 0.8, "no rounds were run", transform=upper.transAxes, ha="center")
    handles, labels = lower.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure
