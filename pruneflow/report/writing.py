"""Write the report of a run: `report.json`, `report.md`, `report.html` and `plots/`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from matplotlib.figure import Figure
from rich.table import Table as RichTable
from rich.text import Text

from pruneflow.deploy.forms import Form
from pruneflow.files import write_whole
from pruneflow.report.facts import Facts
from pruneflow.report.plots import accuracy_figure, density_figure, rounds_figure
from pruneflow.report.rendering import Section, html, markdown
from pruneflow.report.sections import document, forms_section


def _figures(
    facts: Facts, history: Sequence[Mapping[str, float | str | None]]
) -> dict[str, Figure]:
    rounds = facts["rounds"]
    return {
        "accuracy": accuracy_figure(
            history,
            [(line["round"], line["epoch"], line["pruned_accuracy"]) for line in rounds],
            facts["dense"]["epochs"],
        ),
        "rounds": rounds_figure(
            facts["dense"]["val_accuracy"],
            [
                (line["sparsity"], line["pruned_accuracy"], line["fine_tuned_accuracy"])
                for line in rounds
            ],
        ),
        "density": density_figure(
            [
                (layer["name"], layer["weights"] - layer["zeros"], layer["weights"])
                for layer in facts["layers"]
            ]
        ),
    }


def _without_nan(value: object) -> object:
    """Replace NaN and infinities, which JSON does not support, by None.

    Example:
        >>> _without_nan({"loss": [1.0, float("nan")]})
        {'loss': [1.0, None]}
    """
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_report(
    folder: Path, facts: Facts, history: Sequence[Mapping[str, float | str | None]]
) -> None:
    """Write report.json, report.md, report.html and plots/ into a run folder.

    Each file is written atomically, `report.json` first.

    Args:
        folder: The run folder.
        facts: The results of the run.
        history: One row per epoch of both stages: `stage` ("dense" or "rounds"), `epoch` (from 0),
            `round`, `sparsity`, `lr` (at the first step of the epoch), `train_loss`,
            `train_accuracy`, `val_loss`, `val_accuracy`; any of them may be None.
    """
    contents = document(facts, _relative(folder))
    facts_json = json.dumps(_without_nan(facts), indent=2, ensure_ascii=False, allow_nan=False)
    with write_whole(folder / "report.json") as path:
        path.write_text(facts_json + "\n", encoding="utf-8")
    images = {}
    for stem, figure in _figures(facts, history).items():
        with write_whole(folder / "plots" / f"{stem}.png") as path:
            figure.savefig(path)
            images[stem] = path.read_bytes()
    with write_whole(folder / "report.md") as path:
        path.write_text(markdown(contents), encoding="utf-8")
    with write_whole(folder / "report.html") as path:
        path.write_text(html(contents, images), encoding="utf-8")


def _relative(folder: Path) -> str:
    """The path of a folder, relative if it is in the current folder."""
    folder = folder.resolve()
    here = Path.cwd()
    return str(folder.relative_to(here) if folder.is_relative_to(here) else folder)


def summary(facts: Facts) -> RichTable:
    """Build the table "Before and after" that a run prints at its end with rich.

    Example:
        `rich.print(summary(facts))`
    """
    contents = document(facts, ".")
    verdict = f"{contents.verdict} {contents.explanation}"
    caption = "\n".join(filter(None, [verdict, contents.warning]))
    return _rich_table(contents.sections[0], contents.title, caption)


def forms_summary(forms: Sequence[Form]) -> RichTable:
    """Build the table of forms that `task=deploy` prints at its end with rich."""
    section = forms_section(forms)
    # A terminal has no room for the column of notes.
    notes = [f"{name}: {note}" for name, *_, note in section.rows if note]
    rows = tuple(row[:-1] for row in section.rows)
    narrow = replace(section, header=section.header[:-1], rows=rows)
    return _rich_table(narrow, section.title, "\n".join([*notes, section.note]))


def _rich_table(section: Section, title: str, caption: str) -> RichTable:
    result = RichTable(title=Text(title), caption=Text(caption), caption_justify="left")
    for index, name in enumerate(section.header):
        result.add_column(name, justify="right" if section.numeric(index) else "left")
    for row in section.rows:
        result.add_row(*(Text(cell) for cell in row))
    return result
