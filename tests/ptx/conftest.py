"""The tests marked ``ptx_wide`` take minutes, so they run only where ``-m`` names them, as in `make ptx`."""

from __future__ import annotations


def pytest_collection_modifyitems(config, items):
    if "ptx_wide" in (config.option.markexpr or ""):
        return
    wide = [item for item in items if item.get_closest_marker("ptx_wide")]
    if wide:
        config.hook.pytest_deselected(items=wide)
        items[:] = [item for item in items if item not in set(wide)]
