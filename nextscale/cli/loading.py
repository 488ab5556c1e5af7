"""Finding what a model flag names, and reading its small files before the large ones."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nextscale import storage
from nextscale.cli.model_flags import ModelFlags
from nextscale.cli.ranks import pick_device
from nextscale.errors import UserError

if TYPE_CHECKING:
    from nextscale.pipeline import NextScalePipeline
    from nextscale.tokenizers import MultiscaleVQ


@dataclass(frozen=True)
class ModelFiles:
    """A model's folder and what its JSON files say; reading it does not import torch."""

    folder: Path
    generation: dict[str, Any]
    conditioner: dict[str, Any]

    @property
    def takes_prompts(self) -> bool:
        """Prompts, or else class labels."""
        return self.conditioner["kind"] != "class"

    @property
    def num_classes(self) -> int | None:
        """Classes of a class-conditional model."""
        return self.conditioner.get("num_classes")

    def weights(self) -> str:
        """SHA-256 over the model's weight files."""
        digest = hashlib.sha256()
        for path in sorted(self.folder.glob("*/model*.safetensors")):
            digest.update(f"{path.parent.name}/{path.name}:{storage.file_sha256(path)}\n".encode())
        return digest.hexdigest()


def read_model(
    name: str, *, revision: str | None = None, local_files_only: bool = False
) -> ModelFiles:
    """Find a model and read its JSON files.

    Raises:
        UserError: If there is no such model or a file is damaged.
    """
    folder = storage.check_model(
        storage.resolve_model(name, revision=revision, local_files_only=local_files_only)
    )
    generation: dict[str, Any] = {}
    if (folder / "generation_config.json").exists():
        generation = storage.read_config(folder / "generation_config.json", 1, "SamplingConfig")
    path = folder / "conditioner" / "config.json"
    conditioner = storage.read_config(path, 1, "Conditioner")
    if "kind" not in conditioner:
        raise UserError(f"{path} is damaged: it has no kind of conditioner. Copy the model again.")
    return ModelFiles(folder, generation, conditioner)


def check_conditions(model: ModelFiles, conditions: Sequence[str]) -> None:
    """Refuse a prompt or label that the model cannot read, before its weights are loaded.

    Raises:
        UserError: As the model's conditioner says it.
    """
    values = dict(model.conditioner)
    kind = values.pop("kind")
    unique = list(dict.fromkeys(conditions))
    if values.get("grammar") == "scenes":  # without torch: a typo is answered at once
        from nextscale.data.captions import parse

        for prompt in unique:
            parse(prompt)
    if kind in ("class", "words"):
        from nextscale.var.conditioning import CONDITIONERS

        # Not on the meta device: that imports torch._dynamo and sympy, two seconds.
        path = model.folder / "conditioner" / "config.json"
        storage.build(CONDITIONERS[kind], values, path).tokenize(unique)


def load_pipeline(flags: ModelFlags) -> NextScalePipeline:
    """The pipeline that the flags name.

    Raises:
        UserError: If there is none at that place.
    """
    from nextscale.pipeline import NextScalePipeline

    return NextScalePipeline.from_pretrained(
        flags.model,
        device=pick_device(flags.device),
        dtype=flags.dtype,
        revision=flags.revision,
        local_files_only=flags.local_files_only,
    )


def load_tokenizer(name: str, device: str, dtype: str) -> MultiscaleVQ:
    """A tokenizer: bundled model, folder of a tokenizer, model or training run, hub id, or .pth.

    Raises:
        UserError: If there is none at that place.
    """
    import torch

    from nextscale.pipeline import resolve_dtype
    from nextscale.tokenizers import MultiscaleVQ

    if Path(name).suffix in (".pth", ".pt", ".safetensors"):
        tokenizer = MultiscaleVQ.from_official(name)
    else:
        folder = storage.resolve_model(name)
        inner = folder / "tokenizer"
        tokenizer = MultiscaleVQ.from_pretrained(inner if inner.is_dir() else folder)
    return tokenizer.to(device).to_dtype(resolve_dtype(dtype, torch.device(device)))
