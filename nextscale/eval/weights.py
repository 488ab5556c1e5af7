"""Where the weights of feature networks are looked for; nothing is downloaded unless asked."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from nextscale import storage
from nextscale.errors import UserError


@dataclass(frozen=True)
class WeightFile:
    """A public file of weights.

    Attributes:
        names: File names that are accepted.
        urls: Public sources.
        sha256: First digits of the file's hash.
        variable: Environment variable that holds a path.
        flag: Option that holds a path, or as what a path is given: "pickscore:FILE".
    """

    names: tuple[str, ...]
    urls: tuple[str, ...]
    sha256: str
    variable: str
    flag: str


@dataclass(frozen=True)
class HubFile:
    """A file of a public repository on the Hugging Face hub, which checks it by its hash.

    Attributes:
        repo: Such as "timm/vit_base_patch32_clip_224.openai".
        name: Of the file.
        variable: Environment variable that holds a path.
        flag: Option that holds a path, or as what a path is given: "pickscore:FILE".
    """

    repo: str
    name: str
    variable: str
    flag: str


INCEPTION = WeightFile(
    names=(
        "weights-inception-2015-12-05-6726825d.pth",
        "pt_inception-2015-12-05-6726825d.pth",
    ),
    urls=(
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
        "weights-inception-2015-12-05-6726825d.pth",
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
        "pt_inception-2015-12-05-6726825d.pth",
    ),
    sha256="6726825d",
    variable="NEXTSCALE_INCEPTION",
    flag="--weights",
)
ALEXNET = WeightFile(
    names=("alexnet-owt-7be5be79.pth",),
    urls=("https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",),
    sha256="7be5be79",
    variable="NEXTSCALE_ALEXNET",
    flag="--lpips_weights",
)
PICKSCORE = HubFile(
    "yuvalkirstain/PickScore_v1", "model.safetensors", "NEXTSCALE_PICKSCORE", "pickscore:FILE"
)
PICKSCORE_CONFIG = HubFile(
    PICKSCORE.repo, "config.json", "NEXTSCALE_PICKSCORE_CONFIG", "pickscore:FILE"
)
HPSV2 = HubFile("xswu/HPSv2", "HPS_v2.1_compressed.pt", "NEXTSCALE_HPSV2", "hpsv2:FILE")
IMAGEREWARD = HubFile(
    "THUDM/ImageReward", "ImageReward.pt", "NEXTSCALE_IMAGEREWARD", "imagereward:FILE"
)
AESTHETIC = WeightFile(
    names=("sac+logos+ava1-l14-linearMSE.pth",),
    urls=(
        "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
        "sac%2Blogos%2Bava1-l14-linearMSE.pth",
    ),
    sha256="21dd590f",
    variable="NEXTSCALE_AESTHETIC",
    flag="aesthetic:FILE",
)


def cache_folder() -> Path:
    """NEXTSCALE_CACHE, else the user's cache folder."""
    if given := os.environ.get("NEXTSCALE_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nextscale"


def find_weights(
    file: WeightFile | HubFile, path: str | None = None, *, download: bool = False
) -> Path:
    """The file: as named, by the environment, in the caches, else downloaded if `download`.

    Args:
        file: What is wanted.
        path: The person's own choice; its hash is not checked.
        download: Fetch it into the cache.

    Raises:
        UserError: With exit code 1 and every way out, if it is nowhere.
    """
    for given, how in ((path, file.flag), (os.environ.get(file.variable), file.variable)):
        if given:
            if not Path(given).is_file():
                raise UserError(f"{how} names the file {given}, which is not there")
            return Path(given)
    if isinstance(file, HubFile):
        return _from_hub(file, download)
    torch_home = os.environ.get("TORCH_HOME") or Path.home() / ".cache" / "torch"
    folders = [cache_folder(), Path(torch_home) / "hub" / "checkpoints"]
    for folder in folders:
        for name in file.names:
            if (folder / name).is_file():
                return folder / name
    if download:
        return _download(file, folders[0])
    raise UserError(
        f"the weights {file.names[0]} (SHA-256 {file.sha256}...) are not on this machine: not in "
        f"{folders[0]} nor {folders[1]}. Get them from {' or '.join(file.urls)} and pass "
        f"{_option(file)} or set {file.variable}; with a network, --download fetches them.",
        exit_code=1,
    )


def _option(file: WeightFile | HubFile) -> str:
    return file.flag if file.flag.endswith("FILE") else f"{file.flag} FILE"


def _from_hub(file: HubFile, download: bool) -> Path:
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        found = hf_hub_download(file.repo, file.name, local_files_only=not download)
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        what = "could not be downloaded" if download else "are not on this machine"
        raise UserError(
            f"the weights {file.name} of {file.repo} {what} (looked in {constants.HF_HUB_CACHE}). "
            f"Get them from https://huggingface.co/{file.repo} and pass {_option(file)} or set "
            f"{file.variable}; with a network, --download fetches them.",
            exit_code=1,
        ) from error
    return Path(found)


def _download(file: WeightFile, folder: Path) -> Path:
    from urllib.error import URLError

    from torch.hub import download_url_to_file

    target = folder / file.names[0]
    with storage.os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        with storage.atomic(target) as temporary:
            download_url_to_file(file.urls[0], str(temporary), hash_prefix=file.sha256)
    except (URLError, RuntimeError, TimeoutError) as error:
        raise UserError(
            f"{file.urls[0]} could not be downloaded ({error}). Fetch it elsewhere and pass "
            f"{_option(file)}.",
            exit_code=1,
        ) from error
    return target
