"""Put what a benchmark has measured between two markers of a Markdown page."""

from __future__ import annotations

from pathlib import Path

from pruneflow.files import write_whole


def write_between(page: Path, begin: str, end: str, text: str) -> None:
    before, rest = page.read_text().split(begin)
    _, after = rest.split(end, 1)
    with write_whole(page) as temporary:
        temporary.write_text(f"{before}{begin}\n{text}{end}{after}")
