"""What is refused before a run touches its output_dir."""

from __future__ import annotations

from pathlib import Path

from nextscale.align.erasure.config import EraseConfig
from nextscale.errors import UserError
from nextscale.training import record

_KEPT_IN_RESUME = (
    *("model", "concepts", "method", "sequential", "pairs", "replacements", "num_pairs", "seed"),
    *("num_pictures", "filter_pairs", "prefix", "lora_rank", "lora_alpha", "targets"),
)


def check_apart(config: EraseConfig) -> None:
    """The output touches neither the base nor an earlier result."""
    out, base = Path(config.output_dir).resolve(), Path(config.model).resolve()
    if base.is_dir() and (out == base or out in base.parents or base in out.parents):
        raise UserError(
            f"output_dir {config.output_dir} and the model {config.model} lie in each other; the "
            "model is never written to: choose another output_dir"
        )
    if (out / "adapter").exists() and config.resume_from_checkpoint is None:
        raise UserError(
            f"output_dir {config.output_dir} already holds an adapter; choose another folder"
        )


def check_resumed(config: EraseConfig) -> None:
    """A resumed run erases what it began to erase: the adapter says only what it was last told."""
    if config.resume_from_checkpoint is None:
        return
    began, now = record.read_settings(config.output_dir), record.plain_settings(config)
    kept = (*_KEPT_IN_RESUME, "max_train_steps") if config.sequential else _KEPT_IN_RESUME
    if changed := [name for name in kept if name in began and began[name] != now[name]]:
        told = ", ".join(f"{name} {began[name]}, not {now[name]}" for name in changed)
        raise UserError(
            f"the run in {config.output_dir} began with {told}: resume it with its own settings, "
            "or choose another output_dir"
        )
