"""Photos -> control maps: one interface over OpenCV, kornia, transformers and controlnet_aux."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8

from nextscale.errors import UserError, missing_extra, require

Picture = UInt8[np.ndarray, "H W 3"]
Map = Float[np.ndarray, "H W 3"]

WHITE_LINES = "white lines on black"
NEAR_IS_BRIGHT = "near is bright"


@dataclass(frozen=True, kw_only=True)
class ExtractorSettings:
    """Settings of extractors as flags; None: the extractor's own."""

    low: float | None = None
    """canny, scribble: lower threshold."""
    high: float | None = None
    """canny, scribble: upper threshold."""
    blur: float | None = None
    """scribble: deviation of the blur in pixels."""
    factor: int | None = None
    """lowres: how much smaller."""
    box: tuple[float, float, float, float] | None = None
    """inpaint: the hole, top left bottom right, in fractions of the side."""

    def given(self) -> dict[str, Any]:
        """Those that are set, for `open_extractor`."""
        return {f.name: v for f in fields(self) if (v := getattr(self, f.name)) is not None}


@dataclass(frozen=True)
class Extractor:
    """Makes control maps of one type.

    Attributes:
        type: canny, softedge, depth, ...
        name: What computes it.
        version: Version of the package that does.
        polarity: How a map is to be read.
        settings: Thresholds and the like.
        read: A picture -> its map in [0, 1].
        spec: What `open_extractor` was asked for.
    """

    type: str
    name: str
    version: str
    polarity: str
    settings: dict[str, Any] = field(default_factory=dict)
    read: Callable[[np.ndarray], np.ndarray] = lambda picture: picture
    spec: str = ""

    def __call__(self, pictures: UInt8[np.ndarray, "n H W 3"]) -> Float[np.ndarray, "n 3 H W"]:
        """Maps of uint8 pictures: float32 in [0, 1], three channels."""
        maps = [np.clip(self.read(picture), 0, 1) for picture in pictures]
        rgb = [np.repeat(m[..., None], 3, axis=2) if m.ndim == 2 else m for m in maps]
        return np.stack(rgb).astype(np.float32).transpose(0, 3, 1, 2)

    def record(self) -> dict[str, Any]:
        """What a module's file and a run's record say of its maps."""
        return {
            "spec": self.spec,
            "name": self.name,
            "version": self.version,
            "polarity": self.polarity,
            "range": [0, 1],
            "settings": dict(self.settings),
        }


def open_extractor(spec: str, **settings: Any) -> Extractor:
    """An extractor by "TYPE" or "TYPE:SOURCE".

    | TYPE | SOURCE, first is the default |
    |---|---|
    | canny | OpenCV; settings `low` 100, `high` 200 |
    | softedge | Sobel magnitude of the grey picture, by kornia |
    | depth, segmentation | scenes (read back by the checker), or a model of transformers |
    | normal | those of depth, whose gradient kornia takes |
    | scribble | OpenCV: Canny's lines of a blurred picture, 3 pixels wide |
    | lowres | the picture at 1 / `factor` (8) of its size |
    | inpaint | the picture with a black hole, `box` (top, left, bottom, right) in fractions |
    | hed, lineart, pidi, normalbae, openpose, zoe | controlnet_aux; a folder or hub id |

    Raises:
        UserError: For an unknown type or setting.
        MissingExtraError: If the package that computes it is not installed.
    """
    kind, _, source = spec.partition(":")
    if kind not in EXTRACTORS:
        raise UserError(
            f'there is no control type "{kind}"; choose one of {", ".join(EXTRACTORS)}, such as '
            "canny or depth:scenes"
        )
    for name, value in settings.items():
        values = value if isinstance(value, list | tuple) else [value]
        if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
            raise UserError(f"control type {spec}: {name} must be a number, got {value!r}")
    try:
        return replace(EXTRACTORS[kind](source, **settings), spec=spec)
    except TypeError as error:
        reason = str(error).split("() ")[-1].replace("got an unexpected keyword argument", "has no")
        raise UserError(f"control type {spec}: {reason}") from error


def _canny(source: str, low: float = 100, high: float = 200) -> Extractor:
    cv2 = _opencv("canny")
    _no_source("canny", source)
    _check_thresholds(low, high)

    def read(picture: Picture) -> np.ndarray:
        return cv2.Canny(np.ascontiguousarray(picture), low, high).astype(np.float32) / 255

    settings = {"low": low, "high": high}
    return Extractor("canny", "opencv Canny", cv2.__version__, WHITE_LINES, settings, read)


def _softedge(source: str) -> Extractor:
    filters = _kornia("softedge").filters
    _no_source("softedge", source)

    def read(picture: Picture) -> np.ndarray:
        return filters.sobel(_grey(picture))[0, 0].numpy()

    return Extractor("softedge", "kornia sobel", _version("kornia"), WHITE_LINES, {}, read)


def _scribble(source: str, blur: float = 1.5, low: float = 50, high: float = 120) -> Extractor:
    cv2 = _opencv("scribble")
    _no_source("scribble", source)
    _check_thresholds(low, high)
    require("blur", blur, 0 < blur < 100, "lie in (0, 100)")

    def read(picture: Picture) -> np.ndarray:
        smooth = cv2.GaussianBlur(np.ascontiguousarray(picture), (0, 0), blur)
        lines = cv2.Canny(smooth, low, high)
        return cv2.dilate(lines, np.ones((3, 3), np.uint8)).astype(np.float32) / 255

    settings = {"blur": blur, "low": low, "high": high}
    return Extractor("scribble", "opencv Canny, wide", cv2.__version__, WHITE_LINES, settings, read)


def _depth(source: str) -> Extractor:
    if source in ("", "scenes"):
        from nextscale.data.checker import recover_depth

        return Extractor(
            "depth", "scenes checker", _version("nextscale"), NEAR_IS_BRIGHT, {}, recover_depth
        )
    return Extractor(
        "depth",
        source,
        _version("transformers"),
        f"{NEAR_IS_BRIGHT}, the brightest is 1",
        {},
        _transformers_depth(source),
    )


def _normal(source: str) -> Extractor:
    depth_to_normals = _kornia("normal").geometry.depth_to_normals
    depth = _depth(source)

    def read(picture: Picture) -> np.ndarray:
        # Distance falls as nearness rises; a pinhole camera whose focal length is the side.
        near = torch.from_numpy(np.ascontiguousarray(depth.read(picture))).float()
        side = float(max(near.shape))
        height, width = near.shape
        camera = torch.tensor([[[side, 0, width / 2], [0, side, height / 2], [0, 0, 1.0]]])
        normals = depth_to_normals((2 - near)[None, None], camera)[0]
        return ((normals + 1) / 2).permute(1, 2, 0).numpy()

    name = f"{depth.name}, kornia depth_to_normals"
    return Extractor("normal", name, _version("kornia"), "rgb = (n + 1) / 2", depth.settings, read)


def _segmentation(source: str) -> Extractor:
    if source in ("", "scenes"):
        from nextscale.data.checker import recover_segmentation

        read, name, package = recover_segmentation, "scenes checker", "nextscale"
    else:
        read, name, package = _transformers_segmentation(source), source, "transformers"

    def colours(picture: Picture) -> np.ndarray:
        return label_colours(read(picture)).astype(np.float32) / 255

    polarity = "a colour per class (label_colours)"
    return Extractor("segmentation", name, _version(package), polarity, {}, colours)


def _lowres(source: str, factor: int = 8) -> Extractor:
    _no_source("lowres", source)
    require("factor", factor, factor >= 1 and factor == int(factor), "be whole, 1 or more")

    def read(picture: Picture) -> np.ndarray:
        pixels = torch.from_numpy(picture.astype(np.float32) / 255).permute(2, 0, 1)[None]
        size = pixels.shape[2:]
        small = F.interpolate(pixels, size=[max(s // factor, 1) for s in size], mode="area")
        return F.interpolate(small, size=size, mode="nearest")[0].permute(1, 2, 0).numpy()

    settings = {"factor": factor}
    return Extractor("lowres", "torch area", torch.__version__, "colours", settings, read)


def _inpaint(
    source: str, box: tuple[float, float, float, float] = (0.25, 0.25, 0.75, 0.75)
) -> Extractor:
    _no_source("inpaint", source)
    top, left, bottom, right = box if len(box) == 4 else (1.0, 1.0, 0.0, 0.0)
    if not (0 <= top < bottom <= 1 and 0 <= left < right <= 1):
        raise UserError(f"box is (top, left, bottom, right) in fractions of the side, got {box}")

    def read(picture: Picture) -> np.ndarray:
        pixels = picture.astype(np.float32) / 255
        height, width = pixels.shape[:2]
        rows = slice(round(top * height), round(bottom * height))
        pixels[rows, round(left * width) : round(right * width)] = 0
        return pixels

    settings = {"box": list(box)}
    return Extractor("inpaint", "hole", _version("nextscale"), "the hole is black", settings, read)


_AUX = {
    "hed": ("HEDdetector", WHITE_LINES),
    "lineart": ("LineartDetector", WHITE_LINES),
    "pidi": ("PidiNetDetector", WHITE_LINES),
    "normalbae": ("NormalBaeDetector", "rgb = (n + 1) / 2"),
    "openpose": ("OpenposeDetector", "coloured skeleton on black"),
    "zoe": ("ZoeDetector", NEAR_IS_BRIGHT),
}


def _aux(kind: str, source: str) -> Extractor:
    try:
        import controlnet_aux  # pyright: ignore[reportMissingImports]  # its extra is not in all
    except ImportError as error:
        raise missing_extra(f"{kind} needs controlnet_aux", "control-aux") from error
    from PIL import Image

    cls, polarity = _AUX[kind]
    name = source or "lllyasviel/Annotators"
    try:
        detector = getattr(controlnet_aux, cls).from_pretrained(name)
    except (OSError, ValueError) as error:
        raise _not_loaded(kind, name, error) from error

    def read(picture: Picture) -> np.ndarray:
        side = min(picture.shape[:2])
        found = detector(
            Image.fromarray(picture), detect_resolution=side, image_resolution=side
        ).convert("RGB")
        resized = found.resize(picture.shape[1::-1])
        return np.asarray(resized, np.float32) / 255

    return Extractor(kind, f"{cls} of {name}", _version("controlnet_aux"), polarity, {}, read)


EXTRACTORS: dict[str, Callable[..., Extractor]] = {
    "canny": _canny,
    "softedge": _softedge,
    "scribble": _scribble,
    "depth": _depth,
    "normal": _normal,
    "segmentation": _segmentation,
    "lowres": _lowres,
    "inpaint": _inpaint,
    **{kind: partial(_aux, kind) for kind in _AUX},
}


# ---- reading maps ----------------------------------------------------------------------------


def label_colours(labels: UInt8[np.ndarray, "H W"]) -> UInt8[np.ndarray, "H W 3"]:
    """A colour for each class, class 0 black: the bits of the label spread over the channels.

    The palette of PASCAL VOC: bit 3 i + c of the label is bit 7 - i of channel c. All 256 colours
    differ, so that `colour_labels` reads them back.
    """
    return _PALETTE[labels]


def colour_labels(maps: Float[np.ndarray, "n 3 H W"]) -> UInt8[np.ndarray, "n H W"]:
    """The class of every pixel of coloured maps in [0, 1]: that of the nearest colour."""
    pixels = np.moveaxis(maps, 1, -1).reshape(-1, 3) * 255
    found, inverse = np.unique(np.rint(pixels).astype(np.int32), axis=0, return_inverse=True)
    distance = ((found[:, None] - _PALETTE[None].astype(np.int32)) ** 2).sum(axis=2)
    shape = (maps.shape[0], *maps.shape[2:])
    return distance.argmin(axis=1).astype(np.uint8)[inverse].reshape(shape)


def _palette() -> np.ndarray:
    colours = np.zeros((256, 3), np.uint8)
    for label in range(256):
        for bit in range(8):
            if label >> bit & 1:
                colours[label, bit % 3] |= 1 << (7 - bit // 3)
    return colours


_PALETTE = _palette()


def suspect_map(kind: str, map_: Float[np.ndarray, "3 H W"]) -> str | None:
    """Why a picture is probably no map of this type, or None.

    Photos given where a map is expected, and maps with black and white exchanged, are the most
    frequent mistakes with control.
    """
    if float(np.ptp(map_, axis=(1, 2)).max()) == 0:
        return "it is of one colour, so that there is nothing to follow"
    colourful = float(np.ptp(map_, axis=0).mean())
    grey = map_.mean(axis=0)
    if kind in ("canny", "scribble", "softedge", "hed", "lineart", "pidi"):
        if colourful > 0.02:
            return "it has colours, and lines are white on black; extract them first"
        between = float(((grey > 0.1) & (grey < 0.9)).mean())
        if between > (0.3 if kind in ("canny", "scribble") else 0.6):
            return "it has many grey pixels, and lines are white on black; extract them first"
        if grey.mean() > 0.5:
            return "most of it is white, and lines are white on black; invert it"
    elif kind in ("depth", "zoe"):
        if colourful > 0.02:
            return "it has colours, and depth is grey (near is bright); extract it first"
        if (grey > 0.98).mean() > 0.5:
            return "most of it is the brightest there is, and near is bright; it may be inverted"
        height = len(grey)
        if grey[: height // 4].mean() > grey[-height // 4 :].mean() + 0.35:
            return "its upper part is the brightest, and near is bright; it may be inverted"
    elif kind in ("normal", "normalbae"):
        length = np.sqrt(((map_ * 2 - 1) ** 2).sum(axis=0))
        if float(np.abs(length - 1).mean()) > 0.2:
            return "its colours are no unit vectors; extract normals first"
        if float(map_[2].mean()) < 0.5:
            return "its normals look away (blue below one half); they may be inverted"
    elif kind == "segmentation":
        pixels = np.rint(map_.reshape(3, -1).T * 255).astype(np.int32)
        pixels = pixels[pixels.any(axis=1)]  # class 0 is black
        pixels = pixels[:: len(pixels) // 1024 + 1]
        near = np.abs(pixels[:, None] - _PALETTE.astype(np.int32)).max(axis=2).min(axis=1)
        if (near > 8).mean() > 0.2:
            return "its colours are not those of classes; extract a segmentation first"
    return None


# ---- packages --------------------------------------------------------------------------------


def _grey(picture: Picture) -> torch.Tensor:
    weights = np.array([0.299, 0.587, 0.114], np.float32)
    return torch.from_numpy(picture.astype(np.float32) / 255 @ weights)[None, None]


def _transformers_depth(source: str) -> Callable[[np.ndarray], np.ndarray]:
    processor, model = _transformers_model("depth", source, "AutoModelForDepthEstimation")
    metric = (
        model.config.model_type in ("zoedepth", "glpn")
        or getattr(model.config, "depth_estimation_type", "") == "metric"
    )

    @torch.no_grad()
    def read(picture: Picture) -> np.ndarray:
        output: Any = model(**processor(images=picture, return_tensors="pt"))
        depth = F.interpolate(
            output.predicted_depth[:, None], size=picture.shape[:2], mode="bicubic"
        )[0, 0]
        if metric:  # distances: the nearest becomes 1
            depth = depth.clamp_min(1e-6).reciprocal()
        return (depth.clamp_min(0) / depth.max().clamp_min(1e-6)).numpy()

    return read


def _transformers_segmentation(source: str) -> Callable[[np.ndarray], np.ndarray]:
    classes = ("AutoModelForUniversalSegmentation", "AutoModelForSemanticSegmentation")
    processor, model = _transformers_model("segmentation", source, *classes)

    @torch.no_grad()
    def read(picture: Picture) -> np.ndarray:
        extra = {"task_inputs": ["semantic"]} if "oneformer" in model.config.model_type else {}
        output: Any = model(**processor(images=picture, return_tensors="pt", **extra))
        labels = processor.post_process_semantic_segmentation(
            output, target_sizes=[picture.shape[:2]]
        )[0]
        return labels.to(torch.uint8).numpy()

    return read


def _transformers_model(kind: str, source: str, *classes: str) -> tuple[Any, Any]:
    """Processor and model of the first class that takes it."""
    if "/" not in source and not Path(source).is_dir():
        raise UserError(f'{kind}: "{source}" is neither scenes, nor a folder, nor OWNER/MODEL')
    try:
        import transformers
    except ImportError as error:
        raise missing_extra(f"{kind}:{source} needs transformers", "control-aux") from error
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(source)
        error: Exception | None = None
        for name in classes:
            try:
                return processor, getattr(transformers, name).from_pretrained(source).eval()
            except ValueError as other:  # a model of another kind
                error = other
        raise error or ValueError("no class")
    except (OSError, ValueError) as error:
        raise _not_loaded(kind, source, error) from error


def _not_loaded(kind: str, source: str, error: Exception) -> UserError:
    reason = str(error).split("\n")[0]
    return UserError(
        f'{kind}: "{source}" cannot be loaded ({reason}); give a folder, or a hub id and a network'
    )


def _opencv(kind: str) -> Any:
    try:
        import cv2
    except ImportError as error:
        raise missing_extra(f"{kind} needs opencv-python-headless", "control") from error
    return cv2


def _kornia(kind: str) -> Any:
    try:
        import kornia
    except ImportError as error:
        raise missing_extra(f"{kind} needs kornia", "control") from error
    return kornia


def _check_thresholds(low: float, high: float) -> None:
    for name, value in (("low", low), ("high", high)):
        require(name, value, 0 <= value < float("inf"), "be 0 or more")


def _no_source(kind: str, source: str) -> None:
    if source:
        raise UserError(f'{kind} has one source, got "{source}"; write {kind}')


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
