"""A stand-in of the Hugging Face Hub in a folder: uploads are copies, and downloads come from a server of this machine.

Run as a script, in a process of its own, because huggingface_hub reads ``HF_ENDPOINT`` when it is imported: makes
models and pushes them, loads them by their ids alone, and prints what it found as one line of JSON.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import shutil
import sys
import threading
import types
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Server(http.server.ThreadingHTTPServer):
    """Serves ROOT/OWNER/NAME/FILE as the Hub does."""

    def __init__(self, root: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.root = root
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        parts = self.path.strip("/").split("/")  # owner, name, "resolve", revision, file
        path = self.server.root.joinpath(*parts[:2], *parts[4:])
        if len(parts) < 5 or parts[2] != "resolve" or not path.is_file():
            known = self.server.root.joinpath(*parts[:2]).is_dir()
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = path.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


def stand_in(root: Path) -> None:
    """Let uploads be copies into ``root``."""
    import huggingface_hub
    import transformers.trainer

    def create_repo(self: object, repo_id: str, **kwargs: object) -> types.SimpleNamespace:
        repo_id = repo_id if "/" in repo_id else f"me/{repo_id}"
        (root / repo_id).mkdir(parents=True, exist_ok=True)
        return types.SimpleNamespace(repo_id=repo_id)

    def upload_folder(self: object, *, repo_id: str, folder_path: str, **kwargs: object) -> str:
        allowed = kwargs.get("allow_patterns")
        for path in Path(folder_path).iterdir():
            if path.is_file() and (allowed is None or path.name in allowed):
                shutil.copy(path, root / repo_id / path.name)
        if kwargs.get("run_as_future"):
            return types.SimpleNamespace(done=lambda: True)
        return f"a commit to {repo_id}"

    huggingface_hub.HfApi.create_repo, huggingface_hub.HfApi.upload_folder = create_repo, upload_folder
    for name, function in (("create_repo", create_repo), ("upload_folder", upload_folder)):
        if hasattr(transformers.trainer, name):  # transformers 4 has these as functions
            setattr(transformers.trainer, name, lambda *args, _f=function, **kwargs: _f(None, *args, **kwargs))


def main(folder: Path) -> None:
    root = folder / "hub"
    root.mkdir()
    server = Server(root)
    os.environ |= {"HF_ENDPOINT": server.url, "HF_HOME": str(folder / "cache"), "HF_HUB_DISABLE_XET": "1"}
    os.environ.pop("HF_HUB_OFFLINE", None)

    import torch
    from test_stock_trainer import small_trainer
    from transformers import T5ForConditionalGeneration

    from hyperformer_fast import HyperFormerConfig, HyperFormerModel, get_hyperformer_model
    from support.t5s import TASKS, tiny_config, tiny_t5

    stand_in(root)
    tiny_t5(dtype=torch.float32).save_pretrained(root / "google" / "tiny")
    t5 = T5ForConditionalGeneration.from_pretrained("google/tiny")
    model = get_hyperformer_model(t5, tiny_config())
    model.card_metrics = {TASKS[0]: {"accuracy": 87.5}}
    found = {"transformers tells revisions": getattr(t5.config, "_commit_hash", None) is not None}
    found["commit"] = model.push_to_hub("me/pushed", tags=["mine"])
    again = HyperFormerModel.from_pretrained("me/pushed")
    theirs = again.state_dict()
    found["equal"] = all(torch.equal(value, theirs[name]) for name, value in model.state_dict().items())
    found["config"] = HyperFormerConfig.from_pretrained("me/pushed") == model.hyperformer_config
    found["files"] = sorted(path.name for path in (root / "me/pushed").iterdir())
    found["card"] = (root / "me/pushed/README.md").read_text()
    found["t5's revision"] = json.loads((root / "me/pushed/config.json").read_text())["base_model"]["revision"]
    found["revision again"] = getattr(again.config, "_commit_hash", None)
    for name in ("me/absent", "google/tiny"):
        try:
            HyperFormerModel.from_pretrained(name)
        except (OSError, ValueError) as error:
            found[name] = f"{type(error).__name__}: {error}"

    (root / "me/pushed/README.md").write_text("written by hand")
    model.push_to_hub("me/pushed")
    found["card by hand"] = (root / "me/pushed/README.md").read_text()

    model.save_pretrained(folder / "saved", push_to_hub=True)
    found["saved and pushed"] = sorted(path.name for path in (root / "me/saved").iterdir())
    trainer = small_trainer(
        folder / "run", model, max_steps=2, push_to_hub=True, hub_model_id="me/trained", hub_token="none"
    )
    trainer.train()
    trainer.push_to_hub()
    trained = HyperFormerModel.from_pretrained("me/trained", token=False)
    theirs = trained.state_dict()
    found["trained"] = [name for name, value in model.state_dict().items() if not torch.equal(value, theirs[name])]
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
