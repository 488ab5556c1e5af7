"""The frozen network that KL terms and preference losses compare a policy with."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Protocol

from torch import nn

from nextscale.errors import UserError


class Reference(Protocol):
    """Gives the reference network for as long as a `with` block lasts."""

    def use(self, network: nn.Module) -> contextlib.AbstractContextManager[nn.Module]:
        """The reference of a policy's (unwrapped) network."""
        ...


class Given:
    """Another network of the same kind.

    Args:
        module: The network; it is frozen.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module.requires_grad_(False).eval()

    @contextlib.contextmanager
    def use(self, network: nn.Module) -> Iterator[nn.Module]:
        """The other network."""
        yield self.module


class FrozenCopy(Given):
    """A copy of the weights as they are now; needed when all weights are trained.

    Args:
        network: What is copied; a training loop has to place the copy, `module`.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__(copy.deepcopy(network))


class AdapterOff:
    """The network itself with its LoRA switched off: no second copy in memory."""

    @contextlib.contextmanager
    def use(self, network: nn.Module) -> Iterator[nn.Module]:
        """The network without its adapters, until the block ends."""
        layers = _adapters(network)
        states = [layer.disable_adapters for layer in layers]
        try:
            for layer in layers:
                layer._disable_adapters = True
            yield network
        finally:
            for layer, off in zip(layers, states, strict=True):
                layer._disable_adapters = off


class NamedAdapter:
    """The network with another of its LoRAs switched on, such as an earlier state of itself.

    Args:
        name: Of the adapter.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    @contextlib.contextmanager
    def use(self, network: nn.Module) -> Iterator[nn.Module]:
        """The network with this adapter, until the block ends."""
        layers = _adapters(network)
        if not any(self.name in layer.lora_A for layer in layers):
            raise UserError(f'the network has no adapter "{self.name}"')
        states = [list(layer.active_adapters) for layer in layers]
        try:
            for layer in layers:
                layer._active_adapter = [self.name]
            yield network
        finally:
            for layer, active in zip(layers, states, strict=True):
                layer._active_adapter = active


def _adapters(network: nn.Module) -> list:
    from peft.tuners.lora import LoraLayer

    layers = [module for module in network.modules() if isinstance(module, LoraLayer)]
    if not layers:
        raise UserError("the network has no LoRA to compare with; train one, or use a frozen copy")
    return layers
