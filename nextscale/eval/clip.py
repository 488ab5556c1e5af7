"""CLIP by open_clip: pictures and prompts to unit vectors; a small one is bundled."""

from __future__ import annotations

import difflib
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn

from nextscale import storage
from nextscale.data.images import to_uint8
from nextscale.errors import UserError, missing_extra
from nextscale.eval.features import exact_convolutions
from nextscale.eval.scorers import Scorer
from nextscale.eval.weights import HubFile, find_weights

CONFIG = "open_clip_config.json"  # the names of open_clip's own model folders
WEIGHTS = "open_clip_model.safetensors"
FORMAT_VERSION = 1
BUNDLED = "scenes-clip"
_PAD, _UNKNOWN, _FIRST = 0, 1, 2


class Vocabulary:
    """CLIP's byte-pair tokens, of which a small model embeds only those that it met in training.

    All other tokens share one row. Rows keep the order of the tokens, so that the end symbol stays
    the highest number of a text, where open_clip's text tower reads its output.

    Args:
        context_length: Tokens per text, start and end included; longer texts are cut.
        tokens: Byte-pair tokens with a row of their own; None: all 49408, as released models.
    """

    def __init__(self, context_length: int, tokens: Sequence[int] | None = None) -> None:
        self.tokenizer = _open_clip().SimpleTokenizer(context_length=context_length)
        self.tokens = None if tokens is None else sorted(tokens)
        self.size = self.tokenizer.vocab_size
        if self.tokens is not None:
            self._rows = torch.full((self.tokenizer.vocab_size,), _UNKNOWN)
            self._rows[torch.tensor(self.tokens)] = torch.arange(len(self.tokens)) + _FIRST
            self.size = len(self.tokens) + _FIRST

    @classmethod
    def of(cls, texts: Sequence[str], context_length: int) -> Vocabulary:
        """The tokens of these texts."""
        tokenizer = _open_clip().SimpleTokenizer(context_length=context_length)
        met = {token for text in set(texts) for token in tokenizer.encode(text)}
        return cls(context_length, [*met, *tokenizer.all_special_ids])

    def __call__(self, texts: Sequence[str]) -> Int[Tensor, "b s"]:
        """Rows of the embedding, padded with 0."""
        ids = self.tokenizer(list(texts))
        if self.tokens is None:
            return ids
        rows = self._rows[ids]
        rows[ids == 0] = _PAD  # only the padding: "!", token 0, has no row of its own
        return rows

    def cut(self, texts: Sequence[str]) -> int:
        """How many texts are longer than the model reads."""
        room = self.tokenizer.context_length - 2
        return sum(len(self.tokenizer.encode(text)) > room for text in texts)


class Clip:
    """An open_clip model with its preprocessing and tokenizer.

    Args:
        model: The network.
        vocabulary: Its tokenizer.
        preprocess: Keywords of open_clip's image_transform: size, mean, std, interpolation,
            resize_mode.
        name: What to call it.
        device: Where to run.
    """

    def __init__(
        self,
        model: nn.Module,
        vocabulary: Vocabulary,
        preprocess: Mapping[str, Any],
        name: str,
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        self.name, self.device, self.vocabulary = name, torch.device(device), vocabulary
        self.sha256 = storage.fingerprint(model.state_dict())
        self.model: Any = model.eval().to(self.device)
        keywords = dict(preprocess)
        self.size = int(keywords.pop("size"))
        self.dim = int(self.model.text_projection.shape[-1])
        self._transform: Any = _open_clip().image_transform(self.size, is_train=False, **keywords)

    @torch.inference_mode()
    def images(self, pictures: Sequence[np.ndarray]) -> Float[Tensor, "b d"]:
        """Unit vectors of uint8 RGB pictures [h, w, 3], on the CPU."""
        from PIL import Image

        batch = torch.stack([self._transform(Image.fromarray(p)) for p in pictures])
        with exact_convolutions():
            return self.model.encode_image(batch.to(self.device), normalize=True).float().cpu()

    @torch.inference_mode()
    def texts(self, prompts: Sequence[str]) -> Float[Tensor, "b d"]:
        """Unit vectors of prompts, on the CPU; equal prompts are encoded once."""
        different = list(dict.fromkeys(prompts))
        place = {prompt: i for i, prompt in enumerate(different)}
        parts = [
            self.model.encode_text(self.vocabulary(different[i : i + 256]).to(self.device), True)
            for i in range(0, len(different), 256)
        ]
        return torch.cat(parts).float().cpu()[[place[prompt] for prompt in prompts]]

    def fingerprint(self) -> dict[str, str]:
        """What two sets of features must share to be compared."""
        return {"model": self.name, "weights": self.sha256, "pixels": str(self.size)}


def save_clip(
    model: nn.Module, vocabulary: Vocabulary, settings: Mapping[str, Any], folder: str | Path
) -> None:
    """Write a model folder that open_clip reads as "local-dir:FOLDER"; weights in float16.

    Args:
        model: `open_clip.CLIP`.
        vocabulary: Its tokenizer.
        settings: "model_cfg" and "preprocess_cfg" of open_clip.
        folder: Where to; made if need be.
    """
    folder = Path(folder)
    with storage.os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.half() for name, tensor in model.state_dict().items()}
    storage.write_tensors(folder / WEIGHTS, state)
    about = {"format_version": FORMAT_VERSION, "tokens": vocabulary.tokens}
    storage.write_json(folder / CONFIG, {**settings, "nextscale": about})


def load_clip(folder: str | Path, *, device: torch.device | str = "cpu") -> Clip:
    """Read an open_clip model folder: the bundled one, ours, or one that open_clip wrote.

    Raises:
        UserError: If it is none.
    """
    folder = Path(folder)
    config = storage.read_json(folder / CONFIG)
    try:
        shape, preprocess = config["model_cfg"], dict(config["preprocess_cfg"])
        about = config.get("nextscale", {})
        context = shape["text_cfg"].get("context_length", 77)
        size = preprocess.pop("size", None) or shape["vision_cfg"]["image_size"]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / CONFIG} describes no CLIP model: {error} is missing") from error
    size = size if isinstance(size, int) else size[-1]
    model = _open_clip().CLIP(**shape)
    state = storage.read_tensors(folder / WEIGHTS)
    storage.load_state(model, {name: t.float() for name, t in state.items()}, folder)
    keep = ("mean", "std", "interpolation", "resize_mode", "fill_color")
    preprocess = {key: preprocess[key] for key in keep if key in preprocess}
    vocabulary = Vocabulary(context, about.get("tokens"))
    name = folder.name if folder.parent == storage.ASSETS else storage.short_name(folder)
    return Clip(model, vocabulary, {"size": size, **preprocess}, name, device=device)


def load_released(
    name: str,
    path: str | None = None,
    *,
    device: torch.device | str = "cpu",
    download: bool = False,
) -> Clip:
    """Load a model of open_clip's list, such as "ViT-B-32-quickgelu" or "ViT-L-14:dfn2b".

    Args:
        name: ARCHITECTURE or ARCHITECTURE:WEIGHTS; the default weights are OpenAI's.
        path: File of the weights; None: NEXTSCALE_CLIP, the hub's cache, and the hub if `download`.
        device: Where to run.
        download: Fetch the weights if they are nowhere.

    Raises:
        UserError: For a name that is not in the list, and with exit code 1 for weights that are
            not there.
    """
    open_clip = _open_clip()
    architecture, _, tag = name.partition(":")
    tag = tag or "openai"
    if architecture not in open_clip.list_models():
        close = difflib.get_close_matches(architecture, open_clip.list_models(), n=3)
        near = f" Near: {', '.join(close)}." if close else ""
        raise UserError(
            f'clip_model is "{name}", which is no model folder, not the bundled {BUNDLED}, and no '
            f"architecture of open_clip.{near}"
        )
    about = open_clip.get_pretrained_cfg(architecture, tag)
    repo = about.get("hf_hub", "").rstrip("/")
    if not repo and path is None:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none"
        raise UserError(
            f'open_clip knows no hub weights "{tag}" of {architecture} (it knows: {tags}); pass '
            "--clip_weights FILE"
        )
    file = HubFile(repo, WEIGHTS, "NEXTSCALE_CLIP", "--clip_weights")
    found = find_weights(file, path, download=download)
    keys = ("mean", "std", "interpolation", "resize_mode")
    given = {key: about[key] for key in keys if about.get(key) is not None}
    quick = bool(about.get("quick_gelu"))  # the name says whose weights the file holds
    try:
        model = open_clip.create_model(
            architecture,
            pretrained=str(found),
            force_quick_gelu=quick,
            force_preprocess_cfg=given or None,
        )
    except (
        *(RuntimeError, ValueError, OSError, AttributeError),  # the last for an .npz
        *(pickle.UnpicklingError, SafetensorError),
    ) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{found} does not hold the weights of {architecture}: {reason}") from error
    config = dict(open_clip.get_model_preprocess_cfg(model))
    size = config["size"] if isinstance(config["size"], int) else config["size"][-1]
    preprocess = {"size": size, **{key: config[key] for key in keys if key in config}}
    vocabulary = Vocabulary(model.context_length)
    return Clip(model, vocabulary, preprocess, name, device=device)


def open_clip_model(
    name: str,
    path: str | None = None,
    *,
    device: torch.device | str = "cpu",
    download: bool = False,
) -> Clip:
    """The bundled model, a model folder, or a released one by its name in open_clip's list."""
    if name == BUNDLED:
        return load_clip(storage.ASSETS / BUNDLED, device=device)
    if (Path(name) / CONFIG).is_file():
        return load_clip(name, device=device)
    return load_released(name, path, device=device, download=download)


class ClipFeatures:
    """A CLIP's unit vectors of pictures as `evaluate` reads them.

    Args:
        clip: The model.
        taps: "clip", "cmmd" or both: the name under which a metric asks for them.
    """

    def __init__(self, clip: Clip, taps: Sequence[str]) -> None:
        self.clip = clip
        self.taps: Mapping[str, int] = dict.fromkeys(taps, clip.dim)
        self.labels: Mapping[str, str] = dict.fromkeys(taps, clip.name)

    def __call__(
        self, images: Sequence[np.ndarray], indices: Sequence[int] = ()
    ) -> dict[str, Float[Tensor, "b d"]]:
        """Vectors of uint8 RGB pictures [h, w, 3]."""
        return dict.fromkeys(self.taps, self.clip.images(images))

    def fingerprint(self) -> dict[str, str]:
        """What two sets of features must share to be compared."""
        return {f"{tap}_{k}": v for tap in self.taps for k, v in self.clip.fingerprint().items()}


def clip_scorer(clip: Clip) -> Scorer:
    """Cosine of picture and prompt, in [-1, 1], as a scorer."""

    def score(images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        pixels = list(to_uint8(images).permute(0, 2, 3, 1).cpu().numpy())
        return (clip.images(pixels) * clip.texts(prompts)).sum(dim=1)

    return score


def _open_clip() -> Any:
    try:
        import open_clip
    except ImportError as error:
        raise missing_extra("CLIP needs open_clip_torch", "eval") from error
    return open_clip
