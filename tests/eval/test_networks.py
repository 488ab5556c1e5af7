"""Networks besides Inception, on tiny random weights: CLIP, DINOv2, LPIPS, the small ones."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_network import pictures

from nextscale import storage
from nextscale.errors import UserError
from nextscale.eval import evaluate
from nextscale.eval.clip import (
    CONFIG,
    Clip,
    ClipFeatures,
    Vocabulary,
    clip_scorer,
    load_clip,
    open_clip_model,
    save_clip,
)
from nextscale.eval.feature_network import FeatureNetwork, FeatureNetworkConfig, SmallFeatures
from nextscale.eval.frechet import Moments, frechet_distance
from nextscale.eval.pairwise import rbf_distance
from nextscale.eval.reconstruction import load_lpips
from nextscale.eval.scorers import Scored
from nextscale.eval.scores import clip_scores
from nextscale.eval.weights import WeightFile, find_weights

open_clip = pytest.importorskip("open_clip")
pytest.importorskip("timm")
PROMPTS = ["a red dog", "a dog", "two cats!", "a red cat"]


def small_clip(tmp_path: Path, seed: int = 0, vocabulary: Vocabulary | None = None) -> Path:
    vocabulary = vocabulary or Vocabulary.of(PROMPTS, 8)
    settings = {
        "model_cfg": {
            "embed_dim": 16,
            "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 4, "head_width": 32},
            "text_cfg": {
                "context_length": 8,
                "vocab_size": vocabulary.size,
                "width": 16,
                "heads": 2,
                "layers": 1,
            },
        },
        "preprocess_cfg": {"size": 32, "mean": [0.5] * 3, "std": [0.25] * 3},
    }
    torch.manual_seed(seed)
    model = open_clip.CLIP(**settings["model_cfg"])
    save_clip(model, vocabulary, settings, tmp_path / "clip")
    return tmp_path / "clip"


def test_vocabulary_keeps_the_words_it_met() -> None:
    small, whole = Vocabulary.of(PROMPTS, 8), Vocabulary(8)
    ids, rows = whole(PROMPTS), small(PROMPTS)
    assert (ids.argmax(dim=1) == rows.argmax(dim=1)).all()  # the end symbol stays the highest
    assert len(set(ids.flatten().tolist())) == len(set(rows.flatten().tolist()))
    assert small(["a green dog"])[0, 2] == 1  # unknown
    assert (small(["a red dog"]) == rows[:1]).all()
    assert small.cut(["a a a a a a", "a a a a a a a"]) == 1


def test_clip_folder_is_open_clips(tmp_path: Path) -> None:
    folder = small_clip(tmp_path)
    ours = load_clip(folder)
    theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    pixels = list(pictures(5, side=40))
    batch = torch.stack([transform(Image.fromarray(p)) for p in pixels])  # pyright: ignore
    theirs.eval()
    with torch.no_grad():
        expected = theirs.encode_image(batch, normalize=True)
        texts = theirs.encode_text(ours.vocabulary(PROMPTS), normalize=True)
    torch.testing.assert_close(ours.images(pixels), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.texts([*PROMPTS, PROMPTS[0]])[:4], texts)


def test_clip_metrics(tmp_path: Path) -> None:
    clip = load_clip(small_clip(tmp_path))
    fake, real = pictures(24, 1, side=32), pictures(30, 2, side=32)
    prompts = [PROMPTS[i % 4] for i in range(24)]
    record = evaluate(
        fake,
        real,
        network=ClipFeatures(clip, ["clip", "cmmd"]),
        sample_networks=[Scored({"cosine": clip_scorer(clip)}, prompts, clip.name)],
        prompts=prompts,
        metrics=["clip", "cmmd", "fd_clip", "kid_clip", "prc_clip", "vendi_clip"],
        batch_size=7,
    )["metrics"]
    x, y = (clip.images(list(p)) for p in (real, fake))
    biased, unbiased = rbf_distance(x, y)
    assert record[f"cmmd[{clip.name}]"]["value"] == pytest.approx(1000 * biased, rel=1e-4)
    assert record[f"cmmd_unbiased[{clip.name}]"]["value"] == pytest.approx(
        1000 * unbiased, rel=1e-3
    )
    moments = [Moments.of(v.double()) for v in (x, y)]
    expected = frechet_distance(*(t for m in moments for t in (m.mean, m.covariance)))
    assert record[f"fd_clip[{clip.name}]"]["value"] == pytest.approx(expected, rel=1e-4)
    cosines = (y * clip.texts(prompts)).sum(dim=1)
    for name, value in clip_scores(cosines).items():
        assert record[f"{name}[{clip.name}]"]["value"] == pytest.approx(value, rel=1e-5)
    for name in ("kid_clip", "recall_clip", "vendi_clip"):
        assert f"{name}[{clip.name}]" in record
    assert clip.name == f"{tmp_path.name}/clip"  # no place of this machine


def test_released_clip_without_weights(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NEXTSCALE_CLIP", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="--clip_weights FILE or set NEXTSCALE_CLIP") as found:
        open_clip_model("ViT-B-32-quickgelu")
    assert found.value.exit_code == 1
    with pytest.raises(UserError, match=r"no architecture of open_clip. Near: ViT-B-32"):
        open_clip_model("ViT-B-33")
    with pytest.raises(UserError, match='no hub weights "nobody"'):
        open_clip_model("ViT-B-32:nobody")
    wrong = tmp_path / "wrong.safetensors"
    storage.write_tensors(wrong, {"a": torch.zeros(2)})
    with pytest.raises(UserError, match="does not hold the weights of RN50"):
        open_clip_model("RN50", str(wrong))
    (tmp_path / CONFIG).write_text(json.dumps({"model_cfg": {}}))
    with pytest.raises(UserError, match="describes no CLIP model"):
        load_clip(tmp_path)


def test_released_clip_from_a_file(tmp_path: Path) -> None:
    open_clip.add_model_config(_tiny_architecture(tmp_path))
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-quickgelu")
    path = tmp_path / "w.safetensors"
    storage.write_tensors(path, dict(model.state_dict()))
    clip = open_clip_model("tiny-quickgelu", str(path))
    assert (clip.dim, clip.size) == (16, 32)
    pixels = list(pictures(3, side=50))
    again = Clip(model, Vocabulary(8), {"size": 32}, "x")
    torch.testing.assert_close(clip.images(pixels), again.images(pixels))


def _tiny_architecture(folder: Path) -> Path:
    text = {"context_length": 8, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1}
    vision = {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16}
    config = {"embed_dim": 16, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    path = folder / "tiny-quickgelu.json"
    path.write_text(json.dumps(config))
    return path


def test_dinov2_features(tmp_path: Path, monkeypatch) -> None:
    import timm

    from nextscale.eval.dinov2 import WEIGHTS, DinoV2
    from nextscale.eval.weights import find_weights

    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=0, img_size=160)
    path = tmp_path / "model.safetensors"
    storage.write_tensors(path, dict(model.state_dict()))
    network = DinoV2(path, architecture="test_vit")
    pixels = list(pictures(3, side=40))
    found = network(pixels)["dinov2"]
    assert found.shape == (3, network.taps["dinov2"])
    resized = np.stack([np.asarray(Image.fromarray(p).resize((224, 224), 3)) for p in pixels])
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    x = torch.from_numpy((resized / 255 - mean) / std).permute(0, 3, 1, 2).float()
    model = timm.create_model("test_vit", num_classes=0, img_size=224)
    state = timm.models.vision_transformer.checkpoint_filter_fn(storage.read_tensors(path), model)
    model.load_state_dict(state)
    model.eval()
    with torch.no_grad():
        expected = model.forward_features(x)[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    storage.write_tensors(path, {"a": torch.zeros(2)})
    with pytest.raises(UserError, match="does not hold test_vit"):
        DinoV2(path, architecture="test_vit")
    monkeypatch.delenv("NEXTSCALE_DINOV2", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="set NEXTSCALE_DINOV2") as error:
        find_weights(WEIGHTS)
    assert error.value.exit_code == 1


def test_lpips_is_torchmetrics() -> None:
    torchvision = pytest.importorskip("torchvision")
    metrics = pytest.importorskip("torchmetrics.functional.image.lpips")
    torch.manual_seed(0)
    weights = torchvision.models.alexnet(weights=None).state_dict()
    network = load_lpips(weights)
    theirs = metrics._LPIPS(pretrained=True, net="alex", pnet_rand=True)
    for name, tensor in theirs.net.state_dict().items():
        tensor.copy_(weights[f"features.{name.split('.', 1)[1]}"])
    originals, pixels = pictures(3, 1, side=64), pictures(3, 2, side=64)
    record = evaluate(pixels, originals, metrics=["lpips"], lpips=network)["metrics"]["lpips"]
    both = (torch.from_numpy(p / 255).permute(0, 3, 1, 2).float() for p in (pixels, originals))
    x, y = (2 * pixel - 1 for pixel in both)
    assert record["value"] == pytest.approx(float(theirs(x, y).mean()), rel=1e-5)
    assert record["higher_is_better"] is False
    with pytest.raises(UserError, match=r"features.0.weight is missing"):
        load_lpips({})


def test_small_features_round_trip(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = FeatureNetwork(FeatureNetworkConfig(resolution=32, channels=(8, 8, 8, 12)))
    network.save_pretrained(tmp_path)
    again = FeatureNetwork.from_pretrained(tmp_path)
    x = torch.randn(4, 3, 32, 32)
    network.eval()
    with torch.no_grad():
        torch.testing.assert_close(again(x), network(x), rtol=1e-2, atol=1e-2)
    mine = SmallFeatures(again, "mine")
    record = evaluate(
        pictures(30, side=32),
        pictures(40, 1, side=32),
        network=mine,
        metrics=["fd_scenes", "vendi_scenes"],
    )
    assert set(record["metrics"]) == {"fd_scenes[mine]", "vendi_scenes[mine]"}
    assert not any("50,000" in warning for warning in record["warnings"])
    with pytest.raises(UserError, match="mine reads pictures of 32x32, got 16x16"):
        evaluate(pictures(30), pictures(40, 1), network=mine, metrics=["fd_scenes"])
    with pytest.raises(UserError, match="end in 128 or less"):
        FeatureNetworkConfig(channels=(8, 8, 8, 129))


def test_weights_are_downloaded_once_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "public.pth"
    source.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    monkeypatch.setenv("NEXTSCALE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    file = WeightFile(("w.pth",), (source.as_uri(),), digest[:8], "NEXTSCALE_W", "--w")
    with pytest.raises(UserError, match="are not on this machine"):
        find_weights(file)
    with pytest.raises(UserError, match="could not be downloaded"):  # another file than announced
        find_weights(replace(file, sha256="0" * 8), download=True)
    assert not list((tmp_path / "cache").iterdir())
    found = find_weights(file, download=True)
    assert found.read_bytes() == b"weights"
    source.unlink()
    assert find_weights(file) == find_weights(file, download=True) == found
    gone = replace(file, names=("other.pth",))
    with pytest.raises(UserError, match="could not be downloaded"):
        find_weights(gone, download=True)
