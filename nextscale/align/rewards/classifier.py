"""A classifier's log-probability of the wanted class: the reward of class-conditional models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from nextscale import storage
from nextscale.align.rewards.reward import CheckedReward, Prompts, as_reward
from nextscale.errors import UserError, missing_extra
from nextscale.eval.weights import HubFile, find_weights

Classifier = Callable[[Float[Tensor, "b 3 h w"]], Float[Tensor, "b n"]]
"""Pictures in [0, 1] -> logits of n classes."""


def classifier_reward(classifier: Classifier, name: str = "classifier") -> CheckedReward:
    """Log p(class | picture), natural logarithm, 0 or less; the class labels are the prompts.

    The reward of CTRL (arXiv 2406.12120) without its weight. It is differentiable if the
    classifier is.

    Args:
        classifier: Pictures -> logits.
        name: What to call it.
    """

    def log_probability(images: Float[Tensor, "b 3 h w"], prompts: Prompts) -> Tensor:
        logits = classifier(images).float()
        wanted = torch.tensor(_labels(prompts, logits.shape[-1], name), device=logits.device)
        return logits.log_softmax(dim=-1).gather(1, wanted[:, None])[:, 0]

    bounds = (-float("inf"), 0.0)
    return as_reward(log_probability, name, range=bounds, differentiable=True)


def timm_classifier(
    name: str,
    path: str | None = None,
    *,
    device: torch.device | str = "cpu",
    download: bool = False,
) -> Classifier:
    """One of timm's classifiers, as a function of pictures in [0, 1].

    Pictures are resized whole to the network's size by torch's antialiased bicubic filter; timm's
    own preparation takes a centre crop of a larger one.

    Args:
        name: In timm's list, with or without tag: "resnet50" or "resnet50.a1_in1k".
        path: File of the weights, of any number of classes; None: NEXTSCALE_CLASSIFIER, the hub's
            cache, and the hub if `download`.
        device: Where to run.
        download: Fetch the weights if they are nowhere.

    Raises:
        UserError: For a name that is not in the list, and with exit code 1 for weights that are
            not there or do not fit.
    """
    try:
        import timm
        from timm.data.config import resolve_model_data_config
    except ImportError as error:
        raise missing_extra('the reward "classifier" needs timm', "align") from error
    try:
        network: Any = timm.create_model(name)
    except RuntimeError as error:
        raise UserError(f'timm has no model "{name}": {error}') from error
    repo = network.pretrained_cfg.get("hf_hub_id")
    if repo is None and path is None:
        raise UserError(f"timm knows no hub weights of {name}; pass classifier:{name}@FILE")
    how = f"classifier:{name}@FILE"
    file = HubFile(repo or "", "model.safetensors", "NEXTSCALE_CLASSIFIER", how)
    found = find_weights(file, path, download=download)
    tensors = found.suffix == ".safetensors"
    state: Any = storage.read_tensors(found) if tensors else storage.read_pickle(found)
    if not isinstance(state, dict):
        raise UserError(f"{found} holds no weights by name")
    head = network.pretrained_cfg.get("classifier")
    own = state.get(f"{head}.weight") if isinstance(head, str) else None
    if own is not None and len(own) != network.num_classes:
        network.reset_classifier(len(own))  # trained on a world of one's own
    storage.load_state(network, state, found)
    return _prepared(network, resolve_model_data_config(network), device)


def _prepared(network: nn.Module, settings: dict[str, Any], device: Any) -> Classifier:
    network = network.eval().requires_grad_(False).to(device)
    mean, std = (
        torch.tensor(settings[key], device=device)[:, None, None] for key in ("mean", "std")
    )

    def classify(images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n"]:
        images = functional.interpolate(
            images.to(device).float(),
            size=settings["input_size"][1:],
            mode="bicubic",
            antialias=True,
        )
        return network((images.clamp(0, 1) - mean) / std)

    return classify


def _labels(prompts: Prompts, num_classes: int, name: str) -> list[int]:
    for prompt in prompts:
        if isinstance(prompt, str) or not 0 <= prompt < num_classes:
            raise UserError(
                f'the reward "{name}" needs class labels in [0, {num_classes}) as prompts, got '
                f"{prompt!r}"
            )
    return [int(prompt) for prompt in prompts]
