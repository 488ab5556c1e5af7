"""A model on disk: tokenizer/, transformer/, conditioner/, generation_config.json, index, card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import torch

from nextscale import storage
from nextscale.errors import UserError
from nextscale.tokenizers import MultiscaleVQ
from nextscale.var.sampling import SamplingConfig
from nextscale.var.transformer import NextScaleTransformer

FORMAT_VERSION = 1


class Part(Protocol):
    """What writes itself to a folder."""

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write configuration and weights."""
        ...


def save_model(
    folder: str | Path,
    tokenizer: MultiscaleVQ,
    transformer: NextScaleTransformer,
    generation: SamplingConfig,
    controls: Mapping[str, Part] | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a model's folder in one step.

    Args:
        folder: A model folder there is replaced; any other non-empty folder is refused.
        tokenizer: Images <-> tokens.
        transformer: With its conditioner.
        generation: Default settings.
        controls: Control modules by name.
        dtype: Cast the weights to this (the quantizer stays float32); None: as they are.

    Raises:
        UserError: If the folder holds something else.
    """
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / storage.MODEL_INDEX).exists():
        raise UserError(
            f"{folder} holds files that are no model, and saving replaces the folder; choose an "
            "empty one"
        )
    parts = {"tokenizer": "MultiscaleVQ", "transformer": "NextScaleTransformer"}
    with storage.replace_folder(folder) as target:
        tokenizer.save_pretrained(target / "tokenizer", dtype=dtype)
        transformer.save_pretrained(target, dtype=dtype)
        for name, control in (controls or {}).items():
            control.save_pretrained(target / "controls" / name, dtype=dtype)
        for name, kind, values in (
            (storage.MODEL_INDEX, "NextScalePipeline", parts),
            ("generation_config.json", "SamplingConfig", asdict(generation)),
        ):
            content = {"format_version": FORMAT_VERSION, "class": kind, **values}
            storage.write_json(target / name, content)
        storage.write_bytes(target / "README.md", card(tokenizer, transformer).encode())


def read_generation(folder: Path) -> SamplingConfig | None:
    """The default settings of a model folder, None if it has none."""
    path = folder / "generation_config.json"
    if not path.exists():
        return None
    values = storage.read_config(path, FORMAT_VERSION, "SamplingConfig")
    return storage.build(SamplingConfig, values, path)


def card(tokenizer: MultiscaleVQ, transformer: NextScaleTransformer) -> str:
    """A model card in Markdown: what the model is and how to use it."""
    config = transformer.config
    call = '["a prompt"]' if transformer.conditioner.prompts else "class_labels=[0]"
    height, width = tokenizer.resolution
    return (
        "---\nlibrary_name: nextscale\ntags: [next-scale-prediction, image-generation]\n---\n"
        f"# A next-scale model, {width}x{height} pixels\n\n"
        f"- transformer: depth {config.depth}, width {config.resolved_width}, "
        f"{_millions(transformer)} parameters\n"
        f"- tokenizer: {tokenizer.config.codebook_size} codes of "
        f"{tokenizer.config.codebook_dim} channels, {_millions(tokenizer)} parameters, "
        f"scales {transformer.schedule}\n\n"
        "```python\nimport nextscale as ns\n\n"
        f'pipe = ns.NextScalePipeline.from_pretrained("PATH")\nimages = pipe({call}).images\n```\n'
    )


def _millions(module: torch.nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.1f} M"
