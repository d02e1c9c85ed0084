"""Fences and what else orders or delays threads. (The barriers of the block are part of control: see block.py.)"""

from __future__ import annotations

import numpy as np

from ..fault import Fault
from ..registry import Modifiers, instruction


@instruction("membar", "fence")
def fence(machine, s):
    """Lanes run in order here, so only the fence between threads and the asynchronous proxy does something."""
    m = Modifiers(s)
    proxy = m.flag("proxy")
    kind = m.take("async", "alias", "tensormap::generic", "async::generic") if proxy else None
    m.ignore("sc", "acq_rel", "acquire", "release", "cta", "gpu", "sys", "gl", "cluster", "mbarrier_init",
             "shared::cta", "shared::cluster", "global", "sync_restrict::.*")  # fmt: skip
    m.done()
    if not proxy:
        return lambda mask: None
    if kind != "async":
        raise Fault(f"the fence of the proxy {kind} is not known")

    def step(mask):
        warps = np.arange(machine.warps) if mask is True else np.unique(machine.warp[mask])
        machine.shared.fence_proxy(warps)

    return step


@instruction("bar")
def warp_barrier(machine, s):
    """bar.warp.sync: the lanes that it names run together here already; block.py waits for them."""
    m = Modifiers(s)
    if not (m.flag("warp") and m.flag("sync")):
        raise Fault("only bar.warp.sync is decoded here")
    m.done()
    return lambda mask: None


@instruction("griddepcontrol", "nanosleep")
def wait_for_nothing(machine, s):
    """Grids run one after the other here, and time does not pass."""
    return lambda mask: None
