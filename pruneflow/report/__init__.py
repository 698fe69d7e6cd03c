"""The report of a run: facts, tables, plots, Markdown and HTML."""
