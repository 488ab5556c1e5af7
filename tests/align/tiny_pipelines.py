"""Pipelines of diffusers' own classes, tiny, random, and without any download."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers as typed_diffusers
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

# Its annotations do not know what its pipelines take.
diffusers: Any = typed_diffusers

WORDS = ("<pad>", "<s>", "</s>", "<unk>", "a", "red", "blue", "green", "circle", "square")
PROMPTS = ("a red circle", "a blue square", "green", "a green square")
PIXELS, WIDTH = 16, 16


def tokenizer(length: int = 8) -> PreTrainedTokenizerFast:
    """A word-level tokenizer that knows `WORDS`."""
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    inner.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=length, **special)


def clip(projection: bool = False) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(WORDS),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=1,
        eos_token_id=2,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def t5() -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(WORDS), d_model=WIDTH, d_kv=8, d_ff=WIDTH, num_layers=1, num_heads=2
    )
    return T5EncoderModel(config).eval()


def vae(**changes: Any) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=PIXELS,
        **changes,
    ).eval()


def unet(**changes: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=changes.pop("cross_attention_dim", WIDTH),
        attention_head_dim=8,
        norm_num_groups=4,
        **changes,
    ).eval()


def ddim(**changes: Any) -> Any:
    known: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
    known |= {"beta_schedule": "scaled_linear", "set_alpha_to_one": False, "steps_offset": 1}
    return diffusers.DDIMScheduler(**{**known, **changes})


def stable_diffusion(**changes: Any) -> Any:
    return diffusers.StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip(),
        tokenizer=tokenizer(),
        unet=unet(),
        scheduler=ddim(**changes),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl() -> Any:
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    size = {"projection_class_embeddings_input_dim": 6 * 8 + WIDTH}
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=clip(),
        text_encoder_2=clip(projection=True),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=unet(cross_attention_dim=2 * WIDTH, **added, **size),
        scheduler=ddim(),
        add_watermarker=False,
    )


def dit() -> Any:
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=8,
        num_embeds_ada_norm=1000,
        norm_num_groups=4,
    )
    names = {0: "tench", 1: "goldfish", 2: "shark"}
    return diffusers.DiTPipeline(transformer.eval(), vae(), ddim(), id2label=names)


def pixart() -> Any:
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=8,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        norm_num_groups=4,
    )
    return diffusers.PixArtAlphaPipeline(tokenizer(), t5(), vae(), transformer.eval(), ddim())


def sd3(**changes: Any) -> Any:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH,
        out_channels=4,
        pos_embed_max_size=8,
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **changes}),
        vae=vae(shift_factor=0.1),
        text_encoder=clip(projection=True),
        tokenizer=tokenizer(),
        text_encoder_2=clip(projection=True),
        tokenizer_2=tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )


def flux() -> Any:
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae(shift_factor=0.1),
        text_encoder=clip(),
        tokenizer=tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=tokenizer(),
        transformer=transformer.eval(),
    )


SIZE = {"height": PIXELS, "width": PIXELS}
FAMILIES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "sd": (stable_diffusion, {"guidance_scale": 5.0, "call": SIZE}),
    "sd-unguided": (stable_diffusion, {"guidance_scale": 1.0, "call": SIZE}),
    "sdxl": (sdxl, {"guidance_scale": 5.0, "call": SIZE | {"negative_prompt": "green"}}),
    "dit": (dit, {"guidance_scale": 4.0}),
    "pixart": (
        pixart,
        {
            "guidance_scale": 3.0,
            "call": SIZE
            | {
                "use_resolution_binning": False,
                "clean_caption": False,
                "max_sequence_length": 8,
            },
        },
    ),
    "sd3": (sd3, {"guidance_scale": 4.0, "call": SIZE}),
    "flux": (flux, {"guidance_scale": 3.5, "call": SIZE | {"max_sequence_length": 8}}),
    "flux-guided": (
        flux,
        {
            "call": SIZE
            | {
                "max_sequence_length": 8,
                "true_cfg_scale": 2.0,
                "negative_prompt": "blue",
            },
        },
    ),
}
"""Name -> how to build the pipeline, and arguments for a policy of it."""


def build(name: str) -> tuple[Any, dict[str, Any]]:
    """A pipeline of `FAMILIES`, random but the same each time, and arguments for its policy."""
    factory, settings = FAMILIES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = factory()
        network = pipe.transformer if hasattr(pipe, "transformer") else pipe.unet
        for parameter in network.parameters():  # no zero-initialised gate may hide a mistake
            torch.nn.init.normal_(parameter, std=0.2)
    return pipe, dict(settings)
