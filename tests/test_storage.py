import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nextscale import storage
from nextscale.errors import MissingExtraError, UserError, missing_extra


def _content(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- errors ----------------------------------------------------------------------------------


def test_a_missing_extra_names_the_command_that_installs_it() -> None:
    error = missing_extra("nextscale eval needs torch-fidelity", "eval")
    assert str(error) == (
        'nextscale eval needs torch-fidelity. Install it with: pip install "nextscale[eval]"'
    )
    assert isinstance(error, MissingExtraError)
    assert isinstance(error, ImportError)
    assert isinstance(error, UserError)
    assert error.exit_code == 1
    assert UserError("no").exit_code == 2


# ---- atomic writes ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, kind: type[BaseException]
) -> None:
    path = tmp_path / "a.json"
    storage.write_json(path, {"old": 1})
    with pytest.raises(kind):  # noqa: PT012, SIM117 - the body is what fails
        with storage.atomic(path) as temporary:
            temporary.write_text("half")
            raise kind
    assert storage.read_json(path) == {"old": 1}
    assert _content(tmp_path) == ["a.json"]


def test_a_killed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    storage.write_json(path, {"old": 1})
    code = (
        "import os, signal, sys; from nextscale import storage\n"
        "with storage.atomic(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert storage.read_json(path) == {"old": 1}
    hidden = [name for name in _content(tmp_path) if name != "a.json"]
    assert all(name.startswith(".tmp-") for name in hidden)


def test_the_temporary_name_keeps_the_suffix_and_long_names_fit(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / ("n" * 250 + ".png")
    with storage.atomic(path) as temporary:
        assert temporary.suffix == ".png"
        assert temporary.parent == path.parent
        temporary.write_bytes(b"x")
    assert path.read_bytes() == b"x"


def test_a_symbolic_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text("1")
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    storage.write_json(tmp_path / "link.json", 2)
    assert (tmp_path / "link.json").is_symlink()
    assert storage.read_json(tmp_path / "real.json") == 2


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "No space left"), (errno.EACCES, "No permission"), (errno.EROFS, "Read-only")],
)
def test_a_system_error_is_put_into_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    path = tmp_path / "a.json"
    with pytest.raises(UserError, match=words) as caught:
        storage.write_json(path, 1)
    assert caught.value.exit_code == 1
    assert str(path) in str(caught.value)
    assert _content(tmp_path) == []


def test_other_system_errors_pass_unchanged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), storage.atomic(tmp_path / "a"):
        (tmp_path / "elsewhere").read_text()


def test_a_file_in_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="out"):
        storage.write_json(tmp_path / "out" / "a.json", 1)


def test_a_full_disk_under_safetensors_is_put_into_words(tmp_path: Path) -> None:
    # A limit on the file size makes the system itself refuse the write, inside the Rust library.
    code = (
        "import resource, signal, sys, torch; from nextscale import storage\n"
        "storage.write_tensors(sys.argv[1], {'a': torch.zeros(4)})\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: storage.write_tensors(sys.argv[1], {'a': torch.zeros(10**6)})\n"
        "except storage.UserError as error: print(error.exit_code, error)\n"
    )
    path = tmp_path / "a.safetensors"
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith("1 No space left"), done
    assert storage.read_tensors(path)["a"].shape == (4,)
    assert _content(tmp_path) == ["a.safetensors"]


# ---- folders ---------------------------------------------------------------------------------


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_is_replaced_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(storage, "_exchange", lambda *_: False)
    path = tmp_path / "model"
    for turn in range(2):
        with storage.replace_folder(path) as temporary:
            (temporary / "sub").mkdir()
            (temporary / "sub" / f"{turn}.txt").write_text("x")
    assert _content(path / "sub") == ["1.txt"]
    assert _content(tmp_path) == ["model"]


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_a_failed_folder_leaves_the_old_one(tmp_path: Path, kind: type[BaseException]) -> None:
    path = tmp_path / "model"
    with storage.replace_folder(path) as temporary:
        (temporary / "old").write_text("x")
    with pytest.raises(kind):  # noqa: PT012, SIM117 - the body is what fails
        with storage.replace_folder(path) as temporary:
            (temporary / "new").write_text("x")
            raise kind
    assert _content(path) == ["old"]
    assert _content(tmp_path) == ["model"]


def test_a_folder_does_not_replace_a_file(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("x")
    with pytest.raises(UserError, match="model"), storage.replace_folder(tmp_path / "model"):
        pass
    assert (tmp_path / "model").read_text() == "x"


# ---- JSON ------------------------------------------------------------------------------------


def test_json_round_trip(tmp_path: Path) -> None:
    value = {"name": "β²", "numbers": [1, 2.5, None, True]}
    storage.write_json(tmp_path / "a.json", value)
    assert storage.read_json(tmp_path / "a.json") == value
    assert "β²" in (tmp_path / "a.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("data", [b"", b'{"a": ', b"\xff\xfe\x00"])
def test_broken_json_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(UserError, match=r"a\.json"):
        storage.read_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    "read", [storage.read_json, storage.read_tensors, storage.read_metadata, storage.read_pickle]
)
def test_a_missing_file_or_a_folder_is_named(tmp_path: Path, read: object) -> None:
    assert callable(read)
    with pytest.raises(UserError, match="no file"):
        read(tmp_path / "absent")
    with pytest.raises(UserError, match=tmp_path.name):
        read(tmp_path)


# ---- tensors ---------------------------------------------------------------------------------


def _tensors() -> dict[str, Tensor]:
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    return {
        "base": base,
        "tied": base,
        "row": base[1],
        "transposed": base.T,
        "bf16": base.to(torch.bfloat16),
        "scalar": torch.tensor(3),
        "empty": torch.empty(0, 5),
        "empty too": torch.empty(0),
        "weight": torch.nn.Parameter(torch.ones(2)),
    }


def test_tensors_round_trip_with_shared_and_strided_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    storage.write_tensors(path, _tensors(), {"made by": "test"})
    back = storage.read_tensors(path)
    assert back.keys() == _tensors().keys()
    for name, tensor in _tensors().items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)
    assert storage.read_metadata(path) == {"made by": "test"}
    storage.write_tensors(path, {})
    assert storage.read_tensors(path) == {}
    assert storage.read_metadata(path) == {}


def test_written_tensors_have_the_usual_permissions(tmp_path: Path) -> None:
    storage.write_tensors(tmp_path / "a.safetensors", _tensors())
    storage.write_json(tmp_path / "a.json", 1)
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_cut_off_safetensors_file_is_named(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "a.safetensors"
    storage.write_tensors(path, _tensors())
    path.write_bytes(path.read_bytes()[:keep])
    for read in (storage.read_tensors, storage.read_metadata):
        with pytest.raises(UserError, match=r"a\.safetensors is not a whole"):
            read(path)


def test_the_fingerprint_sees_names_types_shapes_and_values() -> None:
    tensors = _tensors()
    print_ = storage.fingerprint(tensors)
    assert print_ == storage.fingerprint(dict(reversed(tensors.items())))
    variants = [
        {**tensors, "base": tensors["base"] + 1},
        {**tensors, "base": tensors["base"].reshape(4, 3)},
        {**tensors, "scalar": tensors["scalar"].int()},
        {**tensors, "empty": torch.empty(0, 6)},
        {("Base" if name == "base" else name): tensor for name, tensor in tensors.items()},
    ]
    assert len({print_, *map(storage.fingerprint, variants)}) == 6


def test_file_sha256(tmp_path: Path) -> None:
    storage.write_bytes(tmp_path / "a", b"abc")
    assert storage.file_sha256(tmp_path / "a").startswith("ba7816bf8f01cfea")


# ---- pickles ---------------------------------------------------------------------------------


class _Trap:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.mkdir, ("trap-was-sprung",))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_released_state_dict_is_read(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "a.pth"
    value = {"trainer": {"vae": {"w": torch.ones(3, dtype=torch.bfloat16)}}, "epoch": 3}
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    back = storage.read_pickle(path)
    assert isinstance(back, dict)
    assert back["epoch"] == 3
    assert torch.equal(back["trainer"]["vae"]["w"], torch.ones(3, dtype=torch.bfloat16))


@pytest.mark.parametrize("form", ["zip", "old", "plain", "module"])
def test_a_pickle_with_code_in_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.pth"
    if form == "plain":
        path.write_bytes(pickle.dumps(_Trap()))
    else:
        value = torch.nn.Linear(2, 2) if form == "module" else {"w": torch.ones(2), "x": _Trap()}
        torch.save(value, path, _use_new_zipfile_serialization=form != "old")
    with pytest.raises(UserError, match="objects other than tensors and was refused"):
        storage.read_pickle(path)
    assert _content(tmp_path) == ["a.pth"]


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("keep", [0, 3, 40, 300, -10])
def test_a_cut_off_pickle_is_named(tmp_path: Path, zipped: bool, keep: int) -> None:
    path = tmp_path / "a.pth"
    torch.save({"w": torch.ones(100)}, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"a\.pth is not a whole PyTorch file"):
        storage.read_pickle(path)


def test_another_kind_of_file_is_no_pickle(tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_text("<html>not found</html>")
    with pytest.raises(UserError, match="not a whole PyTorch file"):
        storage.read_pickle(tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "b.pth", "w") as file:
        file.writestr("readme", "hello")
    with pytest.raises(UserError, match="not a whole PyTorch file"):
        storage.read_pickle(tmp_path / "b.pth")


# ---- finding models --------------------------------------------------------------------------


@pytest.fixture
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    assets = tmp_path / "assets"
    for name in ("scenes", "digits"):
        storage.write_json(assets / name / "model_index.json", {})
    (assets / "not-a-model").mkdir()
    monkeypatch.setattr(storage, "ASSETS", assets)
    monkeypatch.chdir(tmp_path)
    return assets


def test_a_bundled_name_comes_before_a_folder(assets: Path, tmp_path: Path) -> None:
    assert storage.bundled_names() == ["digits", "scenes"]
    (tmp_path / "scenes").mkdir()
    assert storage.resolve_model("scenes") == assets / "scenes"


def test_an_existing_folder_is_taken(assets: Path, tmp_path: Path) -> None:
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    assert storage.resolve_model("runs/mine") == Path("runs/mine")
    assert storage.resolve_model(tmp_path / "runs") == tmp_path / "runs"


@pytest.mark.parametrize("name", ["scene", "", "a/b/c", "./absent", "/absent", "../absent"])
def test_an_unknown_name_lists_the_bundled_ones(assets: Path, name: str) -> None:
    with pytest.raises(UserError, match="digits, scenes") as caught:
        storage.resolve_model(name)
    assert ("Did you mean 'scenes'?" in str(caught.value)) == (name == "scene")
    assert caught.value.exit_code == 2


def test_a_hub_model_that_is_not_cached_is_explained(assets: Path) -> None:
    with pytest.raises(UserError, match="local cache") as caught:
        storage.resolve_model("owner/absent-model", local_files_only=True)
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)


def test_a_failed_download_is_one_line(assets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def fail(*_: object, **__: object) -> str:
        raise ConnectionResetError("connection reset\nand much more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match="connection reset") as caught:
        storage.resolve_model("owner/model")
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)


def test_a_hub_model_is_downloaded_at_its_revision(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: dict[str, object] = {}

    def download(repo: str, **options: object) -> str:
        asked.update(options, repo=repo)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert storage.resolve_model("owner/model", revision="v1") == tmp_path
    assert asked["repo"] == "owner/model"
    assert asked["revision"] == "v1"
    assert not any("bin" in pattern for pattern in asked["allow_patterns"])  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("inside", "message"),
    [
        ("adapter_config.json", "is a LoRA: pass its base"),
        ("model/model_index.json", r"is a training run; its model is .*model"),
        ("notes.txt", r"model_index\.json"),
    ],
)
def test_a_folder_that_is_no_model_is_named(tmp_path: Path, inside: str, message: str) -> None:
    (tmp_path / inside).parent.mkdir(exist_ok=True)
    (tmp_path / inside).write_text("{}")
    with pytest.raises(UserError, match=message):
        storage.check_model(tmp_path)


def test_a_revision_of_a_local_model_is_refused(assets: Path) -> None:
    with pytest.raises(UserError, match="revision"):
        storage.resolve_model("scenes", revision="main")


def test_json_files_end_in_a_newline(tmp_path: Path) -> None:
    storage.write_json(tmp_path / "a.json", {})
    text = (tmp_path / "a.json").read_text()
    assert text.endswith("\n")
    assert json.loads(text) == {}
