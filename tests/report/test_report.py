"""Reports: what they say comes from the facts, in every format, and no half-written file stays."""

import copy
import html
import io
import json
import math
import re
from pathlib import Path

import matplotlib.image
import pytest
import rich.console
from matplotlib.figure import Figure

from pruneflow.report.plots import accuracy_figure, density_figure, rounds_figure
from pruneflow.report.writing import forms_summary, summary, write_report

FILES = ["plots/accuracy.png", "plots/density.png", "plots/rounds.png"]
FILES = sorted(["report.html", "report.json", "report.md", *FILES])


def make_facts(target=0.75, planned=2, run=2):
    """Facts of a small network; `run` of the `planned` rounds, of two epochs each, were run."""
    weights = {"features.0.weight": (8, 1, 3, 3), "fc.weight": (10, 400)}
    plan, rounds = [], []
    total = sum(math.prod(shape) for shape in weights.values())
    amount = 1 - (1 - target) ** (1 / max(planned, 1))
    for number in range(1, planned + 1):
        sparsity = 1 - (1 - amount) ** number
        kept = total - round(sparsity * total)
        at = 3 + 2 * (number - 1)
        plan.append(
            {"round": number, "at": at, "amount": amount, "sparsity": sparsity, "kept": kept}
        )
        if number <= run:
            rounds.append(
                {
                    "round": number,
                    "epoch": at,
                    "sparsity": 1 - kept / total,
                    "kept": kept,
                    "pruned_accuracy": 0.9 - 0.2 * number,
                    "fine_tuned_accuracy": 0.95 - 0.011 * number,
                }
            )
    final_kept = rounds[-1]["kept"] if rounds else total
    zeros = {"features.0.weight": 0, "fc.weight": total - final_kept}
    return {
        "recipe": "digits",
        "command": "python -m pruneflow recipe=digits",
        "seed": 7,
        "versions": {"pruneflow": "0.1.0", "torch": "2.14.0", "lightning": "2.6.0"},
        "commit": None,
        "machine": "2 CPU cores, 24 GiB",
        "target": target,
        "scope": "global",
        "schedule": "Compounding(target=0.75, rounds=2)",
        "importance": "magnitude",
        "granularity": "weights",
        "costs": None,
        "classes": ["zero", "one"],
        "plan": plan,
        "dense": {"epochs": 3, "val_accuracy": 0.9512, "test_accuracy": 0.9467},
        "dense_cached": False,
        "rounds": rounds,
        "final": {
            "sparsity": 1 - final_kept / total,
            "removed": 1 - final_kept / total,
            "val_accuracy": 0.9281,
            "test_accuracy": 0.9213,
            "test_per_class": [0.9876, 0.8765],
            "tested": 360,
            "test_pictures": 360,
        },
        "size": {
            "parameters": 4090,
            "remaining": 1036,
            "compression_ratio": 3.9478,
            "multiply_adds": 8608,
            "remaining_multiply_adds": 3254,
            "theoretical_speedup": 2.6453,
            "dense_bytes": 16888,
            "model_bytes": 16888,
            "packed_bytes": 4222,
        },
        "layers": [
            {"name": name, "shape": list(shape), "weights": math.prod(shape), "zeros": zeros[name]}
            for name, shape in weights.items()
        ],
        "classifier": {
            "network": "pruneflow.models.small_cnn",
            "arguments": {"width": 8, "num_classes": 2, "in_channels": 1},
            "classes": ["zero", "one"],
            "image_shape": [1, 8, 8],
            "mean": [0.5],
            "std": [0.25],
        },
        "example": "one",
        "forms": [],
        "seconds": {"dense": 725.0, "rounds": 3725.0, "test": 1.25},
        "frozen": [],
        "stay_dense": "",
    }


def make_history(facts, epochs=7):
    """One row an epoch; the third validates nothing."""
    rows = []
    for epoch in range(epochs):
        past = [line for line in facts["rounds"] if line["epoch"] <= epoch]
        rows.append(
            {
                "stage": "dense" if epoch < facts["dense"]["epochs"] else "rounds",
                "epoch": epoch,
                "round": len(past),
                "sparsity": past[-1]["sparsity"] if past else None,
                "lr": 0.1,
                "train_loss": 1 / (epoch + 1),
                "train_accuracy": 1 - 0.5 / (epoch + 1),
                "val_loss": None if epoch == 2 else 1.1 / (epoch + 1),
                "val_accuracy": None if epoch == 2 else 0.97 - 0.5 / (epoch + 1),
            }
        )
    return rows


@pytest.fixture
def no_drawing(monkeypatch):
    """Skip matplotlib's rendering, which is most of a test's time, where only words matter."""
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: path.write_bytes(b"drawn"))


def write(folder, facts):
    write_report(folder, facts, make_history(facts))
    return (folder / "report.md").read_text(), (folder / "report.html").read_text()


def markdown_tables(text):
    tables = []
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in block.splitlines()]
        del rows[1]  # the rule below the header
        tables.append([[re.sub(r"\\(\W|_)", r"\1", cell).strip() for cell in row] for row in rows])
    return tables


def html_tables(text):
    return [
        [
            [html.unescape(cell) for cell in re.findall(r"<t[hd](?: [^>]*)?>(.*?)</t[hd]>", row)]
            for row in re.findall(r"<tr>(.*?)</tr>", table)
        ]
        for table in re.findall(r"<table>(.*?)</table>", text, flags=re.DOTALL)
    ]


def printed_summary(facts):
    console = rich.console.Console(file=io.StringIO(), width=200)
    console.print(summary(facts))
    return console.file.getvalue()


def all_files(folder):
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def test_writes_every_file_and_plots_that_decode(tmp_path):
    write(tmp_path, make_facts())
    assert all_files(tmp_path) == FILES
    for plot in (tmp_path / "plots").iterdir():
        pixels = matplotlib.image.imread(plot)
        assert pixels.shape[1] >= 1200
        assert pixels.std() > 0.01  # something is drawn


@pytest.mark.usefixtures("no_drawing")
def test_json_is_the_facts_in_their_order_with_null_for_nan(tmp_path):
    facts = make_facts()
    facts["final"]["test_per_class"][1] = math.nan
    write(tmp_path, facts)
    text = (tmp_path / "report.json").read_text()
    read = json.loads(text, parse_constant=pytest.fail)
    assert read["final"]["test_per_class"] == [0.9876, None]
    facts["final"]["test_per_class"][1] = None
    assert read == facts
    assert list(read) == list(facts)


@pytest.mark.usefixtures("no_drawing")
def test_the_page_needs_nothing_from_outside(tmp_path):
    _, page = write(tmp_path, make_facts())
    assert page.count('src="data:image/png;base64,') == 3
    assert not re.search(r'(?:src|href)="(?!data:)|<script|<link|url\(|@import', page)


@pytest.mark.usefixtures("no_drawing")
def test_both_renderings_hold_the_same_cells(tmp_path):
    facts = make_facts()
    facts["classes"] = ["a|b", r"back\slash_ <i> & *x* __main__"]
    facts["command"] = "python -m pruneflow 'data.root=[1]' `x` ~y~"
    markdown, page = write(tmp_path, facts)
    tables = markdown_tables(markdown)
    assert len(tables) == 7
    assert tables == html_tables(page)
    cells = [cell for table in tables for row in table for cell in row]
    assert {*facts["classes"], facts["command"]} <= set(cells)


@pytest.mark.usefixtures("no_drawing")
def test_first_two_tables_to_the_letter(tmp_path):
    before_and_after, _, rounds, *_ = markdown_tables(write(tmp_path, make_facts())[0])
    assert before_and_after == [
        ["", "dense", "pruned", "change"],
        ["test accuracy", "94.67 %", "92.13 %", "−2.54 points"],
        ["validation accuracy", "95.12 %", "92.81 %", "−2.31 points"],
        ["sparsity of prunable weights", "0.00 %", "75.00 %", "target: 75.00 %"],
        ["prunable weights kept", "4,072", "1,018", ""],
        ["parameters kept, all counted", "4,090", "1,036", "compression ratio 3.95×"],
        ["multiply-adds, one sample", "8,608", "3,254", "theoretical speed-up 2.65×"],
        [
            "model.safetensors, bytes",
            "16,888",
            "16,888",
            "zeros are stored; the file is not smaller",
        ],
        ["model.packed, bytes", "16,888", "4,222", "4.0× smaller"],
    ]
    first = ["50.00 %", "50.00 %", "2,036", "50.00 %", "2,036", "70.00 %", "93.90 %"]
    second = ["50.00 %", "75.00 %", "1,018", "75.00 %", "1,018", "50.00 %", "92.80 %"]
    assert rounds[1:] == [
        ["0 (dense)", "0", *["–"] * 6, "95.12 %"],
        ["1", "3", *first],
        ["2", "5", *second],
    ]


@pytest.mark.usefixtures("no_drawing")
def test_what_is_handed_over_is_a_table_of_forms(tmp_path):
    facts = make_facts()
    dense = {"name": "dense", "bytes": 4_000_000, "peak_bytes": 9_000_000, "throughput": 1234.5}
    dense |= {"seconds": {"1": 0.004}, "speedup": {"1": 1.0}, "accuracy": 0.9467, "note": ""}
    dense |= {"file": None, "spread": {"1": 0.04}}
    packed = dense | {"name": "packed", "bytes": 80_000, "accuracy": 0.9213}
    markdown, page = write(tmp_path, facts | {"forms": [dense, packed]})
    header, *rows = markdown_tables(markdown)[1]
    assert [header, *rows] == html_tables(page)[1]
    assert header[:4] == ["form", "file, MB", "peak memory, MB", "batch 1, ms"]
    assert rows[0][:4] == ["dense", "4 (1.00×)", "9 (1.00×)", "4 ± 4 % (1.00×)"]
    assert rows[1][1] == "0.08 (50.0×)"
    assert rows[1][5] == "92.13 %"
    assert rows[1][6] == "No gain here in memory or in speed."
    printed = forms_summary([dense, packed])
    assert [str(column.header) for column in printed.columns] == header[:-1]
    assert str(printed.caption).startswith("packed: No gain here in memory or in speed.\n")


@pytest.mark.usefixtures("no_drawing")
def test_files_are_those_that_were_written(tmp_path):
    facts = make_facts()
    header, *rows = markdown_tables(write(tmp_path, facts)[0])[1]
    assert header == ["file", "bytes", "read by"]
    assert [row[:2] for row in rows] == [["model.safetensors", "16,888"], ["model.packed", "4,222"]]
    form = {"name": "shrunk", "file": "shrunk.pt2", "bytes": 9_876, "peak_bytes": None}
    form |= {"throughput": None, "accuracy": None, "note": "", "seconds": {}, "speedup": {}}
    form |= {"spread": {}}
    refused = form | {"name": "shrunk, ONNX Runtime", "file": None, "bytes": None}
    tables = markdown_tables(write(tmp_path, facts | {"forms": [form, refused]})[0])
    assert [row[:2] for row in tables[2][1:]][2:] == [["shrunk.pt2", "9,876"]]
    assert "torch.export.load(FILE).module()" in tables[2][-1][2]


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (("final", "test_accuracy"), 0.12345, "12.35 %"),
        (("dense", "test_accuracy"), 0.98765, "98.77 %"),
        (("final", "sparsity"), 0.999876, "99.988 %"),
        (("rounds", 0, "pruned_accuracy"), 0.31415, "31.41 %"),
        (("rounds", 1, "fine_tuned_accuracy"), 0.27182, "27.18 %"),
        (("plan", 1, "kept"), 123456, "123,456"),
        (("rounds", 1, "kept"), 654321, "654,321"),
        (("size", "compression_ratio"), 17.123, "17.12×"),
        (("size", "theoretical_speedup"), 13.579, "13.58×"),
        (("size", "remaining_multiply_adds"), 777777, "777,777"),
        (("final", "test_per_class", 0), 0.4321, "43.21 %"),
        (("layers", 1, "shape"), [10, 40, 10], "10 × 40 × 10"),
        (("seconds", "rounds"), 90.0, "1 min 30 s"),
        (("commit",), "0f1e2d3c", "0f1e2d3c"),
        (("frozen",), ["teacher.fc.weight"], "teacher.fc.weight"),
        (
            ("stay_dense",),
            "Trained tensors: fc.weight (0.1%)",
            "Trained tensors: fc.weight (0.1%).",
        ),
    ],
)
@pytest.mark.usefixtures("no_drawing")
def test_figures_come_from_the_facts(tmp_path, path, value, expected):
    facts = make_facts()
    before = write(tmp_path, copy.deepcopy(facts))
    *parents, last = path
    node = facts
    for key in parents:
        node = node[key]
    node[last] = value
    after = write(tmp_path, facts)
    for old, new in zip(before, after, strict=True):
        assert expected not in old
        assert expected in new


@pytest.mark.usefixtures("no_drawing")
def test_an_unreached_target_stands_at_the_top_everywhere(tmp_path):
    facts = make_facts(target=0.9, planned=5, run=2)
    short = math.ceil(0.9 * 4072 - facts["layers"][1]["zeros"])
    markdown, page = write(tmp_path, facts)
    printed = " ".join(printed_summary(facts).split())  # as one line
    for text in (markdown.split("##")[0], page.split("<h2>")[0], printed):
        assert "Target not reached." in text
        assert f"{short:,} weights short of the target of 90.00 %" in text
        assert "after 2 of 5 rounds" in text
    rows = [row[0] for row in markdown_tables(markdown)[2][2:]]
    assert rows == ["1", "2", "3 (not run)", "4 (not run)", "5 (not run)"]


@pytest.mark.usefixtures("no_drawing")
def test_a_reached_target_is_judged_by_counts_not_by_printed_figures(tmp_path):
    facts = make_facts()
    assert "**Target reached.**" in write(tmp_path, facts)[0]
    facts["layers"][1]["zeros"] -= 1  # each of two tensors may round by half a weight
    assert "**Target reached.**" in write(tmp_path, facts)[0]
    facts["layers"][1]["zeros"] -= 1
    assert "**Target not reached.**" in write(tmp_path, facts)[0]


@pytest.mark.parametrize(
    ("granularity", "why"),
    [
        ("Channels()", "since whole channels are removed, 16 at a time in wide layers"),
        ("Block(rows=1, columns=16)", "since whole blocks are removed"),
        ("weights", "since weights are removed in groups"),
    ],
)
@pytest.mark.usefixtures("no_drawing")
def test_a_target_that_is_exceeded_says_by_how_much_and_why(tmp_path, granularity, why):
    facts = make_facts(target=0.5)
    facts["granularity"] = granularity
    assert "**Target reached.**" in write(tmp_path, facts)[0]
    facts["layers"][1]["zeros"] += round(0.1265 * 4072)
    for text in (*write(tmp_path, facts), " ".join(printed_summary(facts).split())):
        assert "Target exceeded." in text
        assert f"12.65 points more than the target of 50.00 %, {why}" in text


@pytest.mark.usefixtures("no_drawing")
def test_a_target_in_costs_is_judged_by_them(tmp_path):
    facts = make_facts(target=0.5) | {"costs": "multiply_adds", "granularity": "Channels()"}
    for removed, verdict in ((0.5, "reached"), (0.6, "exceeded"), (0.4, "not reached")):
        facts["final"]["removed"] = removed
        text = write(tmp_path, facts)[0]
        assert f"**Target {verdict}.** {100 * removed:.2f} % of the multiply-adds" in text


@pytest.mark.usefixtures("no_drawing")
def test_a_latency_that_is_a_sum_of_prices_is_called_estimated(tmp_path):
    facts = make_facts() | {"costs": "latency"}
    markdown, page = write(tmp_path, facts)
    for text in (markdown, page, " ".join(printed_summary(facts).split())):
        assert "75.00 % of the estimated latency of prunable weights is removed" in text
        assert "target: 75.00 % of estimated latency" in text


@pytest.mark.usefixtures("no_drawing")
def test_a_part_of_the_test_set_is_named_at_the_top_and_what_it_lacks_has_no_accuracy(tmp_path):
    facts = make_facts()
    warning = "Only 64 of 360 test images were used"
    assert not any(warning in text for text in write(tmp_path, facts))
    facts["final"] |= {"tested": 64, "test_per_class": [0.5, None]}
    markdown, page = write(tmp_path, facts)
    for text in (markdown.split("##")[0], page.split("<h2>")[0], printed_summary(facts)):
        assert warning in " ".join(text.split())
    classes = next(t for t in markdown_tables(markdown) if t[0] == ["class", "accuracy"])
    assert classes[1:] == [["zero", "50.00 %"], ["one", "–"]]


@pytest.mark.usefixtures("no_drawing")
def test_lines_of_python_show_how_to_use_the_result(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    markdown, page = write(tmp_path / "run", make_facts())
    code = "\n".join(
        [
            "from pruneflow import load_classifier",
            "classifier = load_classifier('run')",
            "print(classifier.predict('run/example.png'))",
        ]
    )
    assert f"```python\n{code}\n```" in markdown
    assert f"<pre><code>{html.escape(code)}</code></pre>" in page
    facts = make_facts()
    facts["classifier"]["network"] = "mine.nets.Network"
    assert "from mine.nets import Network\n" in write(tmp_path / "run", facts)[0]
    assert "('run', Network(width=8, num_classes=2, in_channels=1))" in write(Path("run"), facts)[0]
    facts["classifier"]["mean"] = None
    assert "```" not in write(tmp_path / "run", facts)[0]


@pytest.mark.usefixtures("no_drawing")
def test_a_target_not_known_ahead(tmp_path):
    facts = make_facts()
    facts["target"] = None
    for line in facts["plan"]:
        line.update(amount=None, sparsity=None, kept=None)
    markdown, _ = write(tmp_path, facts)
    assert "**Sparsity was not known in advance.** 75.00 % of 4,072" in markdown
    assert markdown_tables(markdown)[2][2][2:6] == ["–", "–", "–", "50.00 %"]


def test_no_rounds_at_all(tmp_path):
    markdown, _ = write(tmp_path, make_facts(target=0.0, planned=0))
    assert all_files(tmp_path) == FILES
    assert "**Nothing was pruned.** 0.00 % of 4,072" in markdown
    assert len(markdown_tables(markdown)[2]) == 2  # header and the dense phase


@pytest.mark.usefixtures("no_drawing")
def test_names_layers_that_nothing_is_left_of(tmp_path):
    facts = make_facts()
    assert all("Nothing is left of" not in text for text in write(tmp_path, facts))
    facts["layers"][0]["zeros"] = facts["layers"][0]["weights"]
    assert all("Nothing is left of: features.0.weight." in t for t in write(tmp_path, facts))


@pytest.mark.usefixtures("no_drawing")
def test_a_cached_dense_phase_has_no_time(tmp_path):
    facts = make_facts()
    assert "12 min 05 s" in write(tmp_path, facts)[0]
    facts["dense_cached"] = True
    markdown, _ = write(tmp_path, facts)
    assert "12 min 05 s" not in markdown
    assert "from the cache, not trained again" in markdown


@pytest.mark.usefixtures("no_drawing")
def test_says_that_the_file_is_not_smaller_only_when_it_is_not(tmp_path):
    facts = make_facts()
    remark = "zeros are stored; the file is not smaller"
    assert all(remark in text for text in (*write(tmp_path, facts), printed_summary(facts)))
    facts["size"]["model_bytes"] //= 2
    assert not any(remark in text for text in (*write(tmp_path, facts), printed_summary(facts)))


@pytest.mark.usefixtures("no_drawing")
def test_html_escapes_markup(tmp_path):
    facts = make_facts()
    facts["recipe"] = facts["classes"][0] = facts["layers"][0]["name"] = "<b>&"
    facts["frozen"] = ["<b>&"]
    _, page = write(tmp_path, facts)
    assert "<b>" not in page
    assert page.count("&lt;b&gt;&amp;") == 5  # <title>, <h1>, class, layer, frozen


def test_a_nan_is_a_gap_and_no_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # whose name is in the report otherwise
    facts = make_facts()
    facts["dense"]["val_accuracy"] = facts["rounds"][0]["fine_tuned_accuracy"] = math.nan
    markdown, _ = write(tmp_path, facts)
    assert all_files(tmp_path) == FILES
    assert "nan" not in markdown
    assert markdown_tables(markdown)[0][2] == ["validation accuracy", "–", "92.81 %", "–"]


def test_a_failure_leaves_the_old_files_and_nothing_partial(tmp_path, monkeypatch):
    write(tmp_path, make_facts())
    old = {file: (tmp_path / file).read_bytes() for file in FILES}

    def half(figure, path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    facts = make_facts()
    facts["seed"] = 8
    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path, facts)
    assert all_files(tmp_path) == FILES
    changed = [file for file in FILES if (tmp_path / file).read_bytes() != old[file]]
    assert changed == ["report.json"]  # written first, and whole
    assert json.loads((tmp_path / "report.json").read_text())["seed"] == 8


@pytest.mark.usefixtures("no_drawing")
def test_summary_holds_the_first_table_of_the_report(tmp_path):
    facts = make_facts()
    facts["recipe"] = "[red]digits"  # not markup
    text = printed_summary(facts)
    rows = markdown_tables(write(tmp_path, facts)[0])[0][1:]
    assert all(cell in text for row in rows for cell in row)
    assert "[red]digits" in text


def test_accuracy_figure_marks_rounds_and_the_dense_phase():
    facts = make_facts()
    upper, lower = accuracy_figure(make_history(facts), [(1, 3, 0.7), (2, 5, 0.5)], 3).axes
    validation = next(line for line in upper.lines if line.get_label() == "validation")
    assert list(validation.get_xdata()) == [
        1,
        2,
        4,
        5,
        6,
        7,
    ]  # the epoch without a value is left out
    dotted = [line for line in lower.lines if line.get_linestyle() == ":"]
    assert [line.get_xdata()[0] for line in dotted] == [3, 5]
    (dense,) = upper.patches
    assert (dense.get_x(), dense.get_width()) == (0, 3)
    (ticks,) = upper.child_axes
    assert [text.get_text() for text in ticks.get_xticklabels()] == ["1", "2"]


def test_accuracy_figure_without_a_single_row(tmp_path):
    accuracy_figure([], [], dense_epochs=0).savefig(tmp_path / "empty.png")
    assert (tmp_path / "empty.png").stat().st_size > 0


def test_density_figure_counts_what_is_kept_and_draws_to_scale(tmp_path):
    layers = [("a.weight", 50, 100), ("gone.weight", 0, 100), ("$x$_{", 100, 100), ("none", 0, 0)]
    figure = density_figure(layers)
    figure.savefig(tmp_path / "density.png")  # names are no formulas, empty layers no errors
    axes, counts = figure.axes
    assert [bar.get_width() for bar in axes.patches] == [0.5, 0, 1, 0]
    assert axes.get_xscale() == "linear"
    assert [text.get_text() for text in counts.get_yticklabels()][:2] == ["50 of 100", "0 of 100"]
    assert density_figure([("a", 1, 100)]).axes[0].get_xscale() == "log"


def test_density_figure_grows_with_the_layers():
    many = density_figure([(f"layer{index}.weight", 1, 2) for index in range(80)])
    few = density_figure([("layer.weight", 1, 2)])
    assert many.get_figheight() > 80 * 0.2 > few.get_figheight()


def test_rounds_figure_shows_both_accuracies_and_thins_its_labels():
    rounds = [(1 - 0.97**number, 0.5, 0.9) for number in range(1, 101)]
    upper, lower = rounds_figure(0.95, rounds).axes
    names = {line.get_label(): list(line.get_ydata()) for line in lower.lines}
    assert names["fine-tuned"] == [0.9] * 100
    assert names["just pruned, not fine-tuned"] == [0.5] * 100
    assert set(names["dense"]) == {0.95}
    labels = [text.get_text() for text in lower.get_xticklabels()]
    assert 5 < len(labels) <= 15
    assert labels[0] == "dense"
    assert labels[-1] == "95.24"
    assert len(upper.texts) == len(labels) - 1
