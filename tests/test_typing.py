"""What mypy tells a user's script about the package as it is installed here; other installations: tests/packaging."""

from __future__ import annotations

import sys

import pytest
from support.typed import check_types

pytest.importorskip("mypy", reason="needs mypy")


def test_a_misspelt_keyword_is_caught(tmp_path):
    check_types(sys.executable, tmp_path)
