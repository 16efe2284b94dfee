"""A model's folder, read without loading it; wrong ones are in test_input_errors.py."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub.constants
import pytest

from agentrl.errors import UnsupportedModel
from agentrl.modelfiles import find_model_config, find_model_files, is_offline


def test_the_header_tells_how_many_weights_there_are(
    tiny_checkpoint: Path, make_model: Callable[..., Any]
) -> None:
    found = find_model_files(tiny_checkpoint)
    assert found is not None
    parameters = list(make_model().parameters())
    assert found.parameters == sum(parameter.numel() for parameter in parameters)
    assert found.stored_bytes == sum(parameter.nbytes for parameter in parameters)
    assert found.config["num_hidden_layers"] == 2


def test_of_a_model_with_several_inputs_the_text_part_counts(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    text = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"text_config": text}))
    found = find_model_files(folder)
    assert found is not None
    assert found.config == text


def test_a_models_config_is_read_where_its_weights_are_not(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    whole = find_model_files(tiny_checkpoint)
    assert whole is not None
    assert find_model_config(folder) == find_model_config(tiny_checkpoint) == whole.config
    with pytest.raises(UnsupportedModel, match="no model folder"):
        find_model_config(tmp_path / "mdel")


def test_a_file_that_the_index_names_must_be_there(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UnsupportedModel, match="names model-2.safetensors, which is not there"):
        find_model_files(folder)


def test_a_header_that_is_no_header_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    for header in (b"no JSON here", b'{"a": {"shape": [1]}}', b"[1, 2]"):
        (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises(UnsupportedModel, match="the header of .* can't be read"):
            find_model_files(folder)


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


@pytest.mark.usefixtures("online")
def test_a_hub_that_answers_is_left_to_the_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(httpx, "head", lambda url, timeout: httpx.Response(404))
    assert find_model_files("nobody/nothing-here") is None


@pytest.mark.usefixtures("online")
def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []

    def head(url: str, timeout: float) -> httpx.Response:
        asked.append(url)
        raise httpx.ConnectError("Name or service not known")

    monkeypatch.setattr(httpx, "head", head)
    assert is_offline("nobody/nothing-here")
    assert len(asked) == 1
    assert not is_offline(tmp_path)  # a folder asks nobody
    assert len(asked) == 1
