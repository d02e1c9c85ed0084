"""Threads that use one model at once.

Any number of threads may ask one model at the same time. What a forward needs of the tasks, it gathers when it begins,
under the lock of ``TaskOrder``, and keeps: adding or removing a task changes no weights that a forward has. What would
change a forward that runs (the mode, the parameters' place or values) is refused while another thread is in one. So is
an answer from a model that another thread trains.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
import transformers

if TYPE_CHECKING:
    from .model import HyperFormerModel

#: transformers before 5 keeps the static cache of the last generation in the T5, for the next one to use.
_SHARES_STATIC_CACHES = int(transformers.__version__.partition(".")[0]) < 5


class Threads:
    """Which threads run one model now. A copy or a pickle of the model has one of its own, in which none runs."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  #: held while a forward is counted, and while a change is made
        self._static_cache = threading.RLock()
        self._running: dict[int, int] = {}  #: how many forwards each thread is in, by its identity
        self._trainer: weakref.ref[threading.Thread] | None = None  #: who made the last forward that trains

    def __reduce__(self) -> tuple[type[Threads], tuple[()]]:
        return Threads, ()

    def running(self, model: HyperFormerModel) -> AbstractContextManager[None]:
        """Surrounds a forward or a generation.

        Raises:
            RuntimeError: when it is entered, if this is to be an answer from a model that another thread trains.
        """
        if getattr(model, "_is_replica", False):
            return contextlib.nullcontext()  # nn.DataParallel runs its replicas in threads of its own
        return _Running(self, model)

    @contextlib.contextmanager
    def alone(self, what: str) -> Iterator[None]:
        """Surrounds a change that forwards must not meet halfway: none begins before the change is done.

        Args:
            what: what is to be done, as the end of the sentence "cannot ...".

        Raises:
            RuntimeError: another thread is in a forward.
        """
        with self._lock:
            others = self._running.keys() - {threading.get_ident()}
            if others:
                names = sorted(t.name for t in threading.enumerate() if t.ident in others)
                raise RuntimeError(
                    f"cannot {what} while another thread ({', '.join(names)}) is in a forward or generation of this "
                    "model, whose result would be wrong: wait until it is done, or work on a copy "
                    "(copy.deepcopy(model))"
                )
            yield

    def expect_no_other_trains(self) -> None:
        """Raise RuntimeError if another thread trains the model."""
        trainer = None if self._trainer is None else self._trainer()
        if trainer is not None and trainer is not threading.current_thread() and trainer.is_alive():
            raise RuntimeError(
                f"the thread {trainer.name} trains this model, so that an answer now would have dropout and "
                "weights that change meanwhile: answer from a copy (copy.deepcopy(model).eval()), or call "
                "eval() when the training is done"
            )

    def stopped_training(self) -> None:
        """Tell that the model was set to evaluation."""
        self._trainer = None

    def static_cache(self, t5: Any, arguments: dict[str, Any]) -> AbstractContextManager[Any]:
        """Surrounds a generation of ``t5`` with these arguments of ``generate``: one at a time where they would share a
        cache."""
        config = arguments.get("generation_config") or getattr(t5, "generation_config", None)
        named = arguments.get("cache_implementation") or getattr(config, "cache_implementation", None)
        return self._with_static_cache(t5) if named and _SHARES_STATIC_CACHES else contextlib.nullcontext()

    @contextlib.contextmanager
    def _with_static_cache(self, t5: Any) -> Iterator[None]:
        with self._static_cache:
            if getattr(t5.config, "num_layers", 0) != getattr(t5.config, "num_decoder_layers", 0):
                # The cache has the encoder's number of layers. Those beyond the decoder's never get what the next
                # generation asks them for.
                for part in t5.modules():
                    vars(part).pop("_cache", None)
            yield

    def enter(self, trains: bool, training: bool) -> None:
        """Count a forward of this thread: one that trains, or an answer; the model is in training mode or not."""
        with self._lock:
            if training and trains:
                self._trainer = weakref.ref(threading.current_thread())
            elif training:
                self.expect_no_other_trains()
            me = threading.get_ident()
            self._running[me] = self._running.get(me, 0) + 1

    def leave(self) -> None:
        """Undo :meth:`enter`."""
        with self._lock:
            me = threading.get_ident()
            self._running[me] -= 1
            if not self._running[me]:
                del self._running[me]


class _Running:
    """:meth:`Threads.running`. A class, because a generator's context manager takes longer."""

    def __init__(self, threads: Threads, model: HyperFormerModel):
        self._threads, self._model = threads, model

    def __enter__(self) -> None:
        self._threads.enter(torch.is_grad_enabled(), self._model.training)

    def __exit__(self, *exception: object) -> None:
        self._threads.leave()
