"""The released tokenizer files: their key names, and the sizes that their shapes imply."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nextscale import storage
from nextscale.errors import UserError
from nextscale.tokenizers.tokenizer import MultiscaleVQ, TokenizerConfig

# Ours -> released. Everything else has the same name.
_RENAMES = (
    ("quantizer.codebook.", "quantize.embedding."),
    ("quantizer.phi.", "quantize.quant_resi.qresi_ls."),
    ("quantizer.usage", "quantize.ema_vocab_hit_SV"),
)


def read_official(
    source: str | Path | Mapping[str, Tensor], marker: str, nested_key: str
) -> dict[str, Tensor]:
    """The flat state dict inside a released or training file.

    Args:
        source: A .pth or .safetensors path, or a mapping.
        marker: A key that the flat dict must contain; whatever stands before it is a prefix.
        nested_key: Name under `trainer` in training checkpoints.

    Raises:
        UserError: If no such dict is inside.
    """
    if isinstance(source, str | Path):
        path = Path(source)
        load = storage.read_tensors if path.suffix == ".safetensors" else storage.read_pickle
        content: Any = load(path)
        label = str(path)
    else:
        content, label = source, "the state dict"
    if isinstance(content, Mapping) and isinstance(content.get("trainer"), Mapping):
        content = content["trainer"].get(nested_key, content["trainer"])
    if not isinstance(content, Mapping):
        raise UserError(f"{label} holds no state dict but {type(content).__name__}")
    for name in ("state_dict", "model"):
        if isinstance(content.get(name), Mapping):
            content = content[name]
    anchor = next((key for key in content if key == marker or key.endswith("." + marker)), None)
    if anchor is None:
        raise UserError(
            f'{label} is not a released VAR file of this kind: it has no tensor "{marker}" '
            f"(its first keys: {list(content)[:3]}). Were tokenizer and transformer swapped?"
        )
    prefix = anchor[: len(anchor) - len(marker)]
    return {
        key[len(prefix) :]: value
        for key, value in content.items()
        if key.startswith(prefix) and isinstance(value, Tensor)
    }


@contextmanager
def shapes_of(kind: str) -> Iterator[None]:
    """Around the reading of sizes from shapes: a tensor that is missing or of another rank."""
    try:
        yield
    except UserError:
        raise
    except (IndexError, KeyError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"the file is no complete VAR {kind}: a tensor is missing or of another shape ({error})"
        ) from error


def read_tokenizer(
    source: str | Path | Mapping[str, Tensor], scales: Sequence[int] | None
) -> tuple[TokenizerConfig, dict[str, Tensor]]:
    """Configuration and our state dict of a released tokenizer."""
    official = read_official(source, "quantize.embedding.weight", "vae_local")
    codebook = official["quantize.embedding.weight"]
    if scales is None:
        raise UserError(
            "the tokenizer file does not tell its scales; pass scales=(1, 2, 3, ...), or "
            "--scales 1 2 3 ..."
        )

    for key in ("encoder.conv_in", "encoder.down.0.block.0.conv1", "quant_conv"):
        if f"{key}.weight" not in official:
            raise UserError(f'the file is no complete VAR tokenizer: "{key}.weight" is missing')

    def count(pattern: str) -> int:
        return len({m[1] for key in official if (m := re.match(pattern, key))})

    levels = count(r"encoder\.down\.(\d+)\.")
    with shapes_of("tokenizer"):
        channels = official["encoder.conv_in.weight"].shape[0]
        config = TokenizerConfig(
            scales=tuple(scales),
            codebook_size=codebook.shape[0],
            codebook_dim=codebook.shape[1],
            channels=channels,
            channel_multipliers=tuple(
                official[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] // channels
                for i in range(levels)
            ),
            num_res_blocks=count(r"encoder\.down\.0\.block\.(\d+)\."),
            num_phi=count(r"quantize\.quant_resi\.qresi_ls\.(\d+)\."),
        )
    state = {k: v.float() for k, v in official.items()}
    for ours, theirs in _RENAMES:
        state = {k.replace(theirs, ours, 1): v for k, v in state.items()}
    usage = state.get("quantizer.usage")
    if usage is None or len(usage) != len(scales):  # statistics of another schedule say nothing
        state["quantizer.usage"] = torch.zeros(len(scales), config.codebook_size)
    return config, state


def to_official(tokenizer: MultiscaleVQ) -> dict[str, Tensor]:
    """The state dict of our tokenizer under the released names.

    Raises:
        UserError: If it has settings that the released format, which stores none, cannot tell.
    """
    released = TokenizerConfig()
    for name in ("norm_groups", "phi_ratio", "cosine"):
        value = getattr(tokenizer.config, name)
        if value != getattr(released, name):
            raise UserError(
                f"the released format has {name} {getattr(released, name)} and no place for "
                f"another; this tokenizer has {value}"
            )
    state = tokenizer.state_dict()
    for ours, theirs in _RENAMES:
        state = {k.replace(ours, theirs, 1): v for k, v in state.items()}
    return state
