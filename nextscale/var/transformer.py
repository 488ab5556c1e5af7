"""The next-scale transformer (VAR, arXiv 2404.02905), in the released architecture.

What differs from a plain transformer: the input of scale k + 1 is the down-sampled sum of what the
scales 0..k reconstruct (not token embeddings), attention is full inside a scale and causal across
scales, queries and keys are l2-normalised, and AdaLN modulates by the condition.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nextscale import storage
from nextscale.errors import UserError
from nextscale.tokenizers import ScaleSchedule
from nextscale.var.attention import Backend
from nextscale.var.block import Block, Prepared, TransformerConfig, modulated_norm
from nextscale.var.cache import KeyValueCache
from nextscale.var.conditioning import CONDITIONERS, Condition, Conditioner

if TYPE_CHECKING:
    from collections.abc import Mapping

FORMAT_VERSION = 1


@runtime_checkable
class BlockHooks(Protocol):
    """The two named points of a block where control modules act; absent when unused."""

    def before_block(self, block: int, where: slice, x: Tensor, prepared: Prepared) -> Tensor:
        """Replace the residual stream of the positions `where` before a block."""
        ...

    def after_block(self, block: int, where: slice, x: Tensor, prepared: Prepared) -> Tensor:
        """Replace it after the block."""
        ...

    def select(self, rows: Tensor | slice) -> None:
        """From here on these rows alone, in this order, as for condition and cache."""
        ...


class NextScaleTransformer(nn.Module):
    """Predicts the tokens of every scale from the coarser ones and a condition.

    One code path serves both modes: teacher-forced over all scales with a mask, and scale by scale
    with a cache.

    Args:
        config: Sizes.
        conditioner: Turns labels or prompts into the condition.
    """

    def __init__(self, config: TransformerConfig, conditioner: Conditioner) -> None:
        super().__init__()
        self.config = config = replace(config, context_dim=conditioner.context_dim)
        self.schedule = ScaleSchedule(config.scales)
        width, schedule = config.resolved_width, self.schedule
        self.conditioner = conditioner
        self.start = nn.Parameter(torch.zeros(1, schedule.lengths[0], width))
        self.position = nn.Parameter(torch.zeros(1, schedule.num_tokens, width))
        self.scale_embedding = nn.Embedding(schedule.num_scales, width)
        self.input = nn.Linear(config.codebook_dim, width)
        if config.shared_modulation:
            self.modulation = nn.Linear(width, 6 * width)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.depth))
        self.head_modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, config.codebook_size)
        self.backend: Backend = "sdpa"
        self.gradient_checkpointing = False  # compute activations again in the backward pass
        self.register_buffer("_scale_index", schedule.scale_index(), persistent=False)
        self.register_buffer("_mask", self.attention_mask(), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.start.device

    def first_visible(self, scale: int) -> int:
        """The coarsest scale that `scale` attends to."""
        first = {"causal": 0, "diagonal": scale, "markov": max(scale - 1, 0)}
        return first[self.config.mask_policy]

    def attention_mask(self) -> Bool[Tensor, "t t"]:
        """True where row i may attend to column j: first_visible(i) <= scale(j) <= scale(i)."""
        scale = self.schedule.scale_index()
        first = torch.tensor([self.first_visible(k) for k in range(self.schedule.num_scales)])
        return (scale[None] <= scale[:, None]) & (scale[None] >= first[scale][:, None])

    def condition(self, conditions: Sequence[Any] | Tensor) -> Condition:
        """Condition of class labels, prompts, or ids from `conditioner.tokenize`."""
        if not isinstance(conditions, Tensor):
            conditions = self.conditioner.tokenize(conditions)
        return self.conditioner(conditions.to(self.device))

    def null_condition(self, count: int) -> Condition:
        """The condition of guidance's unconditional rows."""
        return self.condition(self.conditioner.null(count))

    def prepare(self, condition: Condition) -> Prepared:
        """AdaLN projections of all blocks and cross-attention keys: once per picture."""
        pooled = condition.pooled
        active = F.silu(pooled).to(self.head_modulation.weight.dtype)
        width = pooled.shape[-1]

        def six(linear: nn.Linear) -> Tensor:
            return linear(active).view(-1, 1, 6, width)

        if self.config.shared_modulation:
            shared = six(self.modulation)
            modulation = [shared + block.modulation_offset for block in self.blocks]  # pyright: ignore
        else:
            modulation = [six(block.modulation) for block in self.blocks]  # pyright: ignore
        scale, shift = self.head_modulation(active).view(-1, 1, 2, width).unbind(2)
        context = None
        if self.config.context_dim is not None:
            tokens = condition.context
            assert tokens is not None
            tokens = tokens.to(self.head_modulation.weight.dtype)
            context = [block.cross.keys_values(tokens) for block in self.blocks]  # pyright: ignore
        mask = None if condition.mask is None else condition.mask[:, None, None]
        start = pooled[:, None]
        return Prepared(start, modulation, (scale, shift), context, mask, start)

    def embed(
        self, inputs: Float[Tensor, "b u c"] | None, prepared: Prepared, where: slice
    ) -> Float[Tensor, "b t d"]:
        """The residual stream at the positions `where`, float32.

        Args:
            inputs: Transformer inputs of the positions after scale 0 (None: there are none).
            prepared: Condition.
            where: Positions; if they start at 0, the start tokens come first.
        """
        parts: list[Tensor] = []
        if where.start == 0:
            parts.append(prepared.start.float() + self.start.float())
        if inputs is not None:
            parts.append(self.input(inputs.to(self.input.weight.dtype)).float())
        index = self._scale_index[where]  # pyright: ignore[reportIndexIssue]
        fixed = self.position[:, where].float() + self.scale_embedding(index).float()
        return torch.cat(parts, dim=1) + fixed

    def run(
        self,
        x: Float[Tensor, "b t d"],
        prepared: Prepared,
        *,
        where: slice,
        mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
        visible: slice | None = None,
        hooks: BlockHooks | None = None,
    ) -> Float[Tensor, "b t d"]:
        """The blocks: the last hidden states of the positions `where`."""
        for i, block in enumerate(self.blocks):
            if hooks is not None:
                x = hooks.before_block(i, where, x, prepared)
            again = self.gradient_checkpointing and torch.is_grad_enabled() and cache is None
            run = partial(checkpoint, block, use_reentrant=False) if again else block
            x = run(
                x,
                prepared,
                mask=mask,
                cache=cache,
                where=where,
                visible=visible or where,
                backend=self.backend,
            )
            if hooks is not None:
                x = hooks.after_block(i, where, x, prepared)
        return x

    def features(
        self, hidden: Float[Tensor, "b t d"], prepared: Prepared
    ) -> Float[Tensor, "b t d"]:
        """The head's input, float32: the modulated norm of hidden states."""
        return modulated_norm(hidden.float(), *prepared.head)

    def logits(self, hidden: Float[Tensor, "b t d"], prepared: Prepared) -> Float[Tensor, "b t v"]:
        """The head: float32 logits of hidden states."""
        y = self.features(hidden, prepared)
        return self.head(y.to(self.head.weight.dtype)).float()

    def forward(
        self,
        inputs: Float[Tensor, "b u c"],
        condition: Condition | None = None,
        *,
        class_labels: Int[Tensor, " b"] | Sequence[int] | None = None,
        ids: Tensor | None = None,
        num_scales: int | None = None,
        hooks: BlockHooks | None = None,
        features: bool = False,
    ) -> Float[Tensor, "b t v"]:
        """Teacher-forced logits of all scales.

        There is no label dropout here, in no mode: the trainer replaces ids (the released forward
        drops labels even in eval mode).

        Args:
            inputs: `tokenizer.teacher_inputs(tokens)`, [B, L - n_0^2, Z].
            condition: The condition; or
            class_labels: class numbers, or
            ids: ids from the conditioner's `tokenize`.
            num_scales: Only the first so many scales (progressive training).
            hooks: Control.
            features: Return what enters the head instead, [B, L, d].

        Returns:
            float32 [B, L, V].
        """
        if condition is None:
            conditions = ids if ids is not None else class_labels
            if conditions is None:
                raise UserError("pass one of condition, class_labels or ids")
            condition = self.condition(conditions)
        schedule = self.schedule if num_scales is None else self.schedule.truncate(num_scales)
        where = slice(0, schedule.num_tokens)
        expected = schedule.num_tokens - schedule.lengths[0]
        if inputs.shape[1] != expected:
            raise UserError(
                f"inputs must have {expected} positions for the scales {schedule}, "
                f"got {inputs.shape[1]}"
            )
        prepared = self.prepare(condition)
        x = self.embed(inputs, prepared, where)
        # Wherever gradients are kept: a residual stream in float32 costs a quarter of a step.
        if torch.is_grad_enabled() and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        mask = self._mask[where, where]  # pyright: ignore[reportIndexIssue]
        hidden = self.run(x, prepared, where=where, mask=mask, hooks=hooks)
        return (self.features if features else self.logits)(hidden, prepared)

    def new_cache(self, batch: int) -> KeyValueCache:
        """An empty cache for `batch` rows."""
        weight = self.head.weight
        dtype = weight.dtype
        if torch.is_autocast_enabled(weight.device.type):
            dtype = torch.get_autocast_dtype(weight.device.type)
        heads = self.config.resolved_heads
        return KeyValueCache(
            depth=self.config.depth,
            batch=batch,
            heads=heads,
            num_tokens=self.schedule.num_tokens,
            head_size=self.config.resolved_width // heads,
            dtype=dtype,
            device=weight.device,
        )

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write transformer/ and conditioner/ (config.json, model.safetensors) under `folder`."""
        folder = Path(folder)
        state = {k: v if dtype is None else v.to(dtype) for k, v in self.state_dict().items()}
        prefix = "conditioner."
        own = {k: v for k, v in state.items() if not k.startswith(prefix)}
        rest = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
        config = asdict(self.config)
        kind = {"kind": self.conditioner.kind, **self.conditioner.config()}
        for name, tensors, values, cls in (
            ("transformer", own, config, "NextScaleTransformer"),
            ("conditioner", rest, kind, "Conditioner"),
        ):
            (folder / name).mkdir(parents=True, exist_ok=True)
            storage.write_tensors(folder / name / "model.safetensors", tensors)
            values = {"format_version": FORMAT_VERSION, "class": cls, **values}
            storage.write_json(folder / name / "config.json", values)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> NextScaleTransformer:
        """Read what `save_pretrained` wrote (float32 on the CPU)."""
        folder = Path(folder)
        values = storage.read_config(
            folder / "conditioner" / "config.json", FORMAT_VERSION, "Conditioner"
        )
        kind = values.pop("kind", None)
        if kind not in CONDITIONERS:
            raise UserError(
                f'{folder} has a conditioner of kind "{kind}", this nextscale knows '
                f"{', '.join(CONDITIONERS)}; update it"
            )
        config = storage.read_config(
            folder / "transformer" / "config.json", FORMAT_VERSION, "NextScaleTransformer"
        )
        conditioner = storage.build(CONDITIONERS[kind], values, folder / "conditioner")
        sizes = storage.build(TransformerConfig, config, folder / "transformer")
        model = cls(sizes, conditioner)
        state = storage.read_tensors(folder / "transformer" / "model.safetensors")
        rest = storage.read_tensors(folder / "conditioner" / "model.safetensors")
        state |= {f"conditioner.{k}": v for k, v in rest.items()}
        storage.load_state(model, {k: v.float() for k, v in state.items()}, folder)
        return model.eval()

    @classmethod
    def from_official(
        cls,
        source: str | Path | Mapping[str, Tensor],
        scales: Sequence[int] | None = None,
        num_heads: int | None = None,
    ) -> NextScaleTransformer:
        """Load a released VAR transformer (`var_d16.pth`, ...) or its state dict.

        Sizes are inferred from the shapes. Note that the official `cfg=1.5` is
        `guidance_scale=2.5` here.

        Args:
            source: Path of a .pth or .safetensors file, or a state dict: flat, nested or prefixed.
            scales: Needed only if the number of positions is not 680 or 2240.
            num_heads: Needed only for files without a per-head scale; default the depth.
        """
        from nextscale.var.official import read_transformer

        config, conditioner, state = read_transformer(source, scales, num_heads)
        model = cls(config, conditioner)
        storage.load_state(model, state, "the official transformer")
        return model.eval()


def initialize(model: NextScaleTransformer) -> None:
    """The released initialisation: truncated normal of std sqrt(1 / (3 width)), small gates.

    The conditioner's own encoder (captions) keeps its initialisation.
    """
    config = model.config
    width = config.resolved_width
    std = math.sqrt(1 / 3 / width)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding) and not name.startswith("conditioner.enc"):
            nn.init.trunc_normal_(module.weight, std=std, a=-2, b=2)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
    for parameter in (model.start, model.position):
        nn.init.trunc_normal_(parameter, std=std, a=-2, b=2)
    with torch.no_grad():
        model.head.weight.mul_(0.02)
        model.head_modulation.weight.mul_(0.5)
        for block in model.blocks:
            assert isinstance(block, Block)
            for linear in (block.attention.proj, block.feed_forward.fc2):
                linear.weight.div_(math.sqrt(2 * config.depth))
            if block.cross is not None:
                block.cross.proj.weight.div_(math.sqrt(2 * config.depth))
            if config.shared_modulation:
                nn.init.normal_(block.modulation_offset, std=1 / math.sqrt(width))
                block.modulation_offset[:, :, :2].mul_(config.gate_init)
                block.modulation_offset[:, :, 2:].mul_(0.5)
            else:
                block.modulation.weight[: 2 * width].mul_(config.gate_init)
                block.modulation.weight[2 * width :].mul_(0.5)
