"""Where a model comes from and goes to: a folder, or a repository on the Hugging Face Hub."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .atomic import recover_directory
from .checkpoint import CONFIG_NAME, OLD_CONFIG_NAME, OLD_WEIGHTS_NAME, WEIGHTS_NAME, CheckpointError
from .tiny import EMBEDDED, fits_embedded, load_tiny

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

#: Keyword arguments of ``from_pretrained`` that say how files are fetched. All but the last two are also good for the
#: T5, which lies in another repository.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "token", "revision", "subfolder")


#: The files that a model consists of, for uploads.
MODEL_FILES = (WEIGHTS_NAME, CONFIG_NAME, "README.md")

_PUSH_ARGUMENTS = ("commit_message", "commit_description", "private", "token", "revision", "create_pr")


def push_arguments(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return those keyword arguments that :func:`push_folder` takes; transformers' methods have more."""
    return {name: value for name, value in options.items() if name in _PUSH_ARGUMENTS}


def find(path_or_id: str | os.PathLike[str], *names: str, **hub: Any) -> Path:
    """Return the path of the first of ``names`` that there is: in a folder or, downloaded, in a repository on the Hub.

    Args:
        path_or_id: the folder, or the repository's id.
        names: names of files.
        hub: arguments of transformers' ``cached_file``.

    Raises:
        FileNotFoundError: there is no such folder or repository, or it has none of these files.
    """
    from transformers.utils.hub import cached_file

    hub = {name: value for name, value in hub.items() if value is not None}
    if os.path.isdir(path_or_id):
        folder = Path(path_or_id, hub.get("subfolder", ""))
        found = next((folder / name for name in names if (folder / name).is_file()), None)
    elif _is_path(os.fspath(path_or_id)):
        raise FileNotFoundError(f"no HyperFormer checkpoint in {path_or_id}: there is no such folder")
    else:
        found = None
        for name in names:
            # Only what the repository lacks is None; no network, no such repository and the like are OSErrors.
            path = cached_file(path_or_id, name, _raise_exceptions_for_missing_entries=False, **hub)
            if path is not None:
                found = Path(path)
                break
    if found is None:
        raise FileNotFoundError(f"no HyperFormer checkpoint in {path_or_id}: {names[0]} is not there")
    return found


def find_checkpoint(path_or_id: str | os.PathLike[str], **hub: Any) -> Path:
    """Return the folder with a model's files, which are downloaded where ``path_or_id`` is an id on the Hub."""
    if recover_directory(path_or_id).is_dir() or _is_path(os.fspath(path_or_id)):
        return Path(path_or_id, hub.get("subfolder") or "")
    weights = find(path_or_id, WEIGHTS_NAME, OLD_WEIGHTS_NAME, **hub)
    # The copy of the description lies beside it, so that a difference is noticed. A repository may lack it.
    _optional(path_or_id, CONFIG_NAME if weights.name == WEIGHTS_NAME else OLD_CONFIG_NAME, **hub)
    return weights.parent


def _optional(path_or_id: str | os.PathLike[str], name: str, **hub: Any) -> Path | None:
    try:
        return find(path_or_id, name, **hub)
    except OSError:  # also where there is no network, and only some of the files are in the cache
        return None


def load_t5(base: Any, where: str | os.PathLike[str], **options: Any) -> nn.Module:
    """Load the T5 that a checkpoint was trained on.

    Args:
        base: the field ``base_model`` of the checkpoint's description.
        where: the checkpoint, for messages.
        options: keyword arguments of the T5's ``from_pretrained``.

    Raises:
        CheckpointError: it cannot be loaded from what the checkpoint knows of it; the message says why.
    """
    base = base if isinstance(base, dict) else {}
    name, kind = base.get("name_or_path"), _t5_class(base.get("class"))
    cure = f"pass it: HyperFormerModel.from_pretrained({os.fspath(where)!r}, t5=...)"
    if kind is None:
        raise CheckpointError(f"{where} was trained on a {base.get('class')!r}, which is no T5 of transformers: {cure}")
    if not isinstance(name, str) or not name:
        raise CheckpointError(f"{where} was trained on a T5 that was not loaded from anywhere: {cure}")
    if name != EMBEDDED and _is_path(name) and not os.path.isdir(name):
        raise CheckpointError(f"{where} was trained on the T5 in {name}, and there is no such folder here: {cure}")
    if "dtype" not in options and "torch_dtype" not in options:
        options["dtype"] = getattr(torch, str(base.get("dtype")), torch.float32)
    try:
        # The embedded T5 of an earlier version had other sizes; what reads the checkpoint then says that it is another.
        if isinstance(base.get("config"), dict) and not (name == EMBEDDED and not fits_embedded(base["config"])):
            # A copy: transformers 4.57 adds fields to the dict that it is given, and the digest covers them.
            fields = copy.deepcopy(base["config"])
            if fields.get("scale_decoder_outputs") is False:
                # transformers 5 writes this of a T5 v1.1, and that it is tied, for which 4.57 would take it.
                fields["tie_word_embeddings"] = False
            options.setdefault("config", kind.config_class.from_dict(fields))
        if name == EMBEDDED:
            return load_tiny(kind, **options)[0]
        if not os.path.isdir(name):
            options.setdefault("revision", base.get("revision") or "main")
        t5 = kind.from_pretrained(name, **options)
    except Exception as error:  # OSError, ValueError, RuntimeError, SafetensorError or an error of the network
        said = str(error).strip() or type(error).__name__
        raise CheckpointError(
            f"{where} was trained on the T5 {name!r}, which cannot be loaded: {said}; {cure}"
        ) from error
    if base.get("revision") and getattr(t5.config, "_commit_hash", None) is None:
        # transformers sets it only where it loads the configuration itself. A copy of this model needs it again.
        t5.config._commit_hash = base.get("revision")
    loaded: nn.Module = t5
    return loaded


def _t5_class(name: Any) -> Any:
    """The class of transformers with this name, if it is a T5's."""
    from transformers.models.mt5 import modeling_mt5
    from transformers.models.t5 import modeling_t5
    from transformers.models.umt5 import modeling_umt5

    for module, prefix in ((modeling_t5, "T5"), (modeling_mt5, "MT5"), (modeling_umt5, "UMT5")):
        if isinstance(name, str) and name.startswith(prefix) and name in module.__all__:
            return getattr(module, name)
    return None


def _is_path(name: str) -> bool:
    """Whether a name can only be a path: an id on the Hub is a name, or an owner and a name."""
    return os.path.isabs(name) or name[:1] in (".", "~") or name.count("/") > 1 or os.path.isdir(name)


def push_folder(
    folder: str | os.PathLike[str],
    files: Sequence[str],
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Upload ``files`` of ``folder`` to a repository on the Hub, which is created if necessary.

    Arguments are those of transformers' ``push_to_hub``.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=Path(folder),
        allow_patterns=list(files),
        commit_message=commit_message or "Upload HyperFormerModel",
        commit_description=commit_description,
        revision=revision,
        create_pr=create_pr,
    )


def remote_card(repo_id: str, token: bool | str | None, revision: str | None) -> str | None:
    """The README.md of a repository on the Hub; None where there is no such repository or file."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        path = hf_hub_download(repo_id, "README.md", token=token, revision=revision)
    except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
        return None
    return Path(path).read_text(encoding="utf-8")


def split(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split keyword arguments of ``from_pretrained`` in those that fetch our files, and those that load the T5."""
    ours = {name: value for name, value in options.items() if name in HUB_ARGUMENTS}
    t5 = {name: value for name, value in options.items() if name not in ("revision", "subfolder")}
    return ours, t5
