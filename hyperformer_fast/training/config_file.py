"""Read a run's arguments from a JSON or YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..json_files import parse
from ..yaml_files import parse_yaml
from .field_checks import RunConfigError

YAML_SUFFIXES = (".yaml", ".yml")
SUFFIXES = (".json", *YAML_SUFFIXES)


def read_fields(path: str | Path) -> dict[str, Any]:
    """Read the object of fields in a file. In JSON the last of several equal keys counts, as Python's json has it.

    Raises:
        RunConfigError: the file cannot be read or holds no object; the message names it.
    """
    path = Path(path)
    kind = "YAML" if path.suffix.lower() in YAML_SUFFIXES else "JSON"
    try:
        text = path.read_text(encoding="utf-8-sig")
        fields = parse_yaml(text, "a configuration in YAML") if kind == "YAML" else parse(text)
    except OSError as error:
        raise RunConfigError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise RunConfigError(f"{path}: not {kind}: {error}") from error
    if not isinstance(fields, dict):
        raise RunConfigError(f"{path}: a run's arguments must be an object of fields, got {type(fields).__name__}")
    return fields
