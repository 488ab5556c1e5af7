"""The released transformer files: their key names, and the sizes that their shapes imply."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from nextscale.errors import UserError
from nextscale.tokenizers.official import read_official, shapes_of
from nextscale.tokenizers.schedule import OFFICIAL_SCALES
from nextscale.var.conditioning import ClassConditioner
from nextscale.var.transformer import NextScaleTransformer, TransformerConfig

# Ours -> released, applied to whole key names in this order.
_RENAMES = (
    (r"^start$", "pos_start"),
    (r"^position$", "pos_1LC"),
    (r"^scale_embedding\.", "lvl_embed."),
    (r"^input\.", "word_embed."),
    (r"^conditioner\.embedding\.", "class_emb."),
    (r"^modulation\.", "shared_ada_lin.1."),
    (r"^head_modulation\.", "head_nm.ada_lin.1."),
    (r"\.modulation_offset$", ".ada_gss"),
    (r"\.modulation\.", ".ada_lin.1."),
    (r"\.attention\.qkv\.weight$", ".attn.mat_qkv.weight"),
    (r"\.attention\.qkv\.", ".attn."),
    (r"\.attention\.log_scale$", ".attn.scale_mul_1H11"),
    (r"\.attention\.proj\.", ".attn.proj."),
    (r"\.feed_forward\.", ".ffn."),
)
_DERIVED = re.compile(r"^(lvl_1L|attn_bias_for_masking|blocks\.\d+\.attn\.zero_k_bias)$")


def official_name(name: str) -> str:
    """The released name of one of our tensors."""
    for ours, theirs in _RENAMES:
        name, found = re.subn(ours, theirs, name)
        if found:
            break
    return name


def read_transformer(
    source: str | Path | Mapping[str, Tensor],
    scales: Sequence[int] | None,
    num_heads: int | None,
) -> tuple[TransformerConfig, ClassConditioner, dict[str, Tensor]]:
    """Configuration, conditioner and our state dict of a released transformer."""
    official = read_official(source, "pos_1LC", "var_wo_ddp")
    first = "blocks.0.ffn.fc1.weight"
    for key in ("pos_start", "word_embed.weight", "class_emb.weight", "head.weight", first):
        if key not in official:
            raise UserError(f'the file is no complete VAR transformer: "{key}" is missing')
    with shapes_of("transformer"):
        tokens, width = official["pos_1LC"].shape[1:]
    if scales is None and tokens not in OFFICIAL_SCALES:
        raise UserError(
            f"the transformer has {tokens} positions, which is none of the released schedules "
            f"({', '.join(map(str, OFFICIAL_SCALES))}); pass scales=(1, 2, ...), or "
            "--scales 1 2 ..."
        )
    scales = tuple(scales or OFFICIAL_SCALES[tokens])
    if sum(s * s for s in scales) != tokens:
        raise UserError(
            f"the scales {' '.join(map(str, scales))} give {sum(s * s for s in scales)} tokens, "
            f"the transformer has {tokens} positions"
        )
    depth = 1 + max(int(m[1]) for k in official if (m := re.match(r"blocks\.(\d+)\.", k)))
    per_head = official.get("blocks.0.attn.scale_mul_1H11")
    with shapes_of("transformer"):
        heads = per_head.shape[1] if per_head is not None else num_heads or depth
        config = TransformerConfig(
            scales=scales,
            codebook_size=official["head.weight"].shape[0],
            codebook_dim=official["word_embed.weight"].shape[1],
            depth=depth,
            width=width,
            num_heads=heads,
            mlp_ratio=official[first].shape[0] / width,
            shared_modulation="shared_ada_lin.1.weight" in official,
            normalize_attention=per_head is not None,
        )
        classes = len(official["class_emb.weight"]) - 1
        if classes < 1:
            raise UserError("the file has no class besides the null class")
        conditioner = ClassConditioner(width=width, num_classes=classes)
    with torch.device("meta"):
        names = NextScaleTransformer(
            config, ClassConditioner(width=width, num_classes=conditioner.num_classes)
        ).state_dict()
    ours = {official_name(name): name for name in names}
    state = {ours.get(k, k): v.float() for k, v in official.items() if not _DERIVED.match(k)}
    return config, conditioner, state


def to_official(model: NextScaleTransformer) -> dict[str, Tensor]:
    """The state dict of a class-conditional model under the released names, buffers included.

    Raises:
        UserError: If the model has parts that the released format has no place for.
    """
    if not isinstance(model.conditioner, ClassConditioner) or model.config.context_dim is not None:
        raise UserError("only class-conditional models fit the released format")
    if model.config.mask_policy != "causal":
        raise UserError(f"the released format has no mask policy {model.config.mask_policy}")
    state = {official_name(k): v for k, v in model.state_dict().items()}
    state["lvl_1L"] = model.schedule.scale_index()[None]
    bias = torch.zeros(1, 1, model.schedule.num_tokens, model.schedule.num_tokens)
    state["attn_bias_for_masking"] = bias.masked_fill(~model.attention_mask(), -torch.inf)
    for i in range(model.config.depth):
        state[f"blocks.{i}.attn.zero_k_bias"] = torch.zeros(model.config.resolved_width)
    return state
