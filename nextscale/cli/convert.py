"""`nextscale convert`: released VAR checkpoints -> a model folder, and back."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from nextscale import storage
from nextscale.cli.console import Output, check_folder
from nextscale.cli.flags import parse
from nextscale.cli.recipes import to_yaml
from nextscale.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

GUIDANCE = "the official cfg=1.5 is --guidance_scale 2.5"
ABOUT = (
    "Convert released VAR checkpoints to a model folder, or a class-conditional model folder back "
    f"to the released names. Note: {GUIDANCE}."
)
EXAMPLE = (
    "nextscale convert --from official --transformer var_d16.pth --tokenizer "
    "vae_ch160v4096z32.pth --output_dir var-d16\n  "
    "nextscale convert --to official --model var-d16 --output_dir released"
)


_ENDS = (".pth", ".safetensors")
OWN_FILES = {name + end for name in ("transformer", "tokenizer") for end in _ENDS}


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Flags of `nextscale convert`."""

    output_dir: str
    """Folder of the result."""
    source: Annotated[Literal["official"] | None, tyro.conf.arg(name="from")] = None
    """Format of the files that are read."""
    to: Literal["official"] | None = None
    """Format of the files that are written: transformer.safetensors and tokenizer.safetensors
    under the released names."""
    transformer: str | None = None
    """var_d16.pth or the like (--from official)."""
    tokenizer: str | None = None
    """vae_ch160v4096z32.pth (--from official)."""
    scales: tuple[int, ...] = ()
    """Sides of the token maps, if the number of positions does not tell them."""
    num_heads: int | None = None
    """Attention heads, for files without a scale per head; None: the depth."""
    model: str | None = None
    """Model folder or name (--to official)."""
    pth: bool = False
    """Write .pth files, as the released code reads them, in place of safetensors."""
    overwrite: bool = False
    """Replace the model or the converted files in output_dir."""

    def __post_init__(self) -> None:
        if (self.source is None) == (self.to is None):
            raise UserError("pass exactly one of --from official and --to official.")
        if self.source and not (self.transformer and self.tokenizer):
            raise UserError("--from official needs --transformer FILE and --tokenizer FILE.")
        if self.to and not self.model:
            raise UserError("--to official needs --model FOLDER.")


def run(command: str, arguments: list[str]) -> int:
    """Convert and say where the result is."""
    config, output = parse(command, ConvertConfig, arguments, about=ABOUT, example=EXAMPLE)
    if output.print_config:
        values = {"from" if k == "source" else k: v for k, v in asdict(config).items()}
        print(to_yaml(command, values), end="")
        return 0
    folder = Path(config.output_dir)
    present = {f.name for f in folder.iterdir()} if folder.is_dir() else set()
    ours = storage.MODEL_INDEX in present or present <= OWN_FILES
    hint = "Choose another folder" + (", or --overwrite." if ours else ".")
    check_folder(folder, empty=not (config.overwrite and ours), hint=hint)
    if output.bar():
        output.note("reading and converting the files")
    if config.source:
        _from_official(config, folder, output)
    else:
        _to_official(config, folder, output)
    return 0


def _from_official(config: ConvertConfig, folder: Path, output: Output) -> None:
    from nextscale.pipeline import NextScalePipeline

    assert config.transformer is not None
    assert config.tokenizer is not None
    pipe = NextScalePipeline.from_official(
        transformer=config.transformer,
        tokenizer=config.tokenizer,
        scales=config.scales or None,
        num_heads=config.num_heads,
        device="cpu",
        dtype="float32",
    )
    pipe.save_pretrained(folder)
    shape = pipe.transformer.config
    classes = getattr(pipe.transformer.conditioner, "num_classes", 0)
    example = '"golden retriever"' if classes == 1000 else "0"
    output.figures(
        {
            "model": str(folder),
            "depth": shape.depth,
            "width": shape.resolved_width,
            "scales": pipe.transformer.schedule.to_list(),
            "guidance_scale": pipe.generation.guidance_scale,
        },
        f"model in {folder}: depth {shape.depth}, scales {pipe.transformer.schedule}\n"
        f"its default guidance_scale is {pipe.generation.guidance_scale}; {GUIDANCE}\n"
        f"try: nextscale generate --model {folder} --class_labels {example}",
    )


def _to_official(config: ConvertConfig, folder: Path, output: Output) -> None:
    from nextscale.pipeline import NextScalePipeline
    from nextscale.tokenizers.official import to_official as tokenizer_state
    from nextscale.var.official import to_official as transformer_state

    assert config.model is not None
    pipe = NextScalePipeline.from_pretrained(config.model, device="cpu", dtype="float32")
    states = {
        "transformer": transformer_state(pipe.transformer),
        "tokenizer": tokenizer_state(pipe.tokenizer),
    }
    written = {}
    scales = str(pipe.transformer.schedule)
    with storage.replace_folder(folder) as target:
        for name, state in states.items():
            file = f"{name}{'.pth' if config.pth else '.safetensors'}"
            _write(target / file, state)
            written[name] = str(folder / file)
    output.figures(
        written,
        "\n".join(f"{k}: {v}" for k, v in written.items())
        + f"\n{GUIDANCE}\nto read it back: --from official --scales {scales}",
    )


def _write(path: Path, state: dict[str, Tensor]) -> None:
    if path.suffix == ".safetensors":
        storage.write_tensors(path, state)
        return
    import io

    import torch

    buffer = io.BytesIO()  # torch.save itself does not say that a disk is full
    torch.save({name: tensor.clone() for name, tensor in state.items()}, buffer)
    storage.write_bytes(path, buffer.getvalue())
