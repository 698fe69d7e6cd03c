"""Render a report as Markdown and as one self-contained HTML page.

The cells of a `Document` are text, so that both renderings agree.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Section:
    """A title with optional Python code, table, plots (file stem, caption) and note."""

    title: str
    note: str = ""
    code: str = ""
    header: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    plots: tuple[tuple[str, str], ...] = ()

    def numeric(self, column: int) -> bool:
        """Whether a column holds numbers, which are right-aligned."""
        return column > 0 and all(re.match(r"[\d−–≈]|$", row[column]) for row in self.rows)


@dataclass(frozen=True)
class Document:
    """A report before it is rendered."""

    title: str
    verdict: str
    explanation: str
    reached: bool
    warning: str  # a limitation of all results, or ""
    sections: tuple[Section, ...]


def _markdown_cell(text: str) -> str:
    r"""Escape Markdown; underscores inside words are not markup.

    Example:
        >>> print(_markdown_cell("a|b <i> *x* weight_ih __main__"))
        a\|b \<i> \*x\* weight_ih \_\_main\_\_
    """
    escaped = re.sub(r"[\\`*\[\]<&|~]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", text)
    return " ".join(escaped.split())


def _markdown_table(section: Section) -> list[str]:
    table = [[_markdown_cell(cell) for cell in row] for row in (section.header, *section.rows)]
    columns = range(len(section.header))
    right = [section.numeric(column) for column in columns]
    widths = [max(3, *(len(row[column]) for row in table)) for column in columns]
    rule = ["-" * (w - 1) + ":" if r else "-" * w for w, r in zip(widths, right, strict=True)]
    body = [
        [
            cell.rjust(w) if r else cell.ljust(w)
            for cell, w, r in zip(row, widths, right, strict=True)
        ]
        for row in table
    ]
    return [f"| {' | '.join(row)} |" for row in (body[0], rule, *body[1:])]


def markdown(document: Document) -> str:
    """The document as Markdown; plots are linked as `plots/<stem>.png`."""
    lines = [f"# {_markdown_cell(document.title)}", ""]
    lines += [f"**{document.verdict}** {_markdown_cell(document.explanation)}", ""]
    if document.warning:
        lines += [f"> {_markdown_cell(document.warning)}", ""]
    for section in document.sections:
        lines += [f"## {section.title}", ""]
        if section.code:
            lines += ["```python", section.code, "```", ""]
        if section.rows:
            lines += [*_markdown_table(section), ""]
        for stem, caption in section.plots:
            lines += [f"![{caption}](plots/{stem}.png)", ""]
        if section.note:
            lines += [_markdown_cell(section.note), ""]
    return "\n".join(lines)


_CSS = """
:root { color-scheme: light dark; --ink: #1d2126; --soft: #5c6570; --line: #dfe3e8;
  --paper: #ffffff; --tint: #f5f7f9; --good: #009e73; --bad: #d55e00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #9aa5b1; --line: #363c44;
  --paper: #16191d; --tint: #1e2227; } }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 70rem; color: var(--ink);
  background: var(--paper); font: 16px/1.55 system-ui, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .6rem; }
.verdict { margin: 0; padding: .8rem 1rem; background: var(--tint);
  border-left: .3rem solid var(--good); font-size: 1.05rem; }
.verdict.short { border-color: var(--bad); }
.verdict.short strong { color: var(--bad); }
.warning { margin: .8rem 0 0; padding: .8rem 1rem; border: 2px solid var(--bad); }
pre { background: var(--tint); padding: .8rem 1rem; overflow-x: auto; font-size: .875rem; }
.note, figcaption { color: var(--soft); font-size: .875rem; }
.note { margin: .5rem 0 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem 1.1rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
.n { text-align: right; }
td.n { white-space: nowrap; }
td:first-child { min-width: 6.2rem; }
td:last-child:not(.n):not(:first-child) { min-width: 12rem; }
figure { margin: 0 0 1.5rem; }
img { display: block; width: 100%; height: auto; border-radius: .4rem; background: #ffffff; }
@media print { body { max-width: none; padding: 0; } tr, figure { break-inside: avoid; } }
"""


def _html_table(section: Section) -> str:
    columns = range(len(section.header))
    classes = [' class="n"' if section.numeric(column) else "" for column in columns]

    def row(cells: Sequence[str], tag: str) -> str:
        inner = (
            f"<{tag}{attribute}>{escape(cell)}</{tag}>"
            for cell, attribute in zip(cells, classes, strict=True)
        )
        return f"<tr>{''.join(inner)}</tr>"

    head = row(section.header, "th")
    body = "\n".join(row(cells, "td") for cells in section.rows)
    return (
        f'<div class="scroll"><table>\n<thead>{head}</thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def html(document: Document, images: Mapping[str, bytes]) -> str:
    """The document as one HTML page, with the PNG `images` of its plots embedded."""
    parts = []
    for section in document.sections:
        parts.append(f"<h2>{escape(section.title)}</h2>")
        if section.code:
            parts.append(f"<pre><code>{escape(section.code)}</code></pre>")
        if section.rows:
            parts.append(_html_table(section))
        for stem, caption in section.plots:
            data = base64.b64encode(images[stem]).decode("ascii")
            parts.append(
                f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
                f"<figcaption>{escape(caption)}</figcaption></figure>"
            )
        if section.note:
            parts.append(f'<p class="note">{escape(section.note)}</p>')
    mood = "verdict" if document.reached else "verdict short"
    title = escape(document.title)
    warning = f'<p class="warning">{escape(document.warning)}</p>' if document.warning else ""
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{title}</title>\n<style>{_CSS}</style>\n</head>\n<body>",
            f"<h1>{title}</h1>",
            f'<p class="{mood}"><strong>{escape(document.verdict)}</strong> '
            f"{escape(document.explanation)}</p>{warning}",
            *parts,
            "</body>\n</html>\n",
        ]
    )
