"""Where a model's files are: a folder, the bundled model, or a download from the hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sere import demo_model
from sere.models.loading import LoadError

_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_WANTED = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
_UNUSED = ["consolidated*", "original/*"]
_CONFIGS = ("config.json", "params.json")  # the second is Mistral's own
_DESCRIBING = [*_CONFIGS, "*.index.json", "*quant*config.json"]
_SECONDS = 5.0


def located(model: str) -> str:
    """The folder of a model: "demo", a folder, or a hub name, downloaded once.

    Raises `LoadError` for what is no such thing, and within seconds where the hub is out of reach.
    """
    folder = Path(named := demo_model.resolve(model))
    check_name(named)
    if folder.is_dir():
        return str(folder)
    return _downloaded(model, _WANTED)


def described(model: str) -> str:
    """A folder with what `model` is configured as: its own, or, of one on the hub, its first files
    alone, so that it can be refused before its weights are downloaded.

    Raises `LoadError` as `located` does.
    """
    check_name(named := demo_model.resolve(model))
    return named if Path(named).is_dir() else _downloaded(model, _DESCRIBING)


def check_name(model: str) -> None:
    """Raise `LoadError` for a folder without a model, and for what is no folder and cannot be a
    name on the hub either."""
    path = Path(model)
    if path.is_dir() and not any((path / name).is_file() for name in _CONFIGS):
        held = "is empty" if not any(path.iterdir()) else f"has no {_CONFIGS[0]}"
        raise LoadError(
            f"{model} {held}: expected a model's folder, with {_CONFIGS[0]}, its weights in "
            "*.safetensors and its tokenizer"
        )
    if path.is_dir():
        return
    if path.is_file():
        raise LoadError(f"{model} is a file: name the folder that holds the model")
    if not _NAME.fullmatch(model) or model.startswith((".", "~")):
        raise LoadError(f"{model}: no such folder")


def _downloaded(name: str, wanted: list[str]) -> str:
    from huggingface_hub import HfApi, constants, errors, snapshot_download

    if (kept := _kept(name)) and constants.HF_HUB_OFFLINE:
        return kept
    if constants.HF_HUB_OFFLINE:
        raise LoadError(
            f"{name}: no such folder, and not downloaded before; HF_HUB_OFFLINE is set, so the hub "
            "is not asked"
        )
    try:
        _check_files(name, HfApi().model_info(name, timeout=_SECONDS).siblings or [])
        return str(snapshot_download(name, allow_patterns=wanted, ignore_patterns=_UNUSED))
    except LoadError:
        raise
    except (errors.RepositoryNotFoundError, errors.GatedRepoError) as error:
        raise LoadError(
            f"{name}: no such folder, and the hub has no model of this name that may be read "
            f"without asking ({type(error).__name__})"
        ) from error
    except Exception as error:  # each HTTP client has its own
        if kept:
            return kept
        raise LoadError(
            f"{name}: no such folder, and the hub is out of reach ({type(error).__name__}): give a "
            "local folder, or download it where there is a network and set HF_HUB_OFFLINE=1"
        ) from error


def _check_files(name: str, files: Sequence[Any]) -> None:
    names = [file.rfilename for file in files]
    if names and not any(each.endswith(".safetensors") for each in names):
        raise LoadError(
            f"{name} has no weights in .safetensors on the hub: name the repository that it was "
            "converted from, or a folder to which transformers' save_pretrained has written it"
        )


def _kept(name: str) -> str | None:
    """What an earlier download left, if its weights are among it."""
    from huggingface_hub import snapshot_download

    try:
        kept = str(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError):
        return None
    return kept if any(Path(kept).glob("*.safetensors")) else None
