"""Files and folders: written whole or not at all, read without running anything in them.

Every write goes to a temporary neighbour, is flushed to the disk and then takes the target's name
in one step, so that a run killed at any moment leaves either the old file or the new one. State is
safetensors and JSON; pickles are only read, and only by the loader that refuses code.
"""

from __future__ import annotations

import ctypes
import difflib
import errno
import hashlib
import json
import os
import pickle
import re
import secrets
import shutil
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from nextscale.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

StrPath = str | os.PathLike[str]
T = TypeVar("T")

ASSETS = Path(__file__).parent / "assets"
"""Where the bundled models lie, one folder each."""
MODEL_INDEX = "model_index.json"
"""The file by which a folder is a whole model."""

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS}
_BAD_NAME = {errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ENOTEMPTY}


# ---- writing ---------------------------------------------------------------------------------


@contextmanager
def os_errors(path: StrPath) -> Iterator[None]:
    """Turn what the system says about a failed write into words for the person.

    Args:
        path: The file or folder being written, named in the message.

    Raises:
        UserError: With exit code 1, for a full disk, missing permission or an unusable name. Other
            `OSError`s pass unchanged: they are not known to be about this path.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_FULL:
            message = f"No space left on the disk while writing {path}. Free some space, or choose"
        elif error.errno in _NOT_ALLOWED:
            message = f"No permission to write {path} ({error.strerror}). Change it, or choose"
        elif error.errno in _BAD_NAME or _cannot_make(path, error):
            message = f"Cannot write {path} ({error.strerror}). Move what is in the way, or choose"
        else:
            raise
        raise UserError(f"{message} another output folder.", exit_code=1) from error


def _cannot_make(path: StrPath, error: OSError) -> bool:
    """Whether a folder of `path` is missing and could not be made, as below /proc."""
    where = Path(path).absolute()
    missing = error.errno == errno.ENOENT and isinstance(error.filename, str)
    return missing and Path(error.filename).absolute() in (where, *where.parents)


@contextmanager
def atomic(path: StrPath) -> Iterator[Path]:
    """Write a file so that nobody ever sees half of it.

    Yields a path that does not exist yet, hidden, in the same folder and with the same suffix
    (Pillow and NumPy choose the format by it). When the block ends well, the file written there is
    flushed to the disk and takes the place of `path`. When it ends in any exception, Ctrl-C
    included, the temporary file goes and `path` stays as it was. Missing parent folders are made;
    a symbolic link stays one, and its target is replaced.

    Args:
        path: The file to write or replace.

    Raises:
        UserError: With exit code 1, if the disk is full or `path` cannot be written.
    """
    with os_errors(path):
        target = Path(os.path.realpath(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = _neighbour(target)
        try:
            yield temporary
            _flush(temporary)
            os.replace(temporary, target)
            _flush(target.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def replace_folder(path: StrPath) -> Iterator[Path]:
    """Write a whole folder so that nobody ever sees half of it.

    Yields an empty temporary folder beside `path`. When the block ends well, its files are flushed
    and the folder takes the place of `path`, whose old content is deleted; when it ends in any
    exception, the temporary folder goes and `path` stays as it was. On Linux both folders change
    places in one step; where the file system cannot do that, a crash between two renames can leave
    the old folder under a hidden `.tmp-` name beside the target.

    Args:
        path: The folder to write or replace.

    Raises:
        UserError: With exit code 1, if the disk is full, or `path` cannot be written or is a file.
    """
    with os_errors(path):
        target = Path(os.path.realpath(path))
        if target.exists() and not target.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "a file of this name exists", str(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = _neighbour(target)
        temporary.mkdir()
        try:
            yield temporary
            for folder, _, names in os.walk(temporary, topdown=False):
                for name in names:
                    _flush(Path(folder, name))
                _flush(Path(folder))
            _take_place(temporary, target)
            _flush(target.parent)
        finally:
            # After an exchange the temporary name holds the old content.
            shutil.rmtree(temporary, ignore_errors=True)


def write_bytes(path: StrPath, data: bytes) -> None:
    """Write a file atomically, see `atomic`."""
    with atomic(path) as temporary:
        temporary.write_bytes(data)


def short_name(path: StrPath) -> str:
    """The last two parts of a place: what a record calls it without telling of this machine."""
    return "/".join(Path(path).expanduser().absolute().parts[-2:])


def write_json(path: StrPath, obj: Any) -> None:
    """Write an object as indented UTF-8 JSON, atomically and in the order of its keys.

    Args:
        path: The file to write or replace.
        obj: Anything the `json` module can write.

    Raises:
        TypeError: If `obj` holds something that JSON has no form for.
        UserError: With exit code 1, if the file cannot be written.
    """
    text = json.dumps(obj, indent=2, ensure_ascii=False)
    write_bytes(path, (text + "\n").encode("utf-8"))


def write_tensors(
    path: StrPath, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write named tensors as a safetensors file, atomically.

    Tensors may live on any device, be non-contiguous, or share memory (tied weights): each is
    stored in full under its own name.

    Args:
        path: The file to write or replace.
        tensors: Tensors by name.
        metadata: Text to keep in the file's header.

    Raises:
        UserError: With exit code 1, if the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    stored: dict[str, Tensor] = {}
    memory: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        # safetensors refuses tensors over the same storage; views of one storage count too.
        address = plain.untyped_storage().data_ptr()
        stored[name] = plain.clone() if address in memory else plain
        memory.add(address)
    with atomic(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # save_file makes a private file, whatever the umask says
        try:
            save_file(stored, temporary, metadata=dict(metadata) if metadata else None)
            temporary.chmod(mode)
        except SafetensorError as error:
            # The library reports the system's error only as text: give the number back.
            code = re.search(r"code: (\d+)|os error (\d+)", str(error))
            if code is None:
                raise
            number = int(code[1] or code[2])
            raise OSError(number, os.strerror(number), str(path)) from error


# ---- reading ---------------------------------------------------------------------------------


def read_lines(path: StrPath) -> list[str]:
    """Read a text file in UTF-8.

    Raises:
        UserError: If the file is missing, unreadable or not UTF-8; the message names it.
    """
    with _read_errors(path):
        text = Path(path).read_bytes()
    try:
        return text.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text in UTF-8 ({error}). Save it as UTF-8.") from error


def read_json(path: StrPath) -> Any:
    """Read a JSON file.

    Raises:
        UserError: If the file is missing, unreadable or not JSON; the message names it.
    """
    with _read_errors(path):
        text = Path(path).read_bytes()
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is not valid JSON ({error}). Write or download it again."
        ) from error


def read_config(path: StrPath, version: int, kind: str) -> dict[str, Any]:
    """Read a `config.json` and take `format_version` and `class` off it.

    Args:
        path: File written beside the weights.
        version: Newest `format_version` that the caller reads.
        kind: Class name that the file must carry.

    Raises:
        UserError: If the file is of another class or of a newer format.
    """
    config = read_json(path)
    if not isinstance(config, dict):
        raise UserError(f"{path} holds no configuration; download or convert the model again")
    found, number = config.pop("class", None), config.pop("format_version", None)
    if found != kind and isinstance(config.get("_class_name"), str):
        raise UserError(
            f"{path} is of diffusers' {config['_class_name']}, which this does not take; pass a "
            f"{kind}"
        )
    if found != kind:
        raise UserError(f"{path} describes a {found}, not a {kind}; pass the matching folder")
    if not isinstance(number, int) or number > version:
        raise UserError(
            f"{path} has format_version {number}, this nextscale reads up to {version}; update it"
        )
    return config


def build(cls: type[T], values: Mapping[str, Any], path: StrPath) -> T:
    """Make a configuration from what its file holds.

    Raises:
        UserError: If a key is missing or unknown; the message names the file.
    """
    try:
        return cls(**values)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        reason = str(error).split(") ", 1)[-1].removeprefix(f"{cls.__name__}.__init__() ")
        raise UserError(
            f"{path} does not fit this version of nextscale: {reason}. Download or convert the "
            "model again, or update nextscale"
        ) from error


def load_state(module: nn.Module, state: Mapping[str, Tensor], label: StrPath) -> None:
    """`load_state_dict` whose errors name the tensors in one line.

    Args:
        module: Receives the tensors.
        state: Must hold exactly the module's tensors.
        label: What to call the source in errors.

    Raises:
        UserError: If names or shapes differ.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in state.items()}
    problems = [f"{name} is missing" for name in wanted if name not in given]
    problems += [f"{name} is unexpected" for name in given if name not in wanted]
    problems += [
        f"{name} is {given[name]} instead of {wanted[name]}"
        for name in wanted
        if name in given and given[name] != wanted[name]
    ]
    if problems:
        raise UserError(
            f"{label} does not fit the model: {'; '.join(problems[:3])}"
            + (f" and {len(problems) - 3} more" if len(problems) > 3 else "")
            + ". Check that depth, width and scales are those of the checkpoint"
        )
    module.load_state_dict(dict(state), strict=True)


def read_tensors(path: StrPath) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file onto the CPU.

    Raises:
        UserError: If the file is missing, cut off or not a safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    with _read_errors(path):
        try:
            return load_file(path)
        except SafetensorError as error:
            raise _damaged(path, "safetensors", error) from error


def read_metadata(path: StrPath) -> dict[str, str]:
    """Read the text in a safetensors file's header, without its tensors; empty if there is none.

    Raises:
        UserError: If the file is missing, cut off or not a safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    with _read_errors(path):
        try:
            with safe_open(path, framework="numpy") as file:
                return dict(file.metadata() or {})
        except SafetensorError as error:
            raise _damaged(path, "safetensors", error) from error


def read_pickle(path: StrPath) -> object:
    """Read a released `.pth` file that holds nothing but tensors and plain containers.

    Args:
        path: A file written by `torch.save`, in the new (zip) or the old form.

    Returns:
        What was saved, on the CPU; the new form is mapped from the disk and not copied.

    Raises:
        UserError: If the file is missing, cut off, or holds any other object: unpickling that
            could run code, so it is refused.
    """
    import torch

    with _read_errors(path):
        with open(path, "rb") as file:
            start = file.read(4)
        zip_start = start == b"PK\x03\x04"
        if start[:1] == b"\x80" and start[1:2] != b"\x02":
            # torch.save's old form is pickle protocol 2: this one is from somewhere else.
            raise _refused(path)
        if zip_start and not zipfile.is_zipfile(path):  # the directory of a zip is at its end
            raise _damaged(path, "PyTorch", "its end is missing")
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zip_start)
        except (pickle.UnpicklingError, RuntimeError) as error:
            if _was_refused(str(error)):
                raise _refused(path) from error
            raise _damaged(path, "PyTorch", error) from error
        except (EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            # What the unpickler stumbles over in a file of random bytes.
            raise _damaged(path, "PyTorch", error) from error


# ---- fingerprints ----------------------------------------------------------------------------


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Hash named tensors, so that a record can say which weights it was made with.

    Args:
        tensors: Tensors by name, of any dtype and on any device; their order does not matter.

    Returns:
        SHA-256 in hex over name, dtype, shape and bytes of each tensor.
    """
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        header = json.dumps([name, str(tensor.dtype), list(tensor.shape)])
        digest.update(f"{len(header)}:{header}".encode())
        # NumPy has no bfloat16: hash the bytes.
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def file_sha256(path: StrPath) -> str:
    """Hash a file's bytes; SHA-256 in hex.

    Raises:
        UserError: If the file is missing or unreadable.
    """
    with _read_errors(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- finding models --------------------------------------------------------------------------


def bundled_names() -> list[str]:
    """List the models that ship inside the package, sorted by name."""
    return sorted(index.parent.name for index in ASSETS.glob(f"*/{MODEL_INDEX}"))


def resolve_model(
    name: StrPath, *, revision: str | None = None, local_files_only: bool = False
) -> Path:
    """Find a model's folder: a bundled name, else an existing folder, else a hub id.

    Args:
        name: Such as "scenes", "runs/mine/model" or "owner/model". A path object is only taken as
            a folder.
        revision: Branch, tag or commit on the hub. Goes with a hub id only.
        local_files_only: Use what the hub cache holds and download nothing, as the environment
            variable HF_HUB_OFFLINE=1 does.

    Returns:
        The folder on this machine.

    Raises:
        UserError: If there is no such model (exit code 2) or it could not be downloaded (1).
    """
    text = os.fspath(name)
    bundled = bundled_names()
    folder = Path(text).expanduser()
    found = ASSETS / text if text in bundled else folder if text and folder.is_dir() else None
    if found is not None:
        if revision is not None:
            raise UserError(
                f"revision={revision!r} was given, but {text!r} is not on the hub: only models "
                "from the hub have revisions. Leave it out."
            )
        return found
    if isinstance(name, str) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", text):
        return _download(text, revision, local_files_only)

    close = difflib.get_close_matches(text, bundled, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    listed = ", ".join(bundled) or "none in this installation"
    kind = "is a file, not a model folder" if folder.is_file() else "is no model"
    raise UserError(
        f"{text!r} {kind}.{hint} Use a bundled name ({listed}), an existing folder, or a hub id "
        "like owner/name."
    )


def check_model(folder: Path) -> Path:
    """The same folder, if it holds a whole model.

    Raises:
        UserError: If it is none, or of another version; says what the folder is instead.
    """
    if not (folder / MODEL_INDEX).exists():
        if (folder / "adapter_config.json").exists():
            raise UserError(f"{folder} is a LoRA: pass its base as the model and this as --lora.")
        if (folder / "model" / MODEL_INDEX).exists():
            raise UserError(f"{folder} is a training run; its model is {folder / 'model'}.")
        own = folder / "config.json"
        if own.exists() and read_json(own).get("class") == "ControlModule":
            raise UserError(
                f"{folder} is a control module: pass its base as the model and this as --control."
            )
        raise UserError(f"{folder} is no model: it has no {MODEL_INDEX}. A model's folder has one.")
    read_config(folder / MODEL_INDEX, 1, "NextScalePipeline")
    return folder


# ---- parts -----------------------------------------------------------------------------------


def _neighbour(target: Path) -> Path:
    # Hidden, so that a leftover of a killed run is not taken for an image or a checkpoint. The
    # target's own name is left out: with it, a long name could pass the system's limit.
    return target.with_name(f".tmp-{secrets.token_hex(6)}{target.suffix}")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _take_place(new: Path, target: Path) -> None:
    """Give the folder `new` the name `target`; an old `target` ends up under the name of `new`."""
    if not target.exists():
        os.rename(new, target)
        return
    if _exchange(new, target):
        return
    old = _neighbour(target)
    os.rename(target, old)
    try:
        os.rename(new, target)
    except BaseException:
        os.rename(old, target)
        raise
    os.rename(old, new)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step, where the system offers it."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of linux/fcntl.h and linux/fs.h
    return rename(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0


@contextmanager
def _read_errors(path: StrPath) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"There is no file {path}. Check the name.") from error
    except IsADirectoryError as error:
        raise UserError(f"{path} is a folder, but a file is needed.") from error
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror or error}.", exit_code=1) from error


def _damaged(path: StrPath, kind: str, reason: object) -> UserError:
    first_line = str(reason).strip().split("\n", 1)[0]
    return UserError(
        f"{path} is not a whole {kind} file ({first_line}). Download or write it again."
    )


def _refused(path: StrPath) -> UserError:
    return UserError(
        f"{path} holds objects other than tensors and was refused, because loading them could run "
        "code. Save its state_dict alone with torch.save and use that file."
    )


def _was_refused(message: str) -> bool:
    """Whether torch's restricted unpickler met an object, as opposed to broken bytes."""
    return any(
        sign in message
        for sign in (
            "GLOBAL",
            "Can only create new object",
            "Can only build",
            "Trying to call reduce",
            "TorchScript",
            "legacy .tar",
        )
    )


def _download(repo: str, revision: str | None, local_files_only: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = snapshot_download(
            repo,
            revision=revision,
            local_files_only=local_files_only,
            # Our layout, and nothing that could hold code.
            allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.md"],
        )
    except HFValidationError as error:
        raise UserError(f"{repo!r} is neither an existing folder nor a valid hub id.") from error
    except GatedRepoError as error:
        raise UserError(
            f"The hub model {repo!r} needs access rights. Ask for them on its page, then run: "
            "hf auth login",
            exit_code=1,
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{repo!r} is neither an existing folder nor a model on the hub. Check the name; a "
            "private model needs: hf auth login"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"The hub model {repo!r} has no revision {revision!r}.") from error
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"{repo!r} is not an existing folder, and as a hub model it is not in the local cache "
            "and cannot be downloaded now (offline). Connect once to download it, or give a folder "
            f"or a bundled name ({', '.join(bundled_names())}).",
            exit_code=1,
        ) from error
    except OSError as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise UserError(
            f"Downloading {repo!r} from the hub failed ({reason}). Try again, or give a folder.",
            exit_code=1,
        ) from error
    return Path(folder)
