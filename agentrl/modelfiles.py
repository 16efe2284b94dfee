"""What lies in a model's folder, read without loading a weight: a wrong one is told at once.

A model is a folder or an id on the Hugging Face hub. Of an id only what the cache holds can be read here;
what has to be downloaded first is found out by the download. Checked: the folder, the JSON files, that the
weights are there and whole (the header of a safetensors file says how long it is); not what they say.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentrl.errors import UnsupportedModel, did_you_mean

__all__ = [
    "ModelFiles",
    "check_tokenizer_files",
    "find_model_config",
    "find_model_files",
    "is_hub_id",
    "is_offline",
]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_TOKENIZERS = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")  # one of these, at least
_WANTED = "give a folder with config.json and model.safetensors, or a hub id like 'Qwen/Qwen3-0.6B'"


_HUB_DEADLINE_S = 10.0  # until a hub that says nothing counts as offline


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model that is on this machine."""

    folder: Path
    config: Mapping[str, Any]  # config.json; of a model of several kinds of input, its part for text
    parameters: int  # weights in its files
    stored_bytes: int  # that they take there


def find_model_config(path: str | Path) -> Mapping[str, Any] | None:
    """config.json of the model at ``path``, whose weights need not be there; of a model of several kinds of
    input, its part for text. None for a hub id that is not in the cache.

    Raises UnsupportedModel for a folder that is missing or no model.
    """
    folder = _folder_of(path)
    if folder is None:
        _check_hub_answers(path)
        return None
    return _config_in(folder)


def find_model_files(path: str | Path) -> ModelFiles | None:
    """The files of the model at ``path``; None for a hub id whose weights are not in the cache.

    Raises UnsupportedModel for a folder that is missing, torn or no model, naming the file.
    """
    folder = _folder_of(path)
    if folder is None:
        _check_hub_answers(path)
        return None
    config = _config_in(folder)
    weights = list(_weight_files(folder))
    if not weights and not is_hub_id(path):
        raise UnsupportedModel(f"the model folder {folder} holds no weights (*.safetensors): {_WANTED}")
    if not weights:
        _check_hub_answers(path)
        return None
    sizes = [_measured(file) for file in weights]
    return ModelFiles(
        folder=folder,
        config=config,
        parameters=sum(size[0] for size in sizes),
        stored_bytes=sum(size[1] for size in sizes),
    )


def _check_hub_answers(path: str | Path) -> None:
    """Raises UnsupportedModel for a model that would have to be downloaded, and can't be."""
    if is_offline(path):
        raise UnsupportedModel(
            f"the model {str(path)!r} is no folder (seen from {Path.cwd()}) and not in the cache, and the "
            "hub does not answer or HF_HUB_OFFLINE is set: check the network, or give a folder with "
            "config.json and model.safetensors"
        )


def check_tokenizer_files(path: str | Path) -> None:
    """Raises UnsupportedModel where a folder lacks its tokenizer's files: transformers would make one up."""
    folder = Path(path)
    if not folder.is_dir():
        return
    if not any(found for pattern in _TOKENIZERS for found in folder.glob(pattern)):
        raise UnsupportedModel(
            f"no tokenizer could be loaded from {str(path)!r}: it has no tokenizer.json; copy the "
            "tokenizer's files into the folder, tokenizer_config.json among them"
        )
    settings, whole = folder / "tokenizer_config.json", folder / "tokenizer.json"
    if settings.is_file():
        _read_json(settings)
    # Its ends alone: it may have 30 MB, and what is torn is torn at the end.
    if whole.is_file() and not whole.read_bytes().strip().endswith(b"}"):
        raise UnsupportedModel(
            f"{whole} is torn: it ends inside a JSON object; copy or download the model again"
        )


def is_hub_id(path: str | Path) -> bool:
    """Whether ``path`` is no folder and reads like "owner/name"."""
    return not Path(path).is_dir() and _HUB_ID.fullmatch(str(path)) is not None


def is_offline(path: str | Path) -> bool:
    """Whether ``path`` is an id on a hub that does not answer: then only the cache counts."""
    if not is_hub_id(path):
        return False
    import httpx  # here, because a folder needs neither
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return True
    try:
        httpx.head(constants.ENDPOINT, timeout=_HUB_DEADLINE_S)
    except httpx.HTTPError:
        return True
    return False


def _folder_of(path: str | Path) -> Path | None:
    """The folder with config.json: the one given, or the cache's."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise UnsupportedModel(f"the model {str(path)!r} is a file: {_WANTED}")
    if not is_hub_id(path):
        beside = (child.name for child in folder.parent.glob("*/"))
        hint = did_you_mean(folder.name, beside)
        raise UnsupportedModel(f"no model folder {str(path)!r}{hint} (seen from {Path.cwd()}): {_WANTED}")
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(str(path), "config.json")
    return Path(cached).parent if isinstance(cached, str) else None


def _config_in(folder: Path) -> Mapping[str, Any]:
    if (folder / "config.json").is_file():
        config = _read_json(folder / "config.json")
        text: Mapping[str, Any] = config.get("text_config") or config
        return text
    if (folder / "adapter_config.json").is_file():
        raise UnsupportedModel(
            f"{folder} is a LoRA adapter, no model: name its base as the model, and this as eval's --adapter"
        )
    raise UnsupportedModel(f"the model folder {folder} has no config.json: {_WANTED}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # a UnicodeDecodeError and a JSONDecodeError are ValueErrors
        raise UnsupportedModel(f"{path} can't be read: {error}; copy or download the model again") from None
    if not isinstance(value, dict):
        raise UnsupportedModel(
            f"{path} holds a {type(value).__name__}, no JSON object; download the model again"
        )
    return value


def _weight_files(folder: Path) -> Iterator[Path]:
    """The files that hold the weights; those of an index must all be there."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        for name in sorted(set(_read_json(index).get("weight_map", {}).values())):
            if not (folder / name).is_file():
                raise UnsupportedModel(
                    f"{index} names {name}, which is not there; copy or download the model again"
                )
            yield folder / name
        return
    whole = sorted(folder.glob("model*.safetensors"))
    yield from whole or sorted(folder.glob("pytorch_model*.bin"))


def _measured(path: Path) -> tuple[int, int]:
    """Weights in a file and the bytes that they take. Raises UnsupportedModel for a torn safetensors file."""
    size = path.stat().st_size
    if path.suffix != ".safetensors":
        return size // 4, size  # at least: nothing is wider than float32
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= size - 8:
            raise UnsupportedModel(
                f"{path} is no safetensors file ({size} bytes, a header of {length}); download it again"
            )
        try:
            tensors = [
                entry for name, entry in json.loads(file.read(length)).items() if name != "__metadata__"
            ]
            stored = max((entry["data_offsets"][1] for entry in tensors), default=0)
            count = sum(math.prod(entry["shape"]) for entry in tensors)
        except (ValueError, AttributeError, KeyError, TypeError, IndexError):
            raise UnsupportedModel(
                f"the header of {path} can't be read: it is no safetensors file; download the model again"
            ) from None
    if size != 8 + length + stored:
        raise UnsupportedModel(
            f"{path} is torn: it has {size} bytes, and its header speaks of {8 + length + stored}; "
            "copy or download the model again"
        )
    return count, stored
