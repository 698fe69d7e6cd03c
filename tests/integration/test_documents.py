"""README.md and docs/ are true: their Python runs, their commands compose, their links lead on."""

import re
import shlex
from itertools import product
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from settings import SETTINGS

from pruneflow.run.recipes import store_recipes
from pruneflow.run.resources import resource_dir

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHERS = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "README.md"]

PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^ {4}(?:PYTHONPATH=\. )?python -m pruneflow( .*)?$", re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if PYTHON.search(page.read_text())], ids=lambda page: page.name
)
# What Lightning says of its defaults, of short epochs, and of any training that is resumed.
@pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX`:UserWarning")
@pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists:UserWarning")
def test_python_runs_from_the_top_of_the_page_to_its_end(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, names = page.read_text(), {}
    for block in PYTHON.finditer(text):
        line = text.count("\n", 0, block.start(1))  # so that a traceback names the line of the page
        exec(compile("\n" * line + block[1], page, "exec"), names)


@pytest.fixture(scope="module")
def options():
    store_recipes()
    with initialize_config_dir(str(resource_dir("conf")), version_base="1.3"):
        yield
    ConfigStore.instance().repo.pop("recipe")


@pages
def test_commands_compose(page, options):
    for command in COMMAND.finditer(page.read_text()):
        words = shlex.split(command[1] or "", comments=True)
        settings = [word for word in words if "=" in word and "mine" not in word]
        for job in product(*map(sweep, OverridesParser.create().parse_overrides(settings))):
            compose("config", overrides=list(job))


def sweep(override):
    if not override.is_sweep_override():
        return [override.input_line]
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    for file, heading in LINK.findall(page.read_text()):
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), file
        if heading:
            assert heading in {anchor(each) for each in HEADING.findall(target.read_text())}


def anchor(heading):
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_every_option_is_documented(setting):
    text = (ROOT / "docs" / "options.md").read_text()
    if setting.name.isidentifier() and setting.argument != "clock":
        assert re.search(rf"`\"?{setting.name}\b", text)
    if setting.yaml and ":" not in setting.yaml:
        assert f"`{setting.yaml}`" in text
