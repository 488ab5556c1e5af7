"""What a run of `nextscale align` is."""

from __future__ import annotations

from dataclasses import dataclass, field

from nextscale.align.methods.b2 import B2Config
from nextscale.align.methods.d2o import D2OConfig
from nextscale.align.methods.diffusion_nft import DiffusionNFTConfig
from nextscale.align.methods.dpo import DPOConfig
from nextscale.align.methods.dragon import DRAGONConfig
from nextscale.align.methods.fdpg import FDPGConfig
from nextscale.align.methods.find import FINDConfig
from nextscale.align.methods.grpo_config import GRPOConfig
from nextscale.align.methods.nft import NFTConfig
from nextscale.align.methods.r0 import R0Config
from nextscale.align.methods.raft import RAFTConfig
from nextscale.align.methods.reg_grpo import RegGRPOConfig
from nextscale.align.methods.seppo import SePPOConfig
from nextscale.align.methods.sibling import SiblingConfig
from nextscale.align.rewards.composition import MODES
from nextscale.errors import UserError, require
from nextscale.training import TrainingConfig

METHOD_NAMES = (
    *("grpo", "dpo", "raft", "b2", "dragon", "find"),
    *("fdpg", "reg_grpo", "nft", "diffusion_nft", "d2o", "sibling", "r0", "seppo"),
)


@dataclass(frozen=True, kw_only=True)
class DiffusionSettings:
    """How a diffusers pipeline draws rollouts."""

    num_inference_steps: int = 20
    """Denoising steps of a rollout."""
    eta: float = 1.0
    """Noise of DDIM steps in rollouts, (0, 1]; for find see find.deterministic."""
    noise_level: float = 0.7
    """Noise of flow-matching steps in rollouts (Flow-GRPO's a)."""
    logp_reduction: str = "mean"
    """mean or sum over latent dimensions; clip ranges depend on it."""
    eval_steps: int | None = None
    """Steps of the deterministic sampler that the report measures; None: num_inference_steps."""
    call: dict[str, str] = field(default_factory=dict)
    """Other arguments of the pipeline's call: height 512 width 512 negative_prompt blurry."""

    def __post_init__(self) -> None:
        require("eta", self.eta, 0 < self.eta <= 1, "lie in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class AlignConfig(TrainingConfig):
    """Settings of `nextscale align`; `train_batch_size` counts examples (samples, or pairs)."""

    method: str = "grpo"
    """grpo, dpo, raft, b2, dragon, find, fdpg, reg_grpo, nft, diffusion_nft, d2o, sibling, r0 or
    seppo; its settings are in the section of its name."""
    model: str = "scenes"
    """A next-scale model (bundled name, folder, hub id) or a diffusers pipeline (folder or id)."""
    control: str | None = None
    """Tune this control instead of the model: one of the model's by name, a folder of `train
    control`, or new:TYPE, an untrained one. Its maps are made of the pictures of `prompts`, which
    are of images:DATASET."""
    prompts: tuple[str, ...] = ()
    """What is drawn: scenes:standard, scenes:hard, classes, captions:DATASET[@SPLIT],
    images:DATASET[@SPLIT] (for control), examples:DATASET[@SPLIT] (with pictures, for seppo), or
    .txt and .jsonl files, in turns. Empty: those of `pairs`; for control images:scenes, for seppo
    on models of scenes examples:scenes, for class-conditional models classes, else
    scenes:standard."""
    pairs: str | None = None
    """DPO on given pairs instead of rollouts: a .jsonl of {"prompt" or "class_label", "chosen",
    "rejected"}, the last two paths of pictures, relative to the file."""
    reward_funcs: tuple[str, ...] = ()
    """Rewards by name, see docs/align.md; with `pairs` they are only measured."""
    reward_weights: tuple[float, ...] = ()
    """One per reward; empty: all 1."""
    reward_scales: tuple[float, ...] = ()
    """What each raw reward is divided by; empty: 1. Usual: pickscore 26, aesthetic 10, JPEG 500."""
    reward_mode: str = "sum"
    """How several rewards become one: sum, min (the least), majority (of verdicts in [0, 1]), or
    lagrangian: a sum in which rewards weigh more while they are below their threshold."""
    reward_thresholds: tuple[float, ...] = ()
    """lagrangian: one per reward; nan: it is the objective, by its weight."""
    lagrangian_rate: float = 0.1
    """lagrangian: how fast weights follow what is missing at a threshold."""
    http_timeout: float = 60.0
    """Seconds that an http reward waits for an answer."""
    http_retries: int = 3
    """Requests after a failed one; then its pictures are unscorable."""
    held_out_rewards: tuple[str, ...] = ()
    """Rewards that are only watched, at each validation: the run stops when they fall while the
    reward rises."""
    held_out_patience: int = 3
    """Validations in a row after which it stops."""
    trend_p_value: float | None = 0.01
    """Save the model as it was if the reward did not rise: if chance makes such a rise from the
    first fifth of the rollouts to the last half with a higher probability than this (one-sided
    t-test, 20 rollouts or more). The trained weights stay in the checkpoints. None: save them in
    any case."""

    curriculum: str | None = None
    """dump: draw more from those `prompts` sources whose groups differ most in reward, or were
    tried least. None: in turns."""
    curriculum_temperature: float = 0.5
    """dump: of the softmax over sources."""
    num_prompts: int = 16
    """Prompts per rollout, over all processes."""
    num_generations: int = 8
    """Samples per prompt, the group."""
    num_train_prompts: int | None = None
    """Groups of a rollout to train on, those whose rewards differ first; None: all."""
    num_iterations: int = 1
    """Passes over a rollout before the next one."""
    recompute_old_logps: bool | None = None
    """Judge rollouts once more in the precision of training, so that the first ratio is 1; None: if
    that is not float32."""
    rollout_batch_size: int = 64
    """Samples drawn at once per process."""

    guidance_scale: float | None = None
    """Guidance of rollouts; None: the model's default."""
    temperature: float | None = None
    """Temperature of rollouts (next-scale models); None: the model's default."""
    top_k: int = 0
    """Filter of rollouts; 0 is off, as policy gradients need it."""
    top_p: float = 1.0
    """Filter of rollouts; 1.0 is off, as policy gradients need it."""
    logp_space: str = "guided"
    """Which distribution is the policy: guided, conditional or behaviour."""
    train_scales: int | None = None
    """Next-scale models: train only the first so many scales; the later ones are drawn by the model
    as it stands. An update then costs what those cost, but for score=pair of DPO, DRAGON and RAFT
    and for SePPO, which judge all. None: all."""
    diffusion: DiffusionSettings = field(default_factory=DiffusionSettings)
    """How a diffusers pipeline draws rollouts."""

    download: bool = False
    """Fetch the weights of reward models that are nowhere on this machine."""

    lora_rank: int = 0
    """Train a LoRA of this rank instead of all weights; 0 = off."""
    lora_alpha: float | None = None
    """LoRA scale is alpha / rank; None: alpha = rank."""
    lora_target_modules: tuple[str, ...] = ()
    """Layers that get a LoRA; empty: all projections of attention and feed-forward."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, more time."""

    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    """Settings of GRPO."""
    dpo: DPOConfig = field(default_factory=DPOConfig)
    """Settings of DPO."""
    raft: RAFTConfig = field(default_factory=RAFTConfig)
    """Settings of RAFT."""
    b2: B2Config = field(default_factory=B2Config)
    """Settings of B2-DiffuRL."""
    dragon: DRAGONConfig = field(default_factory=DRAGONConfig)
    """Settings of DRAGON."""
    find: FINDConfig = field(default_factory=FINDConfig)
    """Settings of FIND."""
    fdpg: FDPGConfig = field(default_factory=FDPGConfig)
    """Settings of f-DPG."""
    reg_grpo: RegGRPOConfig = field(default_factory=RegGRPOConfig)
    """Settings of Reg-GRPO."""
    nft: NFTConfig = field(default_factory=NFTConfig)
    """Settings of NFT."""
    diffusion_nft: DiffusionNFTConfig = field(default_factory=DiffusionNFTConfig)
    """Settings of DiffusionNFT."""
    d2o: D2OConfig = field(default_factory=D2OConfig)
    """Settings of D2O."""
    r0: R0Config = field(default_factory=R0Config)
    """Settings of R0."""
    sibling: SiblingConfig = field(default_factory=SiblingConfig)
    """Settings of Sibling-GRPO."""
    seppo: SePPOConfig = field(default_factory=SePPOConfig)
    """Settings of SePPO."""

    eval_prompts: tuple[str, ...] = ()
    """What the report draws before and after, with equal seeds. Empty: benchmark:standard for
    models with the scenes grammar, else `prompts`; and always `prompts` for a table of starts."""
    num_eval_prompts: int = 100
    """Prompts of the report, the first of each source; 0: no report."""
    num_eval_images: int = 4
    """Pictures per prompt of the report."""
    num_validation_prompts: int = 32
    """Prompts that a validation draws, one picture each; 0 = off. They are held out of sources of
    twenty times as many texts or more, and are some of the training prompts otherwise."""
    eval_reference: str | None = None
    """True pictures for the report's Fréchet distance: a folder or .npz, or scenes; None: scenes
    for models with its grammar, else none."""
    eval_features: str | None = None
    """Network of the report's Fréchet distance and diversity: scenes-features, a folder of `train
    features`, or inception (its weights are looked for as `nextscale eval` does); None:
    scenes-features for models with the scenes grammar, else none."""

    checkpointing_steps: int | None = 1000
    """Steps between checkpoints, rounded up to whole rollouts; None: only the last one."""
    learning_rate: float = 1e-5
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Weight decay at the first step."""
    max_grad_norm: float | None = 1.0
    """Clip the global gradient norm; None: off."""
    use_ema: bool = False
    """Keep an exponential moving average of the weights, which is then the result."""
    adam_beta2: float = 0.99
    """AdamW's decay of the squared gradient mean."""

    def __post_init__(self) -> None:
        super().__post_init__()
        known = self.method in METHOD_NAMES
        require("method", self.method, known, f"be one of {', '.join(METHOD_NAMES)}")
        modes = (*MODES, "lagrangian")
        known = self.reward_mode in modes
        require("reward_mode", self.reward_mode, known, f"be one of {', '.join(modes)}")
        if self.reward_thresholds and self.reward_mode != "lagrangian":
            raise UserError("reward_thresholds are for reward_mode lagrangian")
        require("curriculum", self.curriculum, self.curriculum in (None, "dump"), "be dump or None")
        require("http_timeout", self.http_timeout, self.http_timeout > 0, "be above 0")
        require("http_retries", self.http_retries, self.http_retries >= 0, "be 0 or more")
        summed = self.grpo.multi_objective_aggregation == "sum_then_normalize"
        if self.method == "grpo" and self.reward_mode != "sum" and not summed:
            raise UserError(
                f"reward_mode {self.reward_mode} makes one reward of all, so "
                "grpo.multi_objective_aggregation must be sum_then_normalize"
            )
        if self.method == "find" and self.lora_rank:
            raise UserError("find trains the start, not the generator: leave lora_rank out")
        if self.method == "find" and self.train_scales is not None:
            raise UserError("find trains the start: leave train_scales out, see find.prefix_scales")
        if self.method == "dragon" and self.reward_mode != "sum":
            raise UserError(f"reward_mode {self.reward_mode}: DRAGON takes the weighted sum")
        p_value = self.trend_p_value
        fits = p_value is None or 0 < p_value < 1
        require("trend_p_value", p_value, fits, "lie in (0, 1), or be None")
        positive = (
            *("num_prompts", "num_generations", "num_iterations", "rollout_batch_size"),
            *("num_train_prompts", "num_eval_images", "held_out_patience"),
        )
        for name in positive:
            value = getattr(self, name)
            require(name, value, value is None or value > 0, "be above 0")
        for name in ("num_eval_prompts", "num_validation_prompts", "lora_rank"):
            require(name, getattr(self, name), getattr(self, name) >= 0, "be 0 or more")
        if self.held_out_rewards and not self.num_validation_prompts:
            raise UserError(
                "held_out_rewards are watched at validations, and num_validation_prompts is 0"
            )
        if self.num_generations < 2 and self.pairs is None:
            raise UserError(
                f"num_generations is {self.num_generations}: a group of one has nothing to be "
                "compared with. Use 2 or more, 8 is usual"
            )
        for name in ("pairs", "lora_rank"):
            if self.control is not None and getattr(self, name):
                raise UserError(f"a control is tuned by rollouts, whole: leave {name} out")
        if self.control is not None and self.method == "seppo":
            raise UserError("seppo learns from given pictures, not from maps: leave control out")
        if self.control is not None and self.method == "find":
            raise UserError("find trains the start, not a control: leave control out")
        if self.pairs is not None and self.method != "dpo":
            raise UserError(f"pairs are for method dpo, not {self.method}")
        most = self.num_train_prompts or self.num_prompts
        limit = f"be at most num_prompts {self.num_prompts}"
        require("num_train_prompts", most, most <= self.num_prompts, limit)
