"""The documentation runs: the quick start's code, the commands' options, the links, and the page of arguments."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

import hyperformer_fast
from hyperformer_fast.cli import _parser
from hyperformer_fast.data import registry
from hyperformer_fast.data.registry import read_task_entries
from hyperformer_fast.training.parser import parse_flags

ROOT = Path(hyperformer_fast.__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "examples/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_the_quick_start_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_REGISTERED", {})  # what it registers is not for other tests
    names: dict = {"__name__": "quickstart"}
    for number, block in enumerate(blocks(ROOT / "docs/quickstart.md", "python"), 1):
        exec(compile(block, f"docs/quickstart.md, block {number}", "exec"), names)


def commands(page: Path) -> list[list[str]]:
    """The words of each of our commands on a page, behind ``hyperformer-fast`` or ``-m hyperformer_fast``."""
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    ours = re.compile(r"(?:^hyperformer-fast|-m hyperformer_fast) (.*)")
    # README gives the form of a command in brackets.
    return [shlex.split(found[1], comments=True) for line in lines if (found := ours.search(line)) and "[" not in line]


def test_the_flags_of_every_command_exist():
    given = [each for page in PAGES for each in commands(page)]
    assert {each[0] for each in given} >= {"train", "evaluate", "predict", "fewshot", "params", "doctor"}
    for words in given:
        if words[0] == "train":
            config, _ = parse_flags(words[1:])
            assert config is None or (ROOT / config).is_file()
        else:
            _parser().parse_args(words)


@pytest.mark.parametrize("page", ["docs/data.md", "docs/quickstart.md"])
def test_the_task_files_are_read(page, tmp_path):
    for number, block in enumerate(blocks(ROOT / page, "yaml")):
        path = tmp_path / f"{number}.yaml"
        path.write_text(block, encoding="utf-8")
        for file in re.findall(r"_file: (\S+)", block):
            (tmp_path / file).parent.mkdir(exist_ok=True)
            (tmp_path / file).touch()
        assert {spec.name for spec in read_task_entries(path)} == set(re.findall(r"^(\w+):", block, re.MULTILINE))


def test_the_page_of_arguments_is_what_the_code_says(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    tool = importlib.import_module("arguments_page")
    assert tool.PAGE.read_text(encoding="utf-8") == tool.page(), "run tools/arguments_page.py"


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)", text):
        path = page.parent / target if target else page
        assert path.exists(), f"links {target}"
        if anchor:
            assert anchor in anchors(path), f"links {target}#{anchor}"


def test_the_design_lists_every_module():
    """In a table whose text above names the folder, or with the folder before the name."""
    text = (ROOT / "docs/design.md").read_text(encoding="utf-8").split("## The three variants")[0]
    listed, folder = set(), ""
    for line in text.splitlines():
        if not line.startswith("|"):
            said = re.search(r", in `(data/|training/)`", line)
            folder = said[1] if said else "" if line.strip() else folder
        else:
            listed |= {folder + name for name in re.findall(r"`([\w/]+\.py)`", line.split("|")[1])}
    package = ROOT / "hyperformer_fast"
    modules = {str(path.relative_to(package)) for path in package.rglob("*.py") if "kernels" not in path.parts}
    assert modules - listed == {path for path in modules if path.endswith("__init__.py")}
    assert not listed - modules
