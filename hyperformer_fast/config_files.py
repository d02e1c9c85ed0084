"""A HyperFormerConfig in files: our JSON, that of a saved model, and that of the authors."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from . import official_fields
from .checkpoint import CONFIG_NAME, MODEL_TYPE, OLD_CONFIG_NAME
from .json_files import read_object
from .recipes import BEFORE_RECIPES, OF_THE_CONFIG
from .variants import variant_of_flags

if TYPE_CHECKING:
    from typing_extensions import Self


class ConfigFiles:
    """The part of a HyperFormerConfig that reads and writes files."""

    if TYPE_CHECKING:  # HyperFormerConfig's

        def to_dict(self) -> dict[str, Any]: ...

        @classmethod
        def from_dict(cls, fields: Mapping[str, Any]) -> Self: ...

    @classmethod
    def from_official(cls, fields: Mapping[str, Any] | str | os.PathLike[str], **changes: Any) -> Self:
        """Build a configuration from the fields of the authors' configuration that describe the model.

        Absent fields have the authors' defaults, not ours; without either variant flag the variant is
        ``"hyperformer"``. A warning names the fields that are ignored, such as the training arguments in their JSON
        files.

        Args:
            fields: their configuration, or the path of their JSON file.
            changes: fields of HyperFormerConfig that override the translated ones.

        Raises:
            ValueError: the configuration is of another method (fine-tuning, plain adapters), or sets a field to a value
                that no variant here supports; the message names the field.
            TypeError: a value, or ``fields`` itself, has a wrong type.
            OSError: the file cannot be read.
        """
        path = None
        if isinstance(fields, (str, os.PathLike)):
            path = Path(fields)
            fields = read_object(path)
        try:
            ours = {field.name for field in dataclasses.fields(cast(Any, cls))} - {"variant", "recipe", *OF_THE_CONFIG}
            translated = official_fields.translate(fields, ours)
            if "variant" in changes:
                translated["unique_hyper_net"] = translated["efficient_unique_hyper_net"] = None
            flags = (bool(translated[flag]) for flag in ("unique_hyper_net", "efficient_unique_hyper_net"))
            if changes.get("variant", variant_of_flags(*flags)) != "hyperformer":
                translated["conditional_layer_norm"] = True  # their code does so, whatever the field says
            return cls.from_dict({**translated, "recipe": BEFORE_RECIPES, **changes})
        except (ValueError, TypeError) as error:
            if path is None:
                raise
            raise ValueError(f"{path}: {error}") from error

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write the configuration to ``config.json`` in a folder, which is created if necessary.

        Raises:
            ValueError: the folder has the configuration of another kind of model, which would be lost.
        """
        path = Path(save_directory, CONFIG_NAME)
        kind = read_object(path).get("model_type") if path.is_file() else MODEL_TYPE
        if kind != MODEL_TYPE:
            raise ValueError(f"{path} is the configuration of a {kind}: save to another folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"model_type": MODEL_TYPE, "config": self.to_dict()}
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **hub_arguments: Any) -> Self:
        """Read the configuration of a saved model or configuration.

        Args:
            pretrained_model_name_or_path: its folder, or its repository's id on the Hub.
            hub_arguments: ``revision``, ``token``, ``cache_dir`` and the like.

        Raises:
            ValueError: the file there holds no configuration of ours.
            OSError: there is no such file, or it cannot be read.
        """
        from .hub import find

        if os.path.isdir(pretrained_model_name_or_path):
            return cls.load(Path(pretrained_model_name_or_path, hub_arguments.get("subfolder") or ""))
        return cls.load(find(pretrained_model_name_or_path, CONFIG_NAME, OLD_CONFIG_NAME, **hub_arguments))

    def save(self, path: str | Path) -> None:
        """Write the configuration to a JSON file."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a configuration from JSON.

        Args:
            path: a file that :meth:`save` wrote, or the ``config.json`` of a saved model or its folder.

        Raises:
            ValueError: the file holds no configuration; the message names it and says what it seems to hold.
            OSError: the file cannot be read.
        """
        path = Path(path)
        if path.is_dir():
            # Files of version 0.1.0 may lie beside a T5's own config.json.
            path /= OLD_CONFIG_NAME if (path / OLD_CONFIG_NAME).is_file() else CONFIG_NAME
        content = read_object(path)
        # A saved model's file has the configuration in its field "config", beside a description of the T5.
        wrapped = isinstance(content.get("config"), dict) and "tasks" not in content
        try:
            return cls.from_dict(content["config"] if wrapped else content)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}{_what_else(content)}") from error


def _what_else(content: Mapping[str, Any]) -> str:
    """Say what a file that is no configuration seems to hold, as the end of an error message."""
    if "model_type" in content:
        return f" (the file is transformers' configuration of a {content['model_type']})"
    if "arguments" in content:
        return f" (the file describes a run; the configuration is in the {CONFIG_NAME} beside it)"
    if isinstance(content.get("hyperformer"), dict):
        return " (the file configures a run, as `hyperformer-fast train` takes it; its 'hyperformer' holds our fields)"
    if {"model_name_or_path", "train_adapters", "adapter_config_name"} & content.keys():
        return " (the file belongs to the authors' code: HyperFormerConfig.from_official reads it)"
    return ""
