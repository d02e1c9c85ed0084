"""The GPUs of the compile reports and predictions: what fits on a multiprocessor, and a roofline model of an H100.

Nothing here is measured. Sizes and peaks are from NVIDIA's documents; what is assumed says so.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple


class Multiprocessor(NamedTuple):
    """Limits of one multiprocessor (CUDA programming guide, "compute capabilities")."""

    shared: int  #: KiB of shared memory for all of its blocks
    threads: int


#: By architecture: 80 is sm_80.
MULTIPROCESSORS = {
    80: Multiprocessor(164, 2048),
    86: Multiprocessor(100, 1536),
    89: Multiprocessor(100, 1536),
    90: Multiprocessor(228, 2048),
    100: Multiprocessor(228, 2048),
    120: Multiprocessor(100, 1536),
}
REGISTERS, BLOCKS = 65536, 32
#: Registers are given to a warp in units of 256; the system takes 1 KiB of each block's shared memory.
REGISTER_UNIT, SYSTEM_SHARED = 256, 1024


def blocks_per_multiprocessor(registers: int, shared: int, warps: int, arch: int) -> int:
    """How many blocks of ``warps`` warps, ``registers`` registers a thread and ``shared`` bytes fit at a time."""
    limits = MULTIPROCESSORS[arch]
    of_a_warp = -(-32 * registers // REGISTER_UNIT) * REGISTER_UNIT
    return min(
        BLOCKS,
        limits.threads // 32 // warps,
        REGISTERS // (of_a_warp * warps),
        (limits.shared << 10) // (shared + SYSTEM_SHARED),
    )


@dataclasses.dataclass(frozen=True)
class Device:
    """Peak rates of a GPU: bytes and operations per second, and seconds of what has no rate."""

    name: str
    multiprocessors: int
    memory: float
    cache: float  #: the second-level cache; assumed
    tensor: float  #: dense bfloat16 products on tensor cores
    float32: float
    float64: float
    integer: float  #: 32-bit integer instructions
    launch: float  #: one kernel launch; assumed
    wait: float  #: an exposed load, a reduction over a block or a barrier of the grid; assumed

    def time(self, work: Work) -> tuple[float, str]:
        """The roofline: seconds of one launch of ``work`` without the launch itself, and what they are bound by.

        Memory serves all blocks alike; the other units are only as many as the multiprocessors that have a block.
        """
        share = min(1.0, work.blocks / self.multiprocessors)
        times = {
            "memory": work.once / self.memory,
            "cache": work.asked / self.cache / share,
            "tensor cores": work.tensor / self.tensor / share,
            "float32": work.float32 / self.float32 / share,
            "float64": work.float64 / self.float64 / share,
            "integers": work.integer / self.integer / share,
            "latency": work.waits * self.wait,
        }
        bound = max(times, key=times.get)
        return times[bound], bound

    def prediction(self, work: Work) -> str:
        """Microseconds of one launch of ``work``, and what they are bound by: a table's cell."""
        seconds, bound = self.time(work)
        return f"{1e6 * (seconds + self.launch):.1f} ({bound})"


class Work(NamedTuple):
    """What one launch does."""

    blocks: int
    once: float  #: bytes of all tensors, each counted once
    asked: float  #: bytes of all accesses, whatever a cache serves
    tensor: float = 0  #: operations on tensor cores, padding included
    float32: float = 0
    float64: float = 0
    integer: float = 0
    waits: float = 0  #: that one block makes one after the other


#: The SXM module's data sheet; its architecture's white paper gives 33.5 Tops of integers, of which a product and a sum
#: are two.
H100 = Device("H100 SXM", 132, 3.35e12, 5.5e12, 989e12, 67e12, 67e12, 16.7e12, launch=2e-6, wait=1e-6)
