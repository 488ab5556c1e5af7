"""Images <-> tokens on a schedule of scales."""

from nextscale.tokenizers.quantizer import MultiscaleQuantizer, phi_index
from nextscale.tokenizers.schedule import ScaleSchedule
from nextscale.tokenizers.tokenizer import MultiscaleVQ, TokenizerConfig

__all__ = ["MultiscaleQuantizer", "MultiscaleVQ", "ScaleSchedule", "TokenizerConfig", "phi_index"]
