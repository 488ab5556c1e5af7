"""Spatial conditions: control maps and the modules that follow them."""

from nextscale.control.adapter import AdapterConfig, AdapterControl
from nextscale.control.additive import AdditiveConfig, AdditiveControl
from nextscale.control.attach import Control, ControlHooks, attach
from nextscale.control.conditions import Extractor, label_colours, open_extractor
from nextscale.control.module import ControlModule, ControlRecord
from nextscale.control.registry import build_control, find_control, read_control
from nextscale.control.side_network import SideNetworkConfig, SideNetworkControl

__all__ = [
    "AdapterConfig",
    "AdapterControl",
    "AdditiveConfig",
    "AdditiveControl",
    "Control",
    "ControlHooks",
    "ControlModule",
    "ControlRecord",
    "Extractor",
    "SideNetworkConfig",
    "SideNetworkControl",
    "attach",
    "build_control",
    "find_control",
    "label_colours",
    "open_extractor",
    "read_control",
]
