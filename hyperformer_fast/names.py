"""Any text as the name of a task: how it becomes the name of a parameter, which cannot be any text."""

from __future__ import annotations

from torch import nn

_MARK = "%"
_ESCAPES = {"%": "%25", ".": "%2E"}
# of an instance, because some names are set when one is made
_TAKEN = frozenset(dir(nn.ParameterDict()))


def attribute_of(name: str) -> str:
    """The name under which a ``ParameterDict`` can keep the parameter ``name``; :func:`name_of` is the inverse.

    A name that it can keep stays what it is. One with a dot, or that a ``ParameterDict`` has for itself ("training",
    "keys", ...), or that starts with the mark, is escaped behind a mark.
    """
    if name and "." not in name and not name.startswith(_MARK) and name not in _TAKEN:
        return name
    return _MARK + "".join(_ESCAPES.get(character, character) for character in name)


def name_of(attribute: str) -> str:
    """The name that :func:`attribute_of` turned into ``attribute``."""
    if not attribute.startswith(_MARK):
        return attribute
    return attribute[len(_MARK) :].replace("%2E", ".").replace("%25", "%")


class NamedParameters(nn.ParameterDict):
    """A ``ParameterDict`` whose keys may be any text."""

    def _key_to_attr(self, key: str) -> str:
        return attribute_of(super()._key_to_attr(key))

    def rename(self, old: str, new: str) -> None:
        """Give the parameter ``old`` another name. It stays the same object, and in its place among the others: an
        optimizer's state and a checkpoint go by their order."""
        before = list(self.items())
        for name, _ in before:
            del self[name]
        for name, parameter in before:
            self[new if name == old else name] = parameter
