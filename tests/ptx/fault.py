"""The error that every part of the interpreter raises."""


class Fault(RuntimeError):
    """A kernel did what a GPU would punish, or what the interpreter does not know.

    Raised while a kernel runs, the message names the kernel, the block, the instruction and its line in the PTX.
    """
