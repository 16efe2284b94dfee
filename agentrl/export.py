"""Turn a run into a checkpoint that transformers and vLLM load without agentrl."""

from __future__ import annotations

from pathlib import Path

from agentrl.checkpoint import Checkpoints, read_adapter, saving_weights
from agentrl.configfile import load_config
from agentrl.errors import BadConfig, BadData
from agentrl.files import write_folder
from agentrl.log import RunFolder
from agentrl.models import load_model, load_tokenizer

__all__ = ["export"]


def export(run: str | Path, merge_dir: str | Path) -> Path:
    """Merge the newest adapter of the run in folder ``run`` into its base and write it to ``merge_dir``.

    Raises BadData where the run has no checkpoint yet, BadConfig where ``merge_dir`` holds something.
    """
    import peft

    folder, target = RunFolder(Path(run)), Path(merge_dir)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise BadConfig(f"{target} holds something; name an empty or a new folder")
    config = load_config(folder.config)
    newest = Checkpoints(folder.checkpoints, keep=config.checkpoint.keep).latest()
    if newest is None:
        raise BadData(
            f"{folder.root} has no checkpoint yet; let the run reach step {config.checkpoint.every}"
        )
    made = (path for path in (folder.warm_start, folder.base) if path.exists())
    base = next(made, config.model.path)
    assert base is not None
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
    return target
