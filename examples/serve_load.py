"""A load test of examples/serve.py on the loopback: requests per second, sizes of batches, latencies, right answers.

    python examples/serve_load.py --requests 500 --clients 16
    python examples/serve_load.py --run_dir my-run --rows rows.jsonl

The server runs in this process. Each client sends one row after another, of a task that is drawn for each. Every answer
is compared with that of a call for this row alone.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import itertools
import json
import random
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from serve import Served, application, load

from hyperformer_fast.data.builtin import load_builtin

Row = dict[str, Any]


@contextlib.contextmanager
def running(served: Served, **limits: Any) -> Iterator[int]:
    """Serve in a thread of this process, and yield the port."""
    server = uvicorn.Server(uvicorn.Config(application(served, **limits), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, name="server")
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise RuntimeError("the server did not start")
            time.sleep(0.01)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def post(connection: http.client.HTTPConnection, body: bytes) -> tuple[int, Any]:
    """Send a request, and return (status, answer)."""
    connection.request("POST", "/predict", body)
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def alone(served: Served, row: Row) -> Any:
    """The answer to one row, without a server."""
    inputs = served.tokenizer(served.specs[row["task"]].source_text(row, "row"), return_tensors="pt")
    tensors = {name: inputs[name].to(served.model.device) for name in ("input_ids", "attention_mask")}
    out = served.model.generate(**tensors, task=row["task"], **served.options(row["task"]))
    return served.answer(row["task"], served.tokenizer.decode(out[0], skip_special_tokens=True))


def load_test(served: Served, rows: Sequence[Row], clients: int, **limits: Any) -> dict[str, Any]:
    """Send all rows, some at a time, and return what was found."""
    answers: list[Any] = [None] * len(rows)
    seconds: list[float] = [0.0] * len(rows)
    places = itertools.count()

    def client(port: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        while (i := next(places)) < len(rows):
            began = time.perf_counter()
            answers[i] = post(connection, json.dumps(rows[i]).encode())
            seconds[i] = time.perf_counter() - began
        connection.close()

    with running(served, **limits) as port:
        threads = [threading.Thread(target=client, args=(port,)) for _ in range(clients)]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        took = time.perf_counter() - began
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("GET", "/stats")
        batches = json.loads(connection.getresponse().read())["batches"]
        connection.close()
    expected = {json.dumps(row): alone(served, row) for row in rows}
    wrong = sum(answer != (200, expected[json.dumps(row)]) for row, answer in zip(rows, answers, strict=True))
    cuts = statistics.quantiles([1000 * each for each in seconds], n=100, method="inclusive")
    return {
        "requests": len(rows),
        "wrong": wrong,
        "requests_per_second": len(rows) / took,
        "batches": batches,
        "rows_per_batch": len(rows) / max(1, sum(batches.values())),
        "milliseconds": {f"p{p}": cuts[p - 1] for p in (50, 90, 99)},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 1 if any answer was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", help="folder of a trained run (default: the embedded T5, untrained)")
    parser.add_argument("--rows", type=Path, help="JSON lines to send, with a column 'task'; needed with --run_dir")
    parser.add_argument("--requests", type=int, default=200, help="how many to send (default: 200)")
    parser.add_argument("--clients", type=int, default=16, help="how many send at once (default: 16)")
    parser.add_argument("--max_batch", type=int, default=32, help="most rows in a batch (default: 32)")
    parser.add_argument("--max_wait", type=float, default=5, help="milliseconds that a row waits (default: 5)")
    options = parser.parse_args(arguments)
    if options.run_dir and not options.rows:
        parser.error("--run_dir needs --rows")
    served = load(options.run_dir)
    if options.rows:
        pool = [json.loads(line) for line in options.rows.read_text(encoding="utf-8").splitlines() if line.strip()]
    else:
        pool = [{"task": task, **row} for task in served.specs for row in load_builtin(task, "test")[:50]]
    rows = random.Random(0).choices(pool, k=options.requests)
    found = load_test(served, rows, options.clients, max_batch=options.max_batch, max_wait=options.max_wait / 1000)
    print(json.dumps(found, indent=2))
    return int(found["wrong"] > 0)


if __name__ == "__main__":
    raise SystemExit(main())
