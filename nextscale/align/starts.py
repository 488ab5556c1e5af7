"""Learned start distributions (FIND): what is trained instead of the generator, and its file.

Four spaces. `noise`: the latents before step 0 of a diffusion pipeline, N(mu, sd^2) instead of
N(0, 1). `embedding`: an offset of a next-scale transformer's start token, N(mu, sd^2).
`prefix_table`: logits added to the transformer's own for the tokens of the first scales.
`sharpness`: for each of the first scales the factor of the transformer's own logits, an inverse
temperature; a few numbers, that many prompts learn together. Each is a table with one row per
prompt, or a network of the prompt's features that answers for any prompt.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nextscale import storage
from nextscale.errors import UserError

Space = Literal["noise", "embedding", "prefix_table", "sharpness"]
TOKENS = ("prefix_table", "sharpness")  # spaces whose starts are tokens
FILE = "start.safetensors"
_FORMAT = "nextscale-start-1"
_MOST_LOG = 2.0  # a deviation, or a factor, beyond 7 times the initial one would run away


@dataclass(frozen=True)
class StartShape:
    """What a start distribution is of.

    Attributes:
        space: See the module.
        shape: Of one start: latents, (width,) of the start token, or (tokens, codes).
        lengths: Tokens of each scale of a prefix.
        initial_std: Standard deviation before training, of the Gaussian spaces.
        features: Width of a prompt's features.
        prompts: Rows of the table; None: a network answers for any prompt.
        hidden: Width of that network, and of the value network.
        min_std: Standard deviations stay above it.
    """

    space: Space
    shape: tuple[int, ...]
    initial_std: float
    features: int
    prompts: tuple[str | int, ...] | None
    hidden: int = 256
    min_std: float = 1e-4
    lengths: tuple[int, ...] = ()


class StartDistribution(nn.Module):
    """A distribution of starts per prompt; before training that of the generator itself.

    Args:
        shape: See there.
        value: Also make a value network, features -> expected reward.
    """

    def __init__(self, shape: StartShape, *, value: bool = False) -> None:
        super().__init__()
        self.shape = shape
        size = int(torch.Size(shape.shape).numel())
        outputs = {"prefix_table": size, "sharpness": len(shape.lengths)}.get(shape.space, 2 * size)
        self.table = self.network = None
        if shape.prompts is not None:
            self.table = nn.Parameter(torch.zeros(len(shape.prompts), outputs))
        else:
            self.network = _mlp(shape.features, shape.hidden, outputs)
            last = self.network[-1]
            assert isinstance(last, nn.Linear)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        self.value = _mlp(shape.features, shape.hidden, 1) if value else None
        prompts = shape.prompts or ()
        self._rows = {prompt: row for row, prompt in enumerate(prompts)}

    def rows(self, conditions: Sequence[str | int]) -> Int[Tensor, " b"]:
        """Row of each prompt in the table; zeros for a network.

        Raises:
            UserError: For a prompt that it was not trained for.
        """
        if self.shape.prompts is None:
            return torch.zeros(len(conditions), dtype=torch.long)
        for condition in conditions:
            if condition not in self._rows:
                raise UserError(
                    f'there is no start for "{condition}": this file was trained for '
                    f"{len(self._rows)} prompts, the first is {self.shape.prompts[0]!r}. Train one "
                    "with --find.amortised for any prompt"
                )
        return torch.tensor([self._rows[condition] for condition in conditions])

    def forward(
        self, rows: Int[Tensor, " b"], features: Float[Tensor, "b f"]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(mean, std, value), or of tokens (logits to add, factors, value); fp32."""
        with torch.autocast(features.device.type, enabled=False):
            features = features.float()
            if self.table is not None:
                found = self.table[rows]
            else:
                assert self.network is not None
                found = self.network(features)
            value = None if self.value is None else self.value(features)[:, 0]
            if self.shape.space == "prefix_table":
                added = found.view(-1, *self.shape.shape)
                return added, added.new_ones(1, added.shape[1]), value
            if self.shape.space == "sharpness":
                lengths = torch.tensor(self.shape.lengths, device=found.device)
                factors = _bounded(found, -_MOST_LOG, _MOST_LOG).exp()
                return found.new_zeros(1, 1, 1), factors.repeat_interleave(lengths, dim=1), value
            mean, log_std = (part.view(-1, *self.shape.shape) for part in found.chunk(2, dim=1))
            initial = self.shape.initial_std
            log_std = _bounded(log_std, math.log(self.shape.min_std / initial), _MOST_LOG)
            return initial * mean, initial * log_std.exp(), value


def save_starts(starts: StartDistribution, folder: Path, fingerprint: str) -> None:
    """Write `start.safetensors`.

    Args:
        starts: What was trained.
        folder: Made if need be.
        fingerprint: Of the generator's weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v for k, v in starts.state_dict().items() if not k.startswith("value.")}
    about = {"format": _FORMAT, "base": fingerprint, "shape": json.dumps(asdict(starts.shape))}
    storage.write_tensors(folder / FILE, state, about)


def read_starts(path: str | Path, fingerprint: str) -> StartDistribution:
    """Read what `save_starts` wrote.

    Args:
        path: The file or its folder.
        fingerprint: Of the weights of the generator that is to use it.

    Raises:
        UserError: If there is none, or it was trained for other weights.
    """
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        inside = path.parent / "model" / FILE
        hint = f"; did you mean {inside.parent}?" if inside.is_file() else ""
        raise UserError(
            f"there is no start file {path}; nextscale align --method find makes one{hint}"
        )
    about = storage.read_metadata(path)
    if about.get("format") != _FORMAT:
        raise UserError(f"{path} is no start file of nextscale align --method find")
    if about["base"] != fingerprint:
        raise UserError(
            f"{path} was trained for a model with other weights; use it with the model that "
            "it was trained on, opened in float32 or bfloat16"
        )
    starts = StartDistribution(_shape(json.loads(about["shape"])))
    starts.load_state_dict(storage.read_tensors(path))
    return starts.eval()


def _shape(fields: Mapping[str, Any]) -> StartShape:
    prompts = fields["prompts"]
    changed = {name: tuple(fields[name]) for name in ("shape", "lengths")}
    return StartShape(**{**fields, **changed, "prompts": prompts and tuple(prompts)})


def _bounded(values: Tensor, low: float, high: float) -> Tensor:
    """Clamped, but with the gradient of the values, so that it can lead back."""
    return values + (values.clamp(low, high) - values).detach()


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(inputs),
        nn.Linear(inputs, hidden),
        nn.GELU(),
        nn.Linear(hidden, hidden),
        nn.GELU(),
        nn.Linear(hidden, outputs),
    )
