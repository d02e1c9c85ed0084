"""Docstrings keep their form: one argument a line, and the configuration's help texts as its docstring has them."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from pathlib import Path

import pytest

import hyperformer_fast
from hyperformer_fast import HyperFormerConfig

ROOT = Path(hyperformer_fast.__file__).resolve().parents[1]
FOLDERS = ("hyperformer_fast", "benchmarks", "scripts", "tools", "build_tools", "tests")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def arguments(docstring: str) -> dict[str, str]:
    """The entries of a docstring's Args section, each on one line."""
    section = re.search(r"^Args:\n((?:[ ]+.*\n?|\n)+)", inspect.cleandoc(docstring), re.MULTILINE)
    entries: dict[str, str] = {}
    for line in (section[1] if section else "").splitlines():
        if re.match(r" {4}\S", line):
            names, _, text = line.strip().partition(":")
            entries[names] = text.strip()
        elif line.strip():
            entries[names] += f" {line.strip()}"
    return entries


def parameters(node: ast.AST) -> set[str]:
    """The names that the Args section of a function or class may explain."""
    if isinstance(node, ast.ClassDef):
        fields = {each.target.id for each in node.body if isinstance(each, ast.AnnAssign)}
        makers = [each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "__init__"]
        return fields.union(*map(parameters, makers))
    return {each.arg for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_argument_is_swallowed_by_the_one_before(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and (docstring := ast.get_docstring(node)):
            for entry, text in arguments(docstring).items():
                names = "|".join(map(re.escape, parameters(node))) or "(?!)"
                swallowed = re.findall(rf"[.;,]\s+({names}):\s", text)
                assert not swallowed, f"{node.name}: {swallowed} within the text of {entry!r}"


def test_the_configurations_help_is_its_docstring():
    documented = arguments(HyperFormerConfig.__doc__)
    helps = {field.name: field.metadata["help"] for field in dataclasses.fields(HyperFormerConfig)}
    assert list(documented) == list(helps)
    assert {name: text.replace("``", "") for name, text in documented.items()} == helps
