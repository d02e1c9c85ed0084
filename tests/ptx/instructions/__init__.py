"""The instructions, by family. Importing this package registers their decoders."""

from . import (  # noqa: F401
    arithmetic,
    asynchronous,
    atomics,
    bits,
    comparison,
    conversion,
    floating,
    matrices,
    movement,
    order,
    tensor_core,
    warp,
    warpgroup,
)
