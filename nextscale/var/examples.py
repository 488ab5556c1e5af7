"""What `train var` feeds the transformer: tokens or images, and condition ids, by index."""

from __future__ import annotations

import logging
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from nextscale import processes
from nextscale.data import captions as scenes_grammar
from nextscale.data.images import to_float
from nextscale.data.sources import ImageSource
from nextscale.errors import UserError
from nextscale.tokenizers import MultiscaleVQ
from nextscale.tokenizers.token_maps import TokenMaps
from nextscale.var.conditioning import Conditioner, WordConditioner, WordEncoderConfig, split_words

logger = logging.getLogger(__name__)

Batch = dict[str, Tensor | None]  # images or tokens, inputs, ids


class Examples:
    """Images or token maps, and condition ids, by index."""

    def __init__(
        self, source: ImageSource | TokenMaps, tokenizer: MultiscaleVQ, cache_inputs: bool
    ) -> None:
        self.source = source
        self.conditioner: Conditioner | None = None
        self._inputs: Tensor | None = None
        if cache_inputs and isinstance(source, TokenMaps):
            parts = []
            starts = range(0, len(source), 1024)
            quiet = not (processes.is_main() and sys.stderr.isatty())
            for start in tqdm(starts, desc="inputs", disable=quiet):
                indices = np.arange(start, min(start + 1024, len(source)))
                parts.append(tokenizer.teacher_inputs(source.load(indices)[0]).to(torch.bfloat16))
            self._inputs = torch.cat(parts)

    def __len__(self) -> int:
        return len(self.source)

    def load(self, indices: np.ndarray, step: int = 0) -> Batch:
        """On the CPU, by the loop's workers: images are tokenized later, on the device."""
        batch: Batch = {"images": None, "tokens": None, "inputs": None}
        if isinstance(self.source, TokenMaps):
            batch["tokens"], labels, captions = self.source.load(indices)
        else:
            loaded = self.source.load(indices, step=step)
            batch["images"], labels, captions = loaded.images, loaded.labels, loaded.captions
        assert self.conditioner is not None
        conditions = captions if self.conditioner.prompts else labels
        if conditions is None:
            kind = "captions" if self.conditioner.prompts else "class labels"
            raise UserError(f"the model needs {kind}, the dataset has none")
        if self._inputs is not None:
            batch["inputs"] = self._inputs[torch.as_tensor(indices)]
        batch["ids"] = self.conditioner.tokenize(list(conditions), strict=False)
        return batch


def batch_tokens(batch: Batch, tokenizer: MultiscaleVQ) -> Tensor:
    """The batch's tokens on the tokenizer's device."""
    device = tokenizer.quant_conv.weight.device
    images, tokens = batch["images"], batch["tokens"]
    if tokens is None:
        assert images is not None
        return tokenizer.encode(to_float(images.to(device)))
    return tokens.to(device)


@torch.no_grad()
def self_corrected(batch: Batch, tokenizer: MultiscaleVQ, share: float) -> tuple[Tensor, Tensor]:
    """Targets [b, t] and inputs of a sampler that errs: scale k quantizes f - F, errors in F."""
    images = batch["images"]
    assert images is not None
    quantizer, schedule = tokenizer.quantizer, tokenizer.schedule
    f = tokenizer.latents(to_float(images.to(quantizer.codebook.weight.device))).float()
    reconstruction = torch.zeros_like(f)
    rate = share * torch.rand(len(f), 1, device=f.device)
    targets, inputs = [], []
    for k, side in enumerate(schedule.sides):
        rest = f - reconstruction
        if k < schedule.num_scales - 1:
            rest = F.interpolate(rest, size=side, mode="area")
        tokens = quantizer.nearest(rest.permute(0, 2, 3, 1).flatten(0, 2)).view(len(f), -1)
        targets.append(tokens)
        drawn = replace_some(tokens, rate, quantizer.codebook_size)
        codes = quantizer.code_map(drawn, k, schedule)
        reconstruction, following = quantizer.step(reconstruction, codes, k, schedule)
        inputs.append(following.flatten(2).transpose(1, 2))
    return torch.cat(targets, dim=1), torch.cat(inputs[:-1], dim=1)


def replace_some(tokens: Tensor, share: float | Tensor, codebook_size: int) -> Tensor:
    """Each token becomes a random code with probability `share` (one, or [b, 1])."""
    if isinstance(share, float) and not share:
        return tokens
    random = torch.randint_like(tokens, codebook_size)
    return torch.where(torch.rand(tokens.shape, device=tokens.device) < share, random, tokens)


def vocabulary(encoder: WordEncoderConfig, source: ImageSource | TokenMaps) -> list[str]:
    """The words of the scenes grammar, or those of the first 100,000 training captions."""
    if encoder.grammar == "scenes":
        return list(scenes_grammar.VOCABULARY)
    captions = source.captions(np.arange(min(len(source), 100_000)))
    split = [split_words(caption) for caption in captions]
    cut = sum(len(words) > encoder.max_words for words in split)
    if cut:
        logger.warning(
            "%d of %d captions are longer than max_words %d and are cut",
            cut, len(captions), encoder.max_words,
        )  # fmt: skip
    return sorted({word for words in split for word in words})


def warn_of_lost_words(conditioner: WordConditioner, source: ImageSource | TokenMaps) -> None:
    """Say once how many of the first 10,000 captions the model cannot take in whole."""
    captions = source.captions(np.arange(min(len(source), 10_000)))
    lost = []
    for caption in captions:
        try:
            conditioner.tokenize([caption])
        except UserError:
            lost.append(caption)
    if lost:
        logger.warning(
            "%d of %d captions are too long or have words that the model does not know, which "
            'are left out, such as "%s"', len(lost), len(captions), lost[0],
        )  # fmt: skip
