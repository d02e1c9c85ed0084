"""Read tasks that a person described in a file: many in a task file, or one in ``task.json`` beside its rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..json_files import parse, read_object
from ..yaml_files import parse_yaml
from .errors import DataError, shown_value
from .task_fields import checked_fields, spec_of
from .tasks import FILES, TaskSpec

TASK_FILE = "task.json"


def read_task_file(folder: Path) -> dict[str, Any]:
    """Read the fields in the task's ``task.json``, and add those that follow from them. Without a file there are none.

    Raises:
        DataError: the file cannot be used; the message names it and the field.
    """
    path = folder / TASK_FILE
    try:
        content = read_object(path)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise DataError(str(error)) from error
    if content.pop("name", folder.name) != folder.name:
        raise DataError(f"{path}: the task is named after its folder, {folder.name!r}: remove the field 'name'")
    return _placed(checked_fields(content, str(path)), path, str(path))


def read_entries(path: str | Path, find_known: Callable[[str], TaskSpec | None] = lambda name: None) -> list[TaskSpec]:
    """Read the tasks of a task file, which is YAML, or JSON where its name ends in ``.json``.

    The file holds an object of tasks, ``{name: {field: value}}``, or a list of tasks that have a ``name`` among their
    fields. The fields are those of TaskSpec. ``train_file``, ``validation_file`` and ``test_file`` are relative to the
    task file.

    Args:
        path: the file.
        find_known: returns the task known by a name, or None. The fields of an entry of that name replace its own.

    Raises:
        DataError: the file or an entry cannot be used; the message names the file, the task, the field, its value and
            what is expected.
    """
    path = Path(path)
    specs: dict[str, TaskSpec] = {}
    for name, fields in _entries(_content(path), path):
        if name in specs:
            raise DataError(f"{path}: task {name!r} stands there twice")
        place = f"{path}: task {name!r}"
        fields = _placed(dict(fields), path, place) if isinstance(fields, Mapping) else fields
        specs[name] = spec_of(name, fields, str(path), find_known(name))
    return list(specs.values())


def _content(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"task file {path} is absent") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"task file {path} cannot be read: {error}") from error
    try:
        return parse(text, _once) if path.suffix == ".json" else parse_yaml(text, "a task file in YAML")
    except ValueError as error:
        raise DataError(f"{path}: not {'JSON' if path.suffix == '.json' else 'YAML'}: {error}") from error


def _entries(content: Any, path: Path) -> list[tuple[str, Any]]:
    if isinstance(content, Mapping) and isinstance(content.get("name"), str):
        content = [content]
    if isinstance(content, list):
        found = []
        for number, entry in enumerate(content, 1):
            if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
                raise DataError(f"{path}: entry {number} must be an object with a name, got {shown_value(entry)}")
            found.append((entry["name"], {field: value for field, value in entry.items() if field != "name"}))
    elif isinstance(content, Mapping):
        found = list(content.items())
    else:
        raise DataError(f"{path}: must hold tasks as {{name: {{field: value}}}}, got {shown_value(content)}")
    if not found:
        raise DataError(f"{path} holds no tasks")
    for name, _ in found:
        if not isinstance(name, str) or not name:
            raise DataError(f"{path}: the name of a task must be a text, got {shown_value(name)}; put quotes around it")
    return found


def _placed(fields: dict[str, Any], path: Path, place: str) -> dict[str, Any]:
    """Return the fields with the paths of files made absolute. Raises DataError for a file that is absent."""
    for field in FILES:
        if isinstance(fields.get(field), str):
            file = (path.parent / fields[field]).resolve()
            if not file.exists():
                raise DataError(f"{place}: {field} {fields[field]!r} is absent; it is looked for at {file}")
            fields[field] = str(file)
    return fields


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names: set[str] = set()
    for name, _ in pairs:
        if name in names:
            raise ValueError(f"the name {name!r} stands twice in one object")
        names.add(name)
    return dict(pairs)
