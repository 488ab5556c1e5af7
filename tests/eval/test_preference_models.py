"""Preference models on tiny random weights; where there are none, what the person is told."""

from __future__ import annotations

import json
import sys
import types
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nextscale import storage
from nextscale.errors import MissingExtraError, UserError
from nextscale.eval import preference_models
from nextscale.eval.clip import Clip, Vocabulary
from nextscale.eval.preference_models import aesthetic, hpsv2, imagereward, pickscore

open_clip = pytest.importorskip("open_clip")
PROMPTS = ["a red dog", "a dog", "two cats!"]


@pytest.fixture(autouse=True)
def _no_weights_around(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("PICKSCORE", "HPSV2", "IMAGEREWARD", "AESTHETIC"):
        monkeypatch.delenv(f"NEXTSCALE_{name}", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("NEXTSCALE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


def images(count: int = 3, side: int = 40, height: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 3, height or side, side, generator=generator)


def normalised(pixels: Tensor) -> Tensor:
    mean, std = (
        torch.tensor(values)[:, None, None]
        for values in (preference_models.MEAN, preference_models.STD)
    )
    return ((pixels * 255 + 0.5).floor() / 255 - mean) / std


def tiny_pickscore(folder: Path, **changes: Any) -> Path:
    from transformers import CLIPConfig, CLIPModel

    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    tower |= {"num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**tower, "vocab_size": 49408, "eos_token_id": 49407, **changes},
        vision_config={**tower, "image_size": 32, "patch_size": 16},
        projection_dim=8,
    )
    torch.manual_seed(0)
    model = CLIPModel(config)
    folder.mkdir()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["text_model.embeddings.position_ids"] = torch.arange(77)[None]  # as old files
    storage.write_tensors(folder / "model.safetensors", state)
    storage.write_json(folder / "config.json", config.to_dict())
    return folder / "model.safetensors"


@pytest.mark.parametrize("eos", [49407, 2])  # 2 stands in old configurations
def test_pickscore_is_the_models_own_logit(tmp_path: Path, eos: int) -> None:
    transformers = pytest.importorskip("transformers")
    path = tiny_pickscore(tmp_path / "pick", eos_token_id=eos)
    scorer = pickscore(str(path))
    pixels = images(side=32)
    found = scorer(pixels, PROMPTS)
    model = transformers.CLIPModel(transformers.CLIPConfig.from_pretrained(path.parent)).eval()
    state = storage.read_tensors(path)
    state.pop("text_model.embeddings.position_ids")
    model.load_state_dict(state)
    ids = open_clip.SimpleTokenizer()(PROMPTS)
    # The released processor pads with the end symbol.
    padded = torch.where(ids == 0, 49407, ids) if eos == 49407 else ids
    with torch.no_grad():
        out = model(input_ids=padded, pixel_values=normalised(pixels))
    torch.testing.assert_close(found, out.logits_per_image.diagonal(), rtol=1e-4, atol=1e-4)
    assert found.shape == (3,)
    assert found.dtype == torch.float32


def test_pickscore_refuses_other_weights(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    path = tiny_pickscore(tmp_path / "pick")
    storage.write_tensors(path, {"a": torch.zeros(2)})
    with pytest.raises(UserError, match="does not fit the model"):
        pickscore(str(path))
    path.with_name("config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json"):
        pickscore(str(path))


@pytest.fixture
def architecture(tmp_path: Path) -> str:
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8},
        "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2},
    }
    config["vision_cfg"]["patch_size"] = 16
    config["text_cfg"]["layers"] = 1
    (tmp_path / "tiny-hps.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-hps.json")
    return "tiny-hps"


def test_hpsv2_is_the_cosine_of_padded_pictures(tmp_path: Path, architecture: str) -> None:
    torch.manual_seed(0)
    model = open_clip.create_model(architecture)
    path = tmp_path / "hps.pt"
    torch.save({"state_dict": model.state_dict()}, path)
    scorer = hpsv2(str(path), architecture=architecture)
    wide = images(side=32, height=16)
    padded = torch.zeros(3, 3, 32, 32)
    padded[:, :, 8:24] = wide
    tokens = open_clip.SimpleTokenizer(context_length=8)(PROMPTS)
    model.eval()
    with torch.no_grad():
        pictures, texts = (
            model.encode_image(normalised(padded), normalize=True),
            model.encode_text(tokens, normalize=True),
        )
    expected = (pictures * texts).sum(dim=1)
    torch.testing.assert_close(scorer(wide, PROMPTS), expected, rtol=1e-4, atol=1e-4)
    torch.save({"state_dict": {"a": torch.zeros(2)}}, path)
    with pytest.raises(UserError, match="does not fit the model"):
        hpsv2(str(path), architecture=architecture)
    torch.save([torch.zeros(2)], path)
    with pytest.raises(UserError, match="holds no weights by name"):
        hpsv2(str(path), architecture=architecture)


def test_aesthetic_is_the_perceptron_on_unit_vectors(tmp_path: Path, architecture: str) -> None:
    torch.manual_seed(0)
    settings = {"size": 32, "interpolation": "bicubic"}
    clip = Clip(open_clip.create_model(architecture), Vocabulary(8), settings, "tiny")
    sizes = (16, 1024, 128, 64, 16, 1)
    places = (0, 2, 4, 6, 7)  # the released names: dropouts stand between
    layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    state = {
        f"layers.{place}.{kind}": getattr(layer, kind).detach()
        for place, layer in zip(places, layers, strict=True)
        for kind in ("weight", "bias")
    }
    path = tmp_path / "head.pth"
    torch.save(state, path)
    pixels = images()
    found = aesthetic(str(path), clip=clip)(pixels, [""] * 3)
    uint8 = (pixels * 255 + 0.5).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    with torch.no_grad():
        expected = nn.Sequential(*layers)(clip.images(list(uint8)))[:, 0]
    torch.testing.assert_close(found, expected)
    assert found.std() > 0


def test_imagereward_asks_the_authors_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ImageReward", None)
    with pytest.raises(MissingExtraError, match="image-reward, in an environment"):
        imagereward()
    calls: dict[str, Any] = {}

    def load(name: str, device: str, download_root: str) -> Any:
        calls.update(name=name, root=download_root)
        return types.SimpleNamespace(score=lambda prompt, picture: len(prompt) + picture.size[0])

    fake: Any = types.ModuleType("ImageReward")
    fake.load = load
    monkeypatch.setitem(sys.modules, "ImageReward", fake)
    (tmp_path / "ImageReward.pt").write_bytes(b"")
    monkeypatch.setenv("NEXTSCALE_IMAGEREWARD", str(tmp_path / "ImageReward.pt"))
    assert imagereward()(images(), PROMPTS).tolist() == [49, 45, 49]
    assert calls == {"name": str(tmp_path / "ImageReward.pt"), "root": str(tmp_path)}

    def fail(*args: Any, **options: Any) -> Any:
        raise OSError("no med_config.json\nand more")

    fake.load = fail
    with pytest.raises(UserError, match=r"no med_config.json\. It also needs") as found:
        imagereward()
    assert found.value.exit_code == 1


@pytest.mark.parametrize(
    ("name", "ways"),
    [
        ("pickscore", "PickScore_v1 and pass pickscore:FILE or set NEXTSCALE_PICKSCORE"),
        ("hpsv2", "xswu/HPSv2 and pass hpsv2:FILE or set NEXTSCALE_HPSV2"),
        ("aesthetic", "linearMSE.pth and pass aesthetic:FILE or set NEXTSCALE_AESTHETIC"),
    ],
)
def test_without_weights_every_way_out_is_told(name: str, ways: str) -> None:
    from nextscale.align.rewards import open_reward

    pytest.importorskip("transformers")
    with pytest.raises(UserError, match=ways) as found:
        open_reward(name)
    assert found.value.exit_code == 1
    with pytest.raises(UserError, match=f"{name}:FILE names the file nowhere, which is not there"):
        open_reward(f"{name}:nowhere")
