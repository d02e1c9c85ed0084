"""A PTX interpreter: runs compiled GPU kernels on the CPU, block by block, and checks every access.

    kernel = Kernel(text, entry=None)
    memory = Memory()
    memory.add(tensor.data_ptr(), tensor.nbytes, "x")
    block = Block(kernel, memory, {name: bytes}, (0, 0, 0), (1, 1, 1), threads=128, dynamic_shared_bytes=0)
    block.run()
    block.counts["instructions"], block.hazards

A Fault names the kernel, the block, the instruction and its line. README.md says what is modelled and what is not.
"""

from .block import Block
from .fault import Fault
from .memory import Memory
from .parse import Kernel

__all__ = ["Block", "Fault", "Kernel", "Memory"]
