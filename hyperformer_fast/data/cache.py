"""Keep what was read and tokenised once, as Arrow files that later runs and other processes map into memory."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset, Features


_STARTED = time.time()


@dataclasses.dataclass(frozen=True)
class Cache:
    """Where and how datasets are kept.

    Args:
        folder: the folder of the Arrow files; None for ``hyperformer_fast`` in that of ``datasets``
            (``HF_DATASETS_CACHE``).
        overwrite: make them anew.
        num_proc: processes that tokenise.
    """

    folder: str | None = None
    overwrite: bool = False
    num_proc: int | None = None

    def path(self, *parts: str) -> Path:
        """Return the file of what follows from ``parts`` and from the code of this package."""
        import datasets

        root = Path(self.folder or datasets.config.HF_DATASETS_CACHE)
        return root / "hyperformer_fast" / f"{text_print(_code_print(), *parts)[:32]}.arrow"

    def is_fresh(self, path: Path) -> bool:
        """Return whether a file may be used: it need not be made anew, or another process of this run has done so."""
        there = [path, *path.parent.glob(f"{path.stem}_*.arrow")]  # tokenised by several processes
        return not self.overwrite or any(each.is_file() and each.stat().st_mtime >= _STARTED for each in there)


def text_print(*parts: str) -> str:
    """Return the SHA-256 of some texts, in hexadecimal."""
    digest = hashlib.sha256()
    for part in parts:
        encoded = part.encode("utf-8", "surrogatepass")
        digest.update(b"%d:" % len(encoded) + encoded)
    return digest.hexdigest()


def file_print(path: Path) -> str:
    """Return a hash of a file's content."""
    import xxhash  # a dependency of datasets; several GB/s

    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return f"{path.suffix} {digest.hexdigest()}"


@functools.cache
def _code_print() -> str:
    """A hash of this package, so that no file outlives the code that made it."""
    return text_print(*(path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.py"))))


@contextlib.contextmanager
def only_one(path: Path) -> Iterator[None]:
    """Hold the lock of a file: of several processes that need it, one makes it and the others wait for it."""
    from filelock import FileLock  # a dependency of datasets

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        yield


@contextlib.contextmanager
def progress(shown: bool) -> Iterator[None]:
    """Show the progress bars of ``datasets`` only if ``shown``, and only in a terminal."""
    import datasets

    hide = not (shown and sys.stderr.isatty()) and not datasets.are_progress_bars_disabled()
    if hide:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            datasets.enable_progress_bars()


def kept(path: Path, features: Features, batches: Callable[[], Iterator[Mapping[str, list[Any]]]], cache: Cache) -> Any:
    """Return the Dataset in ``path``, which is written from ``batches`` if it is not there.

    Without a place to write, the Dataset is made in memory.
    """
    import pyarrow as pa
    from datasets import Dataset

    schema = features.arrow_schema
    to_arrow = lambda batch: pa.RecordBatch.from_pydict(dict(batch), schema=schema)  # noqa: E731
    try:
        with only_one(path):
            if not (path.is_file() and cache.is_fresh(path)):
                partial = path.with_suffix(f".{os.getpid()}.tmp")
                try:
                    with pa.OSFile(str(partial), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
                        for batch in batches():
                            writer.write_batch(to_arrow(batch))
                    os.replace(partial, path)
                finally:
                    partial.unlink(missing_ok=True)
            return Dataset.from_file(str(path))
    except (OSError, NotImplementedError):  # read-only or full; no locks on this file system
        return Dataset(pa.Table.from_batches(map(to_arrow, batches()), schema=schema))


def content_print(dataset: Dataset) -> str:
    """Return the SHA-256 of a Dataset's rows, which depends on neither its file nor its chunks."""
    digest = hashlib.sha256()
    for name in sorted(dataset.column_names):
        digest.update(f"{name}\n".encode())
        for table in dataset.select_columns([name]).with_format("arrow").iter(10_000):
            _update(digest, table.column(0).combine_chunks())
    return digest.hexdigest()


def _update(digest: Any, values: Any) -> None:
    import pyarrow as pa
    import pyarrow.compute as pc

    if isinstance(values, pa.ChunkedArray):  # older pyarrow returns one from combine_chunks
        values = pa.concat_arrays(values.chunks)
    if pa.types.is_list(values.type):
        digest.update(pc.fill_null(pc.list_value_length(values), -1).to_numpy(zero_copy_only=False).tobytes())
        _update(digest, values.flatten())
    elif pa.types.is_string(values.type):
        digest.update(pc.fill_null(pc.binary_length(values), -1).to_numpy(zero_copy_only=False).tobytes())
        digest.update("".join(text or "" for text in values.to_pylist()).encode())
    else:
        digest.update(values.to_numpy(zero_copy_only=False).tobytes())
