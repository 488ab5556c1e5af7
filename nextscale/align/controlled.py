"""A control module as what is tuned: its base draws under it and stays as it is.

An untrained module (`--control new:TYPE`) with GRPO, the agreement with its map as reward and the
KL to the base is CTRL (arXiv 2406.12120) for next-scale models. Differences from the paper: policy
gradients, not the gradient through the sampler; how well a map is followed, not the likelihood of a
classifier; diffusion is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from nextscale.align.config import AlignConfig
from nextscale.align.models import NextScaleModel
from nextscale.align.policies.next_scale import NextScalePolicy
from nextscale.align.prompts import Condition, Controlled, map_cache
from nextscale.align.trajectory import Policy
from nextscale.control import (
    AdditiveConfig,
    Control,
    ControlHooks,
    ControlModule,
    ControlRecord,
    attach,
    build_control,
    open_extractor,
)
from nextscale.control.train import ControlledTransformer
from nextscale.data.images import to_uint8
from nextscale.errors import UserError
from nextscale.pipeline import NextScalePipeline
from nextscale.streams import stream
from nextscale.var.lora import base_fingerprint

_NEW = "new:"


class ControlledPolicy(NextScalePolicy):
    """A pipeline under a control module as a policy; the module is what is trained.

    Rows of `encode` are {"ids", "maps"}: prompts or labels, and control maps as uint8
    [b, 3, H, W]. The null rows of guidance are without control, as the pipeline draws.

    Args:
        pipeline: The base.
        module: Its control.
        options: As `NextScalePolicy` takes them.

    Raises:
        UserError: For guidance of control apart, or control on both sides.
    """

    def __init__(self, pipeline: NextScalePipeline, module: ControlModule, **options: Any) -> None:
        super().__init__(pipeline, **options)
        if self.settings.control_in_negative or self.settings.control_guidance_scale is not None:
            raise UserError(
                "rollouts under control have one guidance; set the model's control_guidance_scale "
                "to None and control_in_negative to false"
            )
        self.controlled = ControlledTransformer(self.model, module)
        self.extractor = module.record.open_extractor()
        self.map_of = map_cache(self.extractor)

    @property
    def network(self) -> ControlledTransformer:
        """Base and module."""
        return self.controlled

    def encode(self, conditions: Sequence[Any]) -> dict[str, Tensor]:
        """Ids and maps of `Controlled` conditions, one row each."""
        ids = super().encode([condition.condition for condition in checked(conditions)])
        side = self.controlled.control.record.resolution[0]
        maps = np.stack([self.map_of(condition.picture, side) for condition in conditions])
        return {"ids": ids, "maps": to_uint8(torch.from_numpy(maps)).to(ids.device)}

    def conditioned(self, conditions: dict[str, Tensor]) -> dict[str, Any]:
        """See `NextScalePolicy`."""
        module = self.controlled.control
        control = Control(image=None, type=module.record.type)
        part = attach(module, as_float(conditions["maps"]), control)
        hooks = ControlHooks(self.model, [part], cached=True)
        return {"condition": self.model.condition(conditions["ids"]), "hooks": hooks}

    def forward(
        self,
        network: nn.Module,
        inputs: Tensor,
        conditions: dict[str, Tensor],
        num_scales: int,
        *,
        null: bool,
    ) -> Float[Tensor, "r u v"]:
        """See `NextScalePolicy`."""
        ids, maps = conditions["ids"], as_float(conditions["maps"])
        keep = torch.ones(len(ids), dtype=torch.bool)
        if null:
            ids = torch.cat([ids, self.model.conditioner.null(len(ids)).to(ids)])
            inputs = inputs.repeat(2, 1, 1)
        return network(inputs, ids, maps, keep, num_scales)


class ControlledModel(NextScaleModel):
    """A next-scale pipeline under one of its controls; see `AlignModel`."""

    def __init__(self, config: AlignConfig, device: torch.device) -> None:
        super().__init__(config, device)
        assert config.control is not None
        self.pipe.transformer.requires_grad_(False)
        kind = config.control.removeprefix(_NEW)
        if kind != config.control:
            self.name = kind.partition(":")[0]
            self.pipe.add_control(_untrained(self.pipe, kind, config.seed), self.name)
        else:
            known = config.control in self.pipe.controls
            self.name = config.control if known else self.pipe.load_control(config.control)
        module = self.pipe.control(self.name).requires_grad_(True)
        policy = ControlledPolicy(self.pipe, module, **self.options)
        self.policy: Policy = policy
        self.extractor = policy.extractor

    def check(self, conditions: Sequence[Condition]) -> None:
        """A caption outside of the grammar, a prompt without a picture; see `AlignModel`."""
        plain = [condition.condition for condition in checked(conditions)]
        self.pipe.transformer.conditioner.tokenize(plain)

    def fingerprint(self) -> str:
        """Of base and module; see `AlignModel`."""
        return base_fingerprint(self.policy.network)

    def draw(
        self,
        network: nn.Module | None,
        conditions: Sequence[Condition],
        seeds: Sequence[int],
        start: Tensor | None = None,
    ) -> Float[Tensor, "b 3 H W"]:
        """With the model's own generation settings, at strength 1; see `AlignModel`."""
        drawn_by: Any = self.policy.network if network is None else network
        pipe = NextScalePipeline(self.pipe.tokenizer, drawn_by.transformer, self.pipe.generation)
        pipe.add_control(drawn_by.control, self.name)
        given = checked(conditions)
        maps: Any = self.policy.encode(given)["maps"]
        plain: Any = [condition.condition for condition in given]
        by_class = self.num_classes is not None
        with torch.autocast(pipe.device.type, torch.bfloat16, enabled=self.half):
            return pipe(
                prompt=None if by_class else plain,
                class_labels=plain if by_class else None,
                control_image=as_float(maps).cpu(),
                control_type=self.name,
                seed=list(seeds),
                batch_size=self.config.rollout_batch_size,
                output_type="pt",
            ).images

    def save(self, network: nn.Module, folder: Path) -> None:
        """The module alone; see `AlignModel`."""
        trained: Any = network
        trained.control.save_pretrained(folder)


def _untrained(pipe: NextScalePipeline, kind: str, seed: int) -> ControlModule:
    """Additive control of a type that the model does not have; it adds nothing yet.

    A new condition by reward and KL alone is CTRL (arXiv 2406.12120): the KL of `grpo.beta` is to
    the base, which the module begins as, and the reward says how probable the condition is, by
    whoever reads it back. Here a prompt and its map come from one picture, where CTRL pairs any.
    """
    extractor = open_extractor(kind)
    record = ControlRecord(
        type=extractor.type,
        resolution=pipe.tokenizer.resolution,
        base_fingerprint=base_fingerprint(pipe.transformer),
        extractor=extractor.record(),
    )
    with torch.random.fork_rng():
        torch.manual_seed(stream(seed).initial_seed())
        base = pipe.transformer.config
        module = build_control(AdditiveConfig(num_sites=min(3, base.depth)), base, record)
    return module.to(pipe.device)


def checked(conditions: Sequence[Any]) -> list[Controlled]:
    """Conditions that must have a control picture.

    Raises:
        UserError: If one has none.
    """
    for condition in conditions:
        if not isinstance(condition, Controlled):
            raise UserError(
                f'a control is tuned on prompts with pictures, and "{condition}" has none: use '
                "prompts and eval_prompts such as images:scenes and images:scenes@validation"
            )
    return list(conditions)


def as_float(maps: UInt8[Tensor, "b 3 H W"]) -> Float[Tensor, "b 3 H W"]:
    """Maps in [0, 1]."""
    return maps.float() / 255
