"""What every training run has in common; the trainers' own configurations inherit from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nextscale.errors import require


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Settings of the shared training loop (names as in diffusers' training scripts)."""

    output_dir: str
    """Folder of the run: checkpoints, log.jsonl, recipe.yaml, run.json."""
    seed: int = 0
    """Data order and noise are functions of (seed, step)."""

    max_train_steps: int = 1000
    """Optimizer steps of the whole run; the schedules end here."""
    max_train_minutes: float | None = None
    """Stop with a checkpoint after this much wall clock (this process, not earlier ones)."""
    train_batch_size: int = 16
    """Images per device and micro-batch."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per optimizer step."""

    learning_rate: float = 1e-4
    """Peak learning rate, for the global batch as it is: no automatic scaling."""
    lr_scheduler: Literal["constant", "linear", "cosine", "var"] = "constant"
    """After the warm-up: flat, linear or cosine to `lr_final`; var holds the peak first."""
    lr_hold: float = 0.05
    """Share of the steps after the warm-up for which var holds the peak."""
    lr_warmup_steps: int = 0
    """Steps of linear warm-up."""
    lr_final: float = 0.1
    """Learning rate of the last step as a fraction of the peak (linear, cosine, var)."""
    adam_beta1: float = 0.9
    """AdamW's decay of the gradient mean."""
    adam_beta2: float = 0.95
    """AdamW's decay of the squared gradient mean."""
    adam_epsilon: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.05
    """Weight decay at the first step."""
    weight_decay_end: float | None = None
    """Weight decay at the last step, reached by a half cosine; None: as at the first."""
    max_grad_norm: float | None = 2.0
    """Clip the global gradient norm of each optimizer; None: off."""

    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = "auto"
    """auto: bf16 on CUDA and on CPUs that multiply in it (AMX, AVX-512 BF16), else no."""
    compile: bool = False
    """Compile the modules with torch.compile."""
    use_ema: bool = True
    """Keep an exponential moving average of the weights, for validation and the result."""
    ema_decay: float = 0.999
    """Share of the old average kept at each step."""

    checkpointing_steps: int | None = 1000
    """Steps between checkpoints; None: only at the end. There is always one at the end."""
    checkpoints_total_limit: int | None = 2
    """Checkpoints to keep, newest first; None: all."""
    resume_from_checkpoint: str | None = None
    """A checkpoint folder, or `latest`: the newest in output_dir, from scratch if there is none."""
    validation_steps: int | None = None
    """Steps between validations; None: only at the end."""
    logging_steps: int = 10
    """Steps between log lines; a line holds means over these steps."""
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = "tensorboard"
    """Tracker that gets the log lines as well."""
    dataloader_num_workers: int = 0
    """Processes that prepare batches ahead; 0: the training process does it."""

    def __post_init__(self) -> None:
        """Refuse values that no run can work with.

        Raises:
            UserError: Naming parameter, value and fix.
        """
        positive = (
            *("max_train_steps", "train_batch_size", "gradient_accumulation_steps"),
            *("max_train_minutes", "learning_rate", "adam_epsilon", "max_grad_norm"),
            *("checkpointing_steps", "checkpoints_total_limit", "validation_steps"),
            "logging_steps",
        )
        for name in positive:
            # None means "off" where the field allows it.
            value = getattr(self, name)
            require(name, value, value is None or value > 0, "be above 0")
        counts = ("seed", "lr_warmup_steps", "dataloader_num_workers")
        for name in (*counts, "weight_decay", "weight_decay_end"):
            value = getattr(self, name)
            require(name, value, value is None or value >= 0, "be 0 or more")
        for name in ("adam_beta1", "adam_beta2", "ema_decay"):
            value = getattr(self, name)
            require(name, value, 0 <= value < 1, "lie in [0, 1); 0.9 to 0.9999 is common")
        require("lr_hold", self.lr_hold, 0 <= self.lr_hold < 1, "lie in [0, 1)")
        require("lr_final", self.lr_final, 0 <= self.lr_final <= 1, "lie in [0, 1]")
        choices = {
            "lr_scheduler": ("constant", "linear", "cosine", "var"),
            "mixed_precision": ("auto", "no", "fp16", "bf16"),
            "report_to": ("none", "tensorboard", "wandb", "trackio"),
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            require(name, value, value in allowed, f"be one of {', '.join(allowed)}")
