"""What a picture is conditioned on: labels or prompts -> a pooled vector and context tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nextscale.data import captions as scenes_grammar
from nextscale.errors import UserError, missing_extra, require


@dataclass(frozen=True)
class Condition:
    """What the transformer sees of a label or prompt.

    Attributes:
        pooled: [b, d], added to the start token and the input of every AdaLN.
        context: [b, s, c] for cross-attention, or None.
        mask: [b, s], True for real context tokens, or None if all are.
    """

    pooled: Float[Tensor, "b d"]
    context: Float[Tensor, "b s c"] | None = None
    mask: Bool[Tensor, "b s"] | None = None

    @staticmethod
    def cat(conditions: Sequence[Condition]) -> Condition:
        """Stack conditions of one model along the batch."""
        first = conditions[0]
        if first.context is None:
            return Condition(torch.cat([c.pooled for c in conditions]))
        assert all(c.context is not None and c.mask is not None for c in conditions)
        return Condition(
            torch.cat([c.pooled for c in conditions]),
            torch.cat([c.context for c in conditions]),  # pyright: ignore
            torch.cat([c.mask for c in conditions]),  # pyright: ignore
        )

    def repeat_interleave(self, count: int) -> Condition:
        """Each row `count` times in a row."""
        fields = (self.pooled, self.context, self.mask)
        return Condition(*(f if f is None else f.repeat_interleave(count, 0) for f in fields))  # pyright: ignore

    def __getitem__(self, rows: slice | Tensor) -> Condition:
        fields = (self.pooled, self.context, self.mask)
        return Condition(*(f if f is None else f[rows] for f in fields))  # pyright: ignore


class Conditioner(nn.Module):
    """Labels or prompts -> ids (`tokenize`, on the CPU) -> `Condition` (`forward`).

    The ids of "no condition" come from `null`, so that label dropout in training and guidance in
    sampling are a matter of replacing ids. Subclasses are registered in `CONDITIONERS`.
    """

    kind: ClassVar[str]
    prompts: ClassVar[bool]
    """Whether it takes prompts (else class labels)."""
    context_dim: int | None = None
    """Channels of the context tokens, None if there are none."""

    def tokenize(self, conditions: Sequence[Any], *, strict: bool = True) -> Int[Tensor, "b ..."]:
        """Ids of class labels or prompts.

        Args:
            conditions: Labels or prompts.
            strict: Refuse what the model cannot read; else (captions of a training set) leave
                unknown words out and cut what is too long.

        Raises:
            UserError: For a label out of range or a prompt that the model cannot read.
        """
        raise NotImplementedError

    def null(self, count: int) -> Int[Tensor, "b ..."]:
        """Ids of `count` absent conditions."""
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """Keyword arguments that build it again, JSON values only."""
        raise NotImplementedError


class ClassConditioner(Conditioner):
    """An embedding per class and one for "no class" (VAR); no context tokens.

    Args:
        width: Width of the transformer.
        num_classes: Classes.
        class_names: Optional names, accepted in place of numbers.
    """

    kind, prompts = "class", False

    def __init__(
        self, *, width: int, num_classes: int, class_names: Sequence[str] | None = None
    ) -> None:
        super().__init__()
        self.num_classes, self.class_names = num_classes, class_names
        self.embedding = nn.Embedding(num_classes + 1, width)

    def tokenize(self, conditions: Sequence[Any], *, strict: bool = True) -> Int[Tensor, " b"]:
        """Class numbers of numbers or names."""
        return torch.tensor([self._label(c) for c in conditions], dtype=torch.long)

    def _label(self, label: int | str) -> int:
        if isinstance(label, str) and not label.lstrip("-").isdigit():
            return self._named(label)
        number = int(label)
        if not 0 <= number < self.num_classes:
            raise UserError(
                f"class label {number} is out of range: the model has classes 0 to "
                f"{self.num_classes - 1}"
            )
        return number

    def _named(self, name: str) -> int:
        names = [n.lower() for n in self.class_names or ()]
        if name.lower() in names:
            return names.index(name.lower())
        if self.num_classes == 1000 and not names:
            from nextscale.data.imagenet import imagenet_class

            return imagenet_class(name)
        known = ", ".join(names[:12]) or f"numbers 0 to {self.num_classes - 1}"
        raise UserError(f'the model has no class "{name}"; it knows {known}')

    def null(self, count: int) -> Int[Tensor, " b"]:
        """The number after the last class, `count` times."""
        return torch.full((count,), self.num_classes, dtype=torch.long)

    def config(self) -> dict[str, Any]:
        """Width and classes."""
        names = None if self.class_names is None else list(self.class_names)
        return {
            "width": self.embedding.embedding_dim,
            "num_classes": self.num_classes,
            "class_names": names,
        }

    def forward(self, ids: Int[Tensor, " b"]) -> Condition:
        """The rows of the table; id `num_classes` is "no class"."""
        if not torch.compiler.is_compiling() and len(ids):
            low, high = (int(v) for v in ids.aminmax())
            if low < 0 or high > self.num_classes:
                raise UserError(
                    f"class label {low if low < 0 else high} is out of range: the model has "
                    f"classes 0 to {self.num_classes - 1}"
                )
        return Condition(self.embedding(ids))


@dataclass(frozen=True, kw_only=True)
class WordEncoderConfig:
    """Size of the learned caption encoder."""

    words: tuple[str, ...] = ()
    """Vocabulary; empty: taken from the training captions."""
    grammar: str | None = None
    """"scenes": prompts are parsed and put into canonical form before they are split."""
    max_words: int = 24
    """Longest caption in words."""
    encoder_width: int = 128
    """Channels of the context tokens."""
    encoder_depth: int = 2
    """Transformer layers."""
    encoder_heads: int = 4
    """Attention heads."""

    def __post_init__(self) -> None:
        for name in ("max_words", "encoder_width", "encoder_depth", "encoder_heads"):
            require(name, getattr(self, name), getattr(self, name) > 0, "be above 0")
        width, heads = self.encoder_width, self.encoder_heads
        require("encoder_width", width, width % heads == 0, f"be a multiple of {heads} heads")


class WordConditioner(Conditioner):
    """A small transformer encoder over words, learned with the model: no download.

    The first context token sums up the caption and gives the pooled vector.

    Args:
        width: Width of the image transformer.
        settings: Size and vocabulary (or its fields as keywords).
    """

    kind, prompts = "words", True
    _PAD, _START = 0, 1

    def __init__(self, *, width: int, **settings: Any) -> None:
        super().__init__()
        settings["words"] = tuple(settings.get("words", ()))
        self.settings = WordEncoderConfig(**settings)
        self.width = width
        self.context_dim = c = self.settings.encoder_width
        self._index = {word: i + 2 for i, word in enumerate(self.settings.words)}
        self.embedding = nn.Embedding(len(self._index) + 2, c)
        self.position = nn.Parameter(torch.zeros(1, self.settings.max_words + 1, c))
        layer = nn.TransformerEncoderLayer(
            c, self.settings.encoder_heads, 4 * c, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(
            layer, self.settings.encoder_depth, nn.LayerNorm(c), enable_nested_tensor=False
        )
        self.pool = nn.Linear(c, width)

    def tokenize(self, conditions: Sequence[Any], *, strict: bool = True) -> Int[Tensor, "b s"]:
        """A start symbol and the words of each prompt, padded."""
        ids = torch.full((len(conditions), self.settings.max_words + 1), self._PAD)
        ids[:, 0] = self._START
        for row, prompt in zip(ids, conditions, strict=True):
            words = self._words(str(prompt), strict)
            if not strict:
                words = words[: self.settings.max_words]
            if len(words) > self.settings.max_words:
                raise UserError(
                    f'the prompt "{prompt}" has {len(words)} words, the model reads '
                    f"{self.settings.max_words}; shorten it"
                )
            row[1 : len(words) + 1] = torch.tensor([self._index[w] for w in words])
        return ids

    def _words(self, prompt: str, strict: bool) -> list[str]:
        if self.settings.grammar == "scenes":
            with contextlib.nullcontext() if strict else contextlib.suppress(UserError):
                prompt = str(scenes_grammar.parse(prompt))
        words = split_words(prompt)
        unknown = [w for w in words if w not in self._index]
        if not strict:
            return [w for w in words if w in self._index]
        if unknown:
            raise UserError(
                f'the prompt "{prompt}" has words that the model has not learned: '
                f"{', '.join(unknown[:8])}; it knows {len(self._index)} words such as "
                f"{', '.join(list(self._index)[:12])}"
            )
        return words

    def null(self, count: int) -> Int[Tensor, "b s"]:
        """The start symbol alone."""
        ids = torch.full((count, self.settings.max_words + 1), self._PAD)
        ids[:, 0] = self._START
        return ids

    def config(self) -> dict[str, Any]:
        """Width, size and vocabulary."""
        return {"width": self.width, **asdict(self.settings), "words": list(self.settings.words)}

    def forward(self, ids: Int[Tensor, "b s"]) -> Condition:
        """Encoded words as context, the start symbol's as pooled vector."""
        mask = ids != self._PAD
        x = self.embedding(ids) + self.position
        context = self.encoder(x, src_key_padding_mask=~mask)
        return Condition(self.pool(context[:, 0]), context, mask)


class PretrainedTextConditioner(Conditioner):
    """A frozen text encoder of transformers (CLIP, T5, ...) with learned projections.

    Args:
        width: Width of the image transformer.
        model: Hub id or local folder of the text encoder.
        max_words: Tokens per prompt.
    """

    kind, prompts = "pretrained-text", True

    def __init__(self, *, width: int, model: str, max_words: int = 77) -> None:
        super().__init__()
        try:
            from transformers import AutoModel, AutoTokenizer
        except ImportError as error:
            raise missing_extra(f"the text encoder {model} needs transformers", "align") from error
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(model)
            encoder: Any = AutoModel.from_pretrained(model)
        except (OSError, ValueError) as error:
            raise UserError(
                f'the text encoder "{model}" could not be loaded ({str(error).splitlines()[0]}); '
                "pass a local folder, or check the network and HF_HUB_OFFLINE",
                exit_code=1,
            ) from error
        if hasattr(encoder, "text_model"):  # CLIP without its image tower
            encoder = encoder.text_model
        elif hasattr(encoder, "decoder"):  # T5 without its decoder
            encoder = encoder.encoder
        self._frozen = [encoder.eval().requires_grad_(False)]  # hidden: not our weights to save
        self.width, self.model_name, self.max_words = width, model, max_words
        self.context_dim = encoder.config.hidden_size
        self.pool = nn.Linear(encoder.config.hidden_size, width)

    def tokenize(self, conditions: Sequence[Any], *, strict: bool = True) -> Int[Tensor, "b s two"]:
        """Ids and attention mask of the encoder's own tokenizer; long prompts are cut."""
        out = self._tokenizer(
            [str(c) for c in conditions],
            padding="max_length",
            truncation=True,
            max_length=self.max_words,
            return_tensors="pt",
        )
        return torch.stack([out["input_ids"], out["attention_mask"]], dim=-1)

    def null(self, count: int) -> Int[Tensor, "b s two"]:
        """The empty prompt."""
        return self.tokenize([""] * count)

    def config(self) -> dict[str, Any]:
        """Width, encoder and length."""
        return {"width": self.width, "model": self.model_name, "max_words": self.max_words}

    def forward(self, ids: Int[Tensor, "b s two"]) -> Condition:
        """Last hidden states as context, their mean over real tokens as pooled vector."""
        encoder = self._frozen[0].to(self.pool.weight.device)
        mask = ids[..., 1].bool()
        with torch.no_grad():
            hidden = encoder(input_ids=ids[..., 0], attention_mask=ids[..., 1]).last_hidden_state
        hidden = hidden.to(self.pool.weight.dtype)
        weights = mask[..., None] / mask.sum(1)[:, None, None]
        return Condition(self.pool((hidden * weights.to(hidden.dtype)).sum(1)), hidden, mask)


CONDITIONERS: dict[str, type[Conditioner]] = {
    c.kind: c for c in (ClassConditioner, WordConditioner, PretrainedTextConditioner)
}


def split_words(text: str) -> list[str]:
    """Lower-case words and commas."""
    return text.lower().replace(",", " , ").split()
