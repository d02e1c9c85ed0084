"""Read YAML that a person wrote; every fault in it is a ValueError."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

from .extras import require

#: 3e-4 is a number to everybody but YAML 1.1, which asks for 3.0e-4.
_EXPONENT = re.compile(r"[-+]?(\d+|\d+\.\d*|\.\d+)[eE][-+]?\d+$")


def parse_yaml(text: str, what: str) -> Any:
    """Parse YAML like ``yaml.safe_load``, but read 3e-4 as a number, and refuse a key that stands twice in a mapping.

    Args:
        text: the YAML text.
        what: what is read, as the subject of a sentence ("a task file in YAML").

    Raises:
        ValueError: the text is not YAML, or a key stands twice.
        MissingPackage: PyYAML is not installed.
    """
    require(what, "yaml")
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
            names = [key.value for key, _ in node.value]
            for name in names:
                if names.count(name) > 1:
                    line = node.start_mark.line + 1
                    raise ValueError(f"the name {name!r} stands twice in the object that starts in line {line}")
            return super().construct_mapping(node, deep)

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))
    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())) from error
