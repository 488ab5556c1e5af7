"""What a run of `nextscale erase` is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nextscale.errors import UserError, require
from nextscale.training import TrainingConfig
from nextscale.training.session import resolve_precision

METHODS = ("ear", "svare", "sace", "d2o", "uce", "class_swap")
CLOSED_FORM = ("uce", "class_swap")


@dataclass(frozen=True, kw_only=True)
class EraseConfig(TrainingConfig):
    """Settings of `nextscale erase`; `train_batch_size` counts pictures."""

    model: str = "scenes"
    """A next-scale model: bundled name, folder or hub id. It is never written to."""
    concepts: tuple[str, ...] = ()
    """What is erased: "red", "red circle", "striped", "left of" (scenes), a class number, or the
    concept that lines of `pairs` name."""
    method: Literal["ear", "svare", "sace", "d2o", "uce", "class_swap"] = "ear"
    """ear: windows, gate, negative guidance of hidden states; svare: filtered cross-entropy and KL;
    sace: the first scales alone; d2o: negatives alone; uce, class_swap: closed forms, no
    training."""
    sequential: bool = False
    """Several concepts one after the other, an equal share of the steps each; else mixed."""

    pairs: str | None = None
    """Prompt pairs: a .jsonl of {"original", "modified", "concept", "replacement"}; templates (with
    `replacements`), or llm:MODEL, an instruction-tuned model of transformers, folder or hub id,
    that writes them. None: the scenes grammar, or another class for each label."""
    replacements: tuple[str, ...] = ()
    """What stands in the place of the concepts in templates."""
    num_pairs: int = 100
    """Pairs per concept that are made."""
    num_pictures: int = 2
    """Pictures that the base draws for each pair, before training."""
    recognisers: tuple[str, ...] = ()
    """Who sees a concept in a picture: checker (scenes), classifier:MODEL[@FILE] (timm; the concept
    is a class label or a name of ImageNet), clip[:MODEL]. The first one filters and decides, the
    report names all. Empty: the checker and the bundled clip for scenes, else nobody."""
    filter_pairs: bool = True
    """Keep a picture of a pair only if the concept is seen in the one of the original prompt and
    not in that of the modified one."""
    prefix: Literal["neutral", "concept"] = "neutral"
    """Tokens that all streams see: of the base's picture of the modified prompt, or of the original
    one."""

    eta: float = 1.0
    """ear: how far beyond the modified prompt's states the target lies; 0: at them."""
    space: Literal["hidden", "logits"] = "hidden"
    """ear: mean squared distance of hidden states, or KL of logits."""
    mode: Literal["windowed", "joint"] = "windowed"
    """ear: one update per window, coarse to fine; or one for all windows together."""
    window_smallest: int = 25
    """ear: small scales are joined until a window has so many tokens."""
    window_largest: int | None = 64
    """ear: large scales are split into windows of so many tokens; None: never."""
    gate: float | None = None
    """ear: a window whose mean loss is not above this changes nothing; None: `gate_quantile`."""
    gate_quantile: float = 0.1
    """ear: the threshold of each window is this quantile of single pictures' losses before
    training. Means of batches scatter less, so that high quantiles never open."""
    token_gate: float = 0.0
    """ear: tokens with a loss below this count as 0."""
    train_scales: int | None = None
    """Only the first so many scales; None: all, and 1 with sace."""
    entropy_weight: float = 0.1
    """sace: weight of the mean entropy, which keeps the erased scales from becoming noise."""
    d2o_beta: float = 0.1
    """d2o: strength of the pull towards pictures of the modified prompts."""
    d2o_alpha: float = 0.1
    """d2o: strength of the push away from pictures of the concept."""
    uce_preserve: float = 1.0
    """uce: weight of the prompts that keep their keys and values."""

    preserve_weight: float = 1.0
    """Weight of KL(base || model) on the modified prompts."""
    retain_prompts: tuple[str, ...] = ()
    """Further prompts that are to stay as they are: sources as in `nextscale align`, without those
    that name the concept. Empty: scenes:standard for scenes models, else none."""
    retain_weight: float = 1.0
    """Weight of KL(base || model) on them."""
    num_retain: int = 200
    """Pictures of them that the base draws before training."""
    unconditional_weight: float = 0.0
    """Weight of KL(base || model) without a prompt; 0 leaves it alone: erasing on both sides of
    guidance would erase twice."""

    lora_rank: int = 8
    """Train a LoRA of this rank; 0: the weights themselves, saved as differences."""
    lora_alpha: float | None = None
    """LoRA scale is alpha / rank; None: alpha = rank."""
    targets: tuple[str, ...] = ()
    """What is trained, last parts of module names; empty: cross-attention and FFN, or for class
    models qkv, modulation and FFN."""
    first_blocks: int | None = None
    """Only the first so many blocks (EAR: a sixth of them); None: all."""

    num_eval_prompts: int = 100
    """Prompts of each kind in the report: with the concept, near it, without it; 0: no report."""
    num_eval_images: int = 2
    """Pictures per prompt of the report."""
    eval_pairs: str | None = None
    """Pairs of the report for a model of free text, .jsonl as `pairs`, none of them trained on;
    None: no report. Models of scenes and classes have their own."""
    eval_prompts: tuple[str, ...] = ()
    """Prompts without relation to the concepts, for the same report: sources as in `nextscale
    align`."""
    eval_reference: str | None = None
    """True pictures for the report's Fréchet distance, of prompts without the concept: a folder or
    .npz, or scenes; None: scenes for a model of scenes, else none."""
    eval_features: str | None = None
    """Network of the report's Fréchet distance and diversity: scenes-features, a folder of `train
    features`, or inception (its weights are looked for as `nextscale eval` does); None:
    scenes-features for a model of scenes, else none."""
    download: bool = False
    """Fetch weights of recognisers and of Inception that are nowhere."""
    attacks: bool = True
    """Attack the result and report what comes back."""
    attack_prompts: str | None = None
    """A list of prompts that are tried besides, such as a published one: .txt or .jsonl."""

    learning_rate: float = 5e-4
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Weight decay at the first step."""
    max_grad_norm: float | None = 1.0
    """Clip the global gradient norm; None: off."""
    use_ema: bool = False
    """Keep an exponential moving average of the weights, which is then the result."""
    max_train_steps: int = 500
    """Updates."""
    train_batch_size: int = 8
    """Pictures per device and micro-batch."""

    @property
    def half(self) -> bool:
        """Whether pictures are drawn in bfloat16, as the training multiplies."""
        return resolve_precision(self.mixed_precision) in ("bf16", "fp16")

    def __post_init__(self) -> None:
        super().__post_init__()
        require("method", self.method, self.method in METHODS, f"be one of {', '.join(METHODS)}")
        written = self.pairs == "templates" or (self.pairs or "").startswith("llm:")
        if not self.concepts and (self.pairs is None or written):
            raise UserError('concepts is empty; name one, such as "red circle", or give pairs')
        positive = ("num_pairs", "num_pictures", "num_eval_images", "train_scales", "first_blocks")
        for name in positive:
            value = getattr(self, name)
            require(name, value, value is None or value > 0, "be above 0")
        for name in (
            *("eta", "gate", "token_gate", "entropy_weight", "preserve_weight", "retain_weight"),
            *("unconditional_weight", "lora_rank", "num_retain", "num_eval_prompts"),
        ):
            value = getattr(self, name)
            require(name, value, value is None or value >= 0, "be 0 or more")
        if self.method in CLOSED_FORM and self.resume_from_checkpoint is not None:
            raise UserError(f"method {self.method} trains nothing that could be resumed")
        if self.attack_prompts is not None and not (self.attacks and self.num_eval_prompts):
            raise UserError(
                "attack_prompts is for the attacks of the report, which are off: leave out "
                "attack_prompts, or no_attacks and num_eval_prompts 0"
            )
        windowed = self.method == "ear" and self.mode == "windowed"
        if (windowed or self.sequential) and self.gradient_accumulation_steps > 1:
            raise UserError(
                "gradient_accumulation_steps is for mode joint without sequential: windows and "
                "concepts take turns step by step"
            )
        require("gate_quantile", self.gate_quantile, 0 <= self.gate_quantile < 1, "lie in [0, 1)")
        for name in ("d2o_beta", "d2o_alpha", "uce_preserve"):
            require(name, getattr(self, name), getattr(self, name) > 0, "be above 0")
