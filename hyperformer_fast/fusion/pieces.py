"""The names of what can be fused in a T5, and the sets of them that a caller may ask for."""

from __future__ import annotations

from collections.abc import Iterable

from ..nearest import did_you_mean

#: What can be fused. ``products``: float32 products of frozen weights by oneDNN, on CPUs where PyTorch's own take no
#: wider instructions than AVX2. ``norm``: T5's layer norm in one pass, and in the pass of the sublayer before it where
#: the structure allows. ``dropout``: a sublayer's dropout and residual add in one pass, with a mask that is not stored.
#: ``feed_forward``: activation, gate and dropout in one pass. ``attention``: softmax and dropout in one pass.
#: ``cache``: no key/value cache where labels are given. ``loss``: the loss of a frozen head in chunks, without the
#: logits of the whole batch.
PIECES = ("products", "norm", "dropout", "feed_forward", "attention", "cache", "loss")

#: What ``"auto"`` and ``True`` mean. ``loss`` must be asked for by name, because it returns no logits.
AUTO_PIECES = frozenset(PIECES) - {"loss"}

Fuse = str | bool | Iterable[str] | None


def resolve(fuse: Fuse, argument: str = "fuse") -> frozenset[str]:
    """The pieces that ``fuse`` asks for.

    Args:
        fuse: ``"auto"`` or True for all but ``loss``, False, None or ``"none"`` for no piece, ``"all"`` for every
            piece, one piece's name, or several.
        argument: the argument's name, for errors.

    Raises:
        ValueError: an unknown piece.
        TypeError: neither text nor a bool nor a collection of names.
    """
    if fuse is True or fuse == "auto":
        return AUTO_PIECES
    if fuse is False or fuse is None or fuse == "none":
        return frozenset()
    if fuse == "all":
        return frozenset(PIECES)
    names = [fuse] if isinstance(fuse, str) else fuse
    try:
        pieces = list(names)
    except TypeError:
        raise TypeError(f'{argument} must be "auto", True, False or a set of pieces, got {fuse!r}') from None
    for piece in pieces:
        if piece not in PIECES:
            known = f"the pieces are {', '.join(PIECES)}{did_you_mean(piece, PIECES)}"
            raise ValueError(f"{argument} has an unknown piece {piece!r}: {known}")
    return frozenset(pieces)
