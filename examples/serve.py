"""Serve all tasks of one model over HTTP: one process, one queue, batches of whatever tasks are asked for.

    pip install "hyperformer-fast[train,serve]"
    python examples/serve.py                        # the embedded T5 with untrained adapters, to try it out
    python examples/serve.py --run_dir my-run       # a trained run
    curl -d '{"task": "sentiment", "sentence": "a lovely film"}' http://127.0.0.1:8000/predict

A request is a row, as in a file for `hyperformer-fast predict`: the name of a task and its columns. The answer has the
row's `prediction` and the generated `prediction_text`. `GET /tasks` lists the tasks and their columns, and `GET /stats`
says how large the batches were. `examples/serve_load.py` is a load test. This is an example, to be copied and changed.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import copy
import dataclasses
import json
import queue
import threading
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from typing import Any

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from transformers import PreTrainedTokenizerBase

from hyperformer_fast import HyperFormerConfig, HyperFormerModel, get_hyperformer_model
from hyperformer_fast.data import DataError, TaskSpec
from hyperformer_fast.data.builtin import BUILTIN_TASKS
from hyperformer_fast.data.registry import builtin_spec
from hyperformer_fast.tiny import load_tiny
from hyperformer_fast.training.generation import generate_mixed

#: The most bytes of a request.
MOST_BYTES = 1 << 20


@dataclasses.dataclass
class Served:
    """A model in evaluation, and what is needed to ask it.

    Args:
        model, tokenizer: both of one T5.
        specs: the tasks, by name.
        max_source_length: the most tokens of a row.
        counter: a tokenizer of its own for the thread that takes requests. One that truncates must not be used by two
            threads at once: each call sets the length at which the other one would truncate.
    """

    model: HyperFormerModel
    tokenizer: PreTrainedTokenizerBase
    specs: dict[str, TaskSpec]
    max_source_length: int = 512
    counter: PreTrainedTokenizerBase = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.counter = copy.deepcopy(self.tokenizer)

    def options(self, task: str) -> dict[str, Any]:
        """The arguments of ``generate`` for a task."""
        return self.specs[task].generation_kwargs(self.tokenizer)

    def answer(self, task: str, text: str) -> dict[str, Any]:
        """What the model wrote, and the label that it stands for."""
        spec = self.specs[task]
        return {"prediction": spec.answer(spec.parse(text), spec.rows_have_names), "prediction_text": text}


def load(run_dir: str | None = None, most_tokens: int = 512) -> Served:
    """Load a run, or the embedded T5 with adapters that were not trained. All weights are generated now."""
    if run_dir is None:
        t5, tokenizer = load_tiny()
        specs = {name: builtin_spec(name) for name in BUILTIN_TASKS}
        torch.manual_seed(0)
        model = get_hyperformer_model(t5, HyperFormerConfig(tasks=list(specs), reduction_factor=4))
    else:
        from rich.console import Console

        from hyperformer_fast.training.evaluate import load_model
        from hyperformer_fast.training.folder import kept_tasks, read_run

        run, specs, content = read_run(run_dir)
        specs = {**specs, **kept_tasks(content)}
        model, tokenizer = load_model(run_dir, run, None, Console(stderr=True))
        most_tokens = run.data.max_source_length
    model.eval().prepare()
    return Served(model, tokenizer, specs, most_tokens)


@dataclasses.dataclass
class Question:
    """A row that waits for its answer."""

    task: str
    source: str
    answer: Future[dict[str, Any]] = dataclasses.field(default_factory=Future)


class Batcher:
    """A thread that answers questions in batches of whatever tasks they are of.

    A batch begins with the question that has waited longest, and takes more until it has ``max_batch`` or the first one
    has waited ``max_wait`` seconds.

    Args:
        served: the model.
        max_batch: the most questions in a batch.
        max_wait: how long a question waits for others, in seconds.
        max_queue: how many questions may wait; further ones are refused.
    """

    def __init__(self, served: Served, max_batch: int = 32, max_wait: float = 0.005, max_queue: int = 1024):
        self.served, self.max_batch, self.max_wait = served, max_batch, max_wait
        self.sizes: collections.Counter[int] = collections.Counter()
        self._questions: queue.Queue[Question | None] = queue.Queue(max_queue)
        self._thread = threading.Thread(target=self._run, name="batcher")

    def __enter__(self) -> Batcher:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._questions.put(None)  # behind all others, which are still answered
        self._thread.join()

    def ask(self, task: str, source: str) -> Future[dict[str, Any]]:
        """Return what will be the answer. Raises queue.Full where too many wait."""
        question = Question(task, source)
        self._questions.put_nowait(question)
        return question.answer

    def _run(self) -> None:
        last = False
        while not last:
            first = self._questions.get()
            if first is None:
                return
            batch, until = [first], time.monotonic() + self.max_wait
            while len(batch) < self.max_batch:
                try:
                    found = self._questions.get(timeout=max(0.0, until - time.monotonic()))
                except queue.Empty:
                    break
                if found is None:
                    last = True
                    break
                batch.append(found)
            # Somebody who has gone needs no answer.
            batch = [each for each in batch if each.answer.set_running_or_notify_cancel()]
            if not batch:
                continue
            try:
                answers = self._answers(batch)
            except Exception as error:  # one batch's error must not stop the server
                for each in batch:
                    each.answer.set_exception(error)
                continue
            self.sizes[len(batch)] += 1
            for each, answer in zip(batch, answers, strict=True):
                each.answer.set_result(answer)

    def _answers(self, batch: Sequence[Question]) -> list[dict[str, Any]]:
        tasks, served = [each.task for each in batch], self.served
        decoding = {task: served.options(task) for task in tasks}
        texts = generate_mixed(
            served.model,
            served.tokenizer,
            tasks,
            [each.source for each in batch],
            decoding,
            self.max_batch,
            served.max_source_length,
        )
        return [served.answer(task, text) for task, text in zip(tasks, texts, strict=True)]


class BadRequest(Exception):
    """A request that cannot be answered: the HTTP status and what is wrong."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


def question_of(served: Served, body: bytes) -> tuple[str, str]:
    """Return the task of a request, and what the model is to read. Raises BadRequest."""
    try:
        row = json.loads(body)
    except ValueError as error:
        raise BadRequest(400, f"the request is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise BadRequest(400, f"the request must be a JSON object, got {type(row).__name__}")
    task = row.get("task")
    if not isinstance(task, str) or task not in served.specs:
        raise BadRequest(404, f"unknown task {task!r}; there are {', '.join(served.specs)}")
    spec = served.specs[task]
    try:
        source = spec.source_text(row, "the request")
    except DataError as error:
        raise BadRequest(422, str(error)) from None
    empty = [name for names in spec.columns.values() for name in names if name in row and not str(row[name]).strip()]
    if empty:
        raise BadRequest(422, f"the request: column {empty[0]!r} is empty")
    length = len(served.counter(source).input_ids)
    if length > served.max_source_length:
        raise BadRequest(413, f"the row has {length} tokens, and at most {served.max_source_length} are read")
    return task, source


async def body_of(request: Request) -> bytes:
    """Return the body of a request. Raises BadRequest for a large one, without reading all of it."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MOST_BYTES:
            raise BadRequest(413, f"the request has more than {MOST_BYTES} bytes")
    return body


def application(served: Served, **limits: Any) -> Starlette:
    """The server. ``limits`` are those of :class:`Batcher`."""
    batcher = Batcher(served, **limits)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        with batcher:
            yield

    async def predict(request: Request) -> JSONResponse:
        try:
            answer = batcher.ask(*question_of(served, await body_of(request)))
        except BadRequest as error:
            return JSONResponse({"error": str(error)}, error.status)
        except queue.Full:
            return JSONResponse({"error": "too many requests wait"}, 503, {"Retry-After": "1"})
        return JSONResponse(await asyncio.wrap_future(answer))

    async def tasks(request: Request) -> JSONResponse:
        return JSONResponse({name: [c[0] for c in spec.columns.values()] for name, spec in served.specs.items()})

    async def stats(request: Request) -> JSONResponse:
        return JSONResponse({"batches": {str(size): batcher.sizes[size] for size in sorted(batcher.sizes)}})

    async def failed(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"error": f"{type(error).__name__}: {error}"}, 500)

    routes = [Route("/predict", predict, methods=["POST"]), Route("/tasks", tasks), Route("/stats", stats)]
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers={Exception: failed})


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until Ctrl-C or SIGTERM; what was asked before that is still answered."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", help="folder of a trained run (default: the embedded T5, untrained)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default: 8000)")
    parser.add_argument("--max_batch", type=int, default=32, help="most rows in a batch (default: 32)")
    parser.add_argument("--max_wait", type=float, default=5, help="milliseconds that a row waits (default: 5)")
    options = parser.parse_args(arguments)
    app = application(load(options.run_dir), max_batch=options.max_batch, max_wait=options.max_wait / 1000)
    uvicorn.run(app, host=options.host, port=options.port, access_log=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
