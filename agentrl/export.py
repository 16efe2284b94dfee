"""Turn a run into a checkpoint that transformers and vLLM load without agentrl."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from agentrl.checkpoint import Checkpoints, read_adapter, saving_weights
from agentrl.config import RunConfig
from agentrl.configfile import load_config
from agentrl.errors import BadConfig, BadData
from agentrl.files import write_folder
from agentrl.log import RunFolder
from agentrl.models import load_model, load_tokenizer

__all__ = ["export"]


def export(
    run: str | Path, merge_dir: str | Path, *, on_note: Callable[[str], object] = lambda line: None
) -> int:
    """Merge the newest adapter of the run in folder ``run`` into its base and write it to ``merge_dir``;
    returns the adapter's step.

    ``on_note`` is told where a newer one is damaged and left out. Raises BadData where the run has no
    checkpoint yet or lacks the base of it, BadConfig where ``merge_dir`` holds something.
    """
    import peft

    folder, target = RunFolder(Path(run)), Path(merge_dir)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise BadConfig(f"{target} holds something; name an empty or a new folder")
    config = load_config(folder.config)
    newest = Checkpoints(folder.checkpoints, keep=config.checkpoint.keep).latest(on_damage=on_note)
    if newest is None:
        raise BadData(
            f"{folder.root} has no checkpoint yet; let the run reach step {config.checkpoint.every}"
        )
    base = _base_of(folder, config, newest)
    model = load_model(base, dtype=config.model.dtype)
    adapter = read_adapter(newest)
    # The run's folder may have moved since the adapter noted where its base was.
    lora = peft.LoraConfig(**{**adapter.config, "base_model_name_or_path": None})
    policy = peft.get_peft_model(model, lora)
    peft.set_peft_model_state_dict(policy, dict(adapter.tensors))
    merged = policy.merge_and_unload()

    def write(path: Path) -> None:
        with saving_weights():
            merged.save_pretrained(path)
        load_tokenizer(base).save_pretrained(path)

    write_folder(target, write)
    return int(newest.name.removeprefix("step_"))


def _base_of(folder: RunFolder, config: RunConfig, newest: Path) -> str | Path:
    """What the adapter ``newest`` was trained on. Raises BadData where the run made that and it is gone."""
    if config.warm_start is None and config.model.path is not None:
        return config.model.path
    made = folder.base if config.warm_start is None else folder.warm_start
    if not made.is_dir():
        raise BadData(f"{made} is missing, the base that {newest} belongs to; put it back")
    return made
