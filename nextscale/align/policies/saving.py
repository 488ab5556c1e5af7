"""Diffusion pipelines and their LoRAs on disk, in diffusers' own formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nextscale.align.policies.pipeline_calls import PipelineCalls
from nextscale.errors import UserError


def save_diffusion(pipe: Any, folder: str | Path, *, lora: bool, adapter: str = "default") -> None:
    """Write a pipeline, or the LoRA of its denoiser, so that diffusers alone can load it.

    Args:
        pipe: The pipeline.
        folder: Made if need be; for `from_pretrained`, or `load_lora_weights` on the base pipeline.
        lora: Only the LoRA.
        adapter: Its name.

    Raises:
        UserError: If the pipeline's class has no LoRA format, or the denoiser no such LoRA.
    """
    if not lora:
        pipe.save_pretrained(folder)
        return
    if not hasattr(pipe, "save_lora_weights"):
        raise UserError(
            f"diffusers has no LoRA format for {type(pipe).__name__}; save the whole pipeline"
        )
    network = PipelineCalls(pipe, {}).network
    if adapter not in getattr(network, "peft_config", {}):
        raise UserError(f'the network has no adapter "{adapter}" to save')
    from peft import get_peft_model_state_dict

    part = "unet" if network is getattr(pipe, "unet", None) else "transformer"
    layers = get_peft_model_state_dict(network, adapter_name=adapter)
    metadata = network.peft_config[adapter].to_dict()
    arguments = {f"{part}_lora_layers": layers, f"{part}_lora_adapter_metadata": metadata}
    pipe.save_lora_weights(folder, **arguments)
