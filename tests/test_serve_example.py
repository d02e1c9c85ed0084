"""examples/serve.py: right answers in mixed batches, and requests that are refused."""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import hyperformer_fast
from hyperformer_fast.data.builtin import load_builtin

for needed in ("starlette", "uvicorn"):
    pytest.importorskip(needed, reason=f"needs {needed}, of the extra 'serve'")

ROOT = Path(hyperformer_fast.__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def examples():
    """The modules of the two examples, and the model that is served."""
    found = {}
    for name in ("serve", "serve_load"):
        spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
        found[name] = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found[name])
    yield found["serve"], found["serve_load"], found["serve"].load(most_tokens=40)
    for name in found:
        del sys.modules[name]


def test_a_load_of_mixed_tasks_is_answered_as_each_row_alone(examples):
    _, serve_load, served = examples
    rows = [{"task": task, **row} for task in served.specs for row in load_builtin(task, "test")[:4]]
    found = serve_load.load_test(served, rows, clients=8, max_batch=8, max_wait=0.2)
    assert (found["requests"], found["wrong"]) == (len(rows), 0)
    assert sum(int(size) * count for size, count in found["batches"].items()) == len(rows)
    assert max(map(int, found["batches"])) > 1


def test_taking_a_request_changes_nothing_of_the_tokenizer_that_answers(examples):
    """Where a tokenizer truncates is its state, which a call in another thread must not set."""
    serve, _, served = examples
    served.tokenizer("a", truncation=True, max_length=3)
    before = served.tokenizer.backend_tokenizer.truncation
    serve.question_of(served, json.dumps({"task": "sentiment", **load_builtin("sentiment", "test")[0]}).encode())
    assert before is not None and served.tokenizer.backend_tokenizer.truncation == before


REFUSED = {
    b"{": (400, "is not JSON"),
    b"[1]": (400, "must be a JSON object, got list"),
    b'{"text": "a"}': (404, "unknown task None; there are "),
    b'{"task": "nothing", "text": "a"}': (404, "unknown task 'nothing'; there are "),
    b'{"task": "sentiment"}': (422, "the request: "),
    b'{"task": "sentiment", "sentence": 3}': (422, "must be text, got 3"),
    b'{"task": "sentiment", "sentence": " "}': (422, "column 'sentence' is empty"),
    json.dumps({"task": "sentiment", "sentence": "long " * 50}).encode(): (413, "at most 40 are read"),
    b"x" * (1 << 21): (413, "more than 1048576 bytes"),
    b"\xff": (400, "is not JSON"),
}


def test_bad_requests_are_refused_and_the_server_goes_on(examples, monkeypatch):
    serve, serve_load, served = examples
    good = {"task": "sentiment", **load_builtin("sentiment", "test")[0]}
    expected = 200, serve_load.alone(served, good)
    with serve_load.running(served) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        for body, (status, message) in REFUSED.items():
            found, answer = serve_load.post(connection, body)
            assert found == status and message in answer["error"], (body[:40], answer)
            connection.close()
        monkeypatch.setattr(serve, "generate_mixed", lambda *_: 1 / 0)
        assert serve_load.post(connection, json.dumps(good).encode()) == (
            500,
            {"error": "ZeroDivisionError: division by zero"},
        )
        monkeypatch.undo()
        connection.close()
        assert serve_load.post(connection, json.dumps(good).encode()) == expected
        connection.close()


def test_a_full_queue_is_said_and_what_waits_is_answered_at_the_end(examples, monkeypatch):
    serve, serve_load, served = examples
    good = {"task": "sentiment", **load_builtin("sentiment", "test")[0]}
    inside, go_on, plain = threading.Event(), threading.Event(), serve.generate_mixed

    def held(*arguments):
        inside.set()
        go_on.wait()
        return plain(*arguments)

    monkeypatch.setattr(serve, "generate_mixed", held)
    found = []
    with serve.Batcher(served, max_batch=1, max_queue=1) as batcher:
        asked = [batcher.ask(*serve.question_of(served, json.dumps(good).encode()))]
        inside.wait()
        asked.append(batcher.ask("sentiment", "sentence: one that waits"))
        with pytest.raises(serve.queue.Full):
            batcher.ask("sentiment", "sentence: one too many")
        go_on.set()
        found = [each.result() for each in asked]
    assert found[0] == serve_load.alone(served, good) and "prediction_text" in found[1]


def test_a_signal_ends_it(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, str(ROOT / "examples" / "serve.py"), "--port", "0"]
    server = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    said = []
    for line in server.stderr:
        said.append(line)
        if "running on" in line:
            server.send_signal(signal.SIGTERM)
    assert server.wait() in (0, -signal.SIGTERM), "".join(said)
    assert any("shutdown complete" in line for line in said), "".join(said)
