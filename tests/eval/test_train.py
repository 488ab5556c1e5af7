"""The trainers of the small networks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nextscale.data.captions import parse
from nextscale.data.checker import falsifiable, judge
from nextscale.data.scenes import HELD_OUT, sample_scene
from nextscale.data.sources import open_source
from nextscale.errors import UserError
from nextscale.eval.clip import load_clip
from nextscale.eval.contrastive import (
    PLACED,
    centre_loss,
    centres,
    contrastive_loss,
    one_change,
    rank_first,
    twins,
)
from nextscale.eval.feature_network import FeatureNetwork
from nextscale.eval.train_clip import ClipTrainingConfig, train_clip
from nextscale.eval.train_features import FeaturesTrainingConfig, train_features

pytest.importorskip("timm")
pytest.importorskip("open_clip")
COMMON: dict[str, Any] = {
    "resolution": 32,
    "max_train_steps": 30,
    "train_batch_size": 32,
    "num_validation_images": 60,
    "learning_rate": 3e-3,
    "mixed_precision": "no",
    "report_to": "none",
    "logging_steps": 5,
}


def log(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def features_config(folder: Path, **changes: Any) -> FeaturesTrainingConfig:
    small: dict[str, Any] = {"channels": (8, 8, 16, 16), "num_phrases": 40}
    return FeaturesTrainingConfig(output_dir=str(folder), **{**COMMON, **small, **changes})


def clip_config(folder: Path, **changes: Any) -> ClipTrainingConfig:
    small: dict[str, Any] = {"image_width": 8, "text_width": 32, "text_layers": 1}
    small |= {"embed_dim": 32, "hard_negatives": 2, "context_length": 24}
    return ClipTrainingConfig(output_dir=str(folder), **{**COMMON, **small, **changes})


def test_features_learn_and_are_saved(tmp_path: Path) -> None:
    result = train_features(features_config(tmp_path), progress=False)
    losses = [line["loss"] for line in log(tmp_path) if "loss" in line]
    assert losses[-1] < 0.7 * losses[0]
    assert {"val/loss", "val/phrases", "val/faults"} <= set(result.metrics)
    network = FeatureNetwork.from_pretrained(tmp_path / "model")
    assert (network.dim, network.config.resolution) == (16, 32)
    assert (network(torch.zeros(2, 3, 32, 32)) >= 0).all()


def test_features_of_classes(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for kind, color in enumerate([(250, 0, 0), (0, 0, 250)]):
        (data / str(kind)).mkdir(parents=True)
        for i in range(40):
            Image.new("RGB", (32, 32), color).save(data / str(kind) / f"{i}.png")
    changes = {"dataset": str(data), "degraded": 0.0, "learning_rate": 1e-2, "max_train_steps": 60}
    train_features(features_config(tmp_path / "run", **changes), progress=False)
    losses = [line["phrases"] for line in log(tmp_path / "run") if "phrases" in line]
    assert losses[-1] < 0.2 * losses[0]


def test_clip_learns_and_is_saved(tmp_path: Path) -> None:
    result = train_clip(clip_config(tmp_path), progress=False)
    losses = [line["loss"] for line in log(tmp_path) if "loss" in line]
    assert losses[-1] < losses[0] - 0.5
    assert 0 <= result.metrics["val/rank_1"] <= 1
    clip = load_clip(tmp_path / "model")
    assert clip.size == 32
    pixels = list(open_source("scenes", resolution=32).load(np.arange(3)).images.numpy())
    assert clip.images([p.transpose(1, 2, 0) for p in pixels]).shape == (3, 32)


def test_clip_tells_centres_from_pictures_and_texts(tmp_path: Path) -> None:
    config = clip_config(tmp_path, centre_weight=4.0, hard_relations=True, max_train_steps=60)
    train_clip(config, progress=False)
    for name in ("centres", "text_centres"):
        values = [line[name] for line in log(tmp_path) if name in line]
        assert values[-1] < 0.8 * values[0], name
    clip = load_clip(tmp_path / "model")  # what told them is not kept
    assert not [name for name in clip.model.state_dict() if "head" in name]


def test_false_relations_come_first() -> None:
    scene = next(s for s in (sample_scene(2, i) for i in range(99)) if s.caption.relation)
    false = {str(c) for c in falsifiable(scene.caption, scene)["relation"]}
    found = one_change(scene, 8, np.random.default_rng(0), relations=True)
    assert set(found[: len(false)]) == false
    assert len(set(found)) == 8
    plain = next(s for s in (sample_scene(2, i) for i in range(99)) if not s.caption.relation)
    rows = [one_change(plain, 3, np.random.default_rng(1), relations=r) for r in (False, True)]
    assert rows[0] == rows[1]


def test_training_repeats_and_resumes(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    train_clip(clip_config(one, max_train_steps=6, logging_steps=1), progress=False)
    settings = {"logging_steps": 1, "lr_scheduler": "constant", "checkpointing_steps": 3}
    train_clip(clip_config(other, max_train_steps=3, **settings), progress=False)
    again = {**settings, "resume_from_checkpoint": "latest"}
    train_clip(clip_config(other, max_train_steps=6, **again), progress=False)
    a, b = ([line["loss"] for line in log(f) if "loss" in line] for f in (one, other))
    assert a == pytest.approx(b, rel=1e-5)


def test_contrastive_loss_against_a_loop() -> None:
    torch.manual_seed(0)
    images, texts = (torch.nn.functional.normalize(torch.randn(4, 8), dim=1) for _ in range(2))
    negatives = torch.nn.functional.normalize(torch.randn(4, 3, 8), dim=2)
    same = twins(["a", "b", "a", "c"])
    assert same.nonzero().tolist() == [[0, 2], [2, 0]]
    loss, hits = contrastive_loss(images, texts, negatives, same, torch.tensor(5.0))
    total, right = 0.0, 0
    for i in range(4):
        rivals = [texts[j] for j in range(4) if not same[i, j]] + list(negatives[i])
        scores = torch.stack([5 * images[i] @ t for t in rivals])
        own = 5 * images[i] @ texts[i]
        right += int(scores.max() == own)
        pictures = torch.stack([5 * texts[i] @ images[j] for j in range(4) if not same[i, j]])
        total += float(scores.logsumexp(0) - own) + float(pictures.logsumexp(0) - own)
    assert float(loss) == pytest.approx(total / 8, rel=1e-5)
    assert float(hits) == right / 4


def test_one_change_is_false_of_the_scene() -> None:
    for index in range(60):
        scene = sample_scene(2, index)
        rng = np.random.default_rng(index)
        found = one_change(scene, 8, rng)
        assert len(found) == 8
        assert len(set(found)) >= min(8, len(set(one_change(scene, 40, rng))))
        for text in found:
            assert not all(s.holds for s in judge(scene.shapes, parse(text))), (index, text)


def test_every_kind_of_change_gets_its_turn() -> None:
    scene = next(s for s in (sample_scene(2, i) for i in range(99)) if s.caption.relation)
    first = {one_change(scene, 1, np.random.default_rng(seed))[0] for seed in range(200)}
    kinds = falsifiable(scene.caption, scene)
    assert len(kinds) >= 5
    for kind, captions in kinds.items():
        share = len(first & {str(caption) for caption in captions})
        assert share > 0, kind


def test_centres_are_those_of_the_shapes() -> None:
    scenes = [sample_scene(2, i) for i in range(50)]
    found = centres(scenes)
    for scene, rows in zip(scenes, found, strict=True):
        for (attribute, value), row in zip(PLACED, rows, strict=True):
            here = [s for s in scene.shapes if getattr(s, attribute) == value]
            assert bool(row.isnan().any()) == (not here)
            if here:
                assert float(row[0]) == pytest.approx(sum(s.x for s in here) / len(here) - 0.5)
                assert float(row[1]) == pytest.approx(sum(s.y for s in here) / len(here) - 0.5)
    wrong = found.nan_to_num(7) + 0.5  # what is told of shapes that are not there costs nothing
    assert float(centre_loss(wrong, found)) == pytest.approx(12 * 0.25)


def test_rank_first_counts_the_right_captions() -> None:
    class Fake:
        def texts(self, prompts: list[str]) -> torch.Tensor:
            return torch.eye(6)[[int(p) for p in prompts]]

    vectors = torch.eye(6)
    captions = [str(i) for i in range(6)]
    false = [[captions[(i + 1) % 6]] for i in range(6)]
    assert rank_first(Fake(), vectors, captions, false, among=4) == 1  # pyright: ignore
    vectors[0] = vectors[1]
    assert rank_first(Fake(), vectors, captions, false, among=4) == 5 / 6  # pyright: ignore


def test_captions_that_are_true_too_are_no_rivals() -> None:
    class Fake:
        def texts(self, prompts: list[str]) -> torch.Tensor:
            return torch.tensor([[1.0 + ("small" in p or "large" in p)] for p in prompts])

    scene = next(
        s
        for s in (sample_scene(2, i) for i in range(99))
        if str(s.caption).startswith("a ") and str(s.caption).count(" ") == 2
    )
    size, own = scene.shapes[0].size, str(scene.caption)
    captions = [own, own.replace("a ", f"a {size} ")]
    settings = {"clip": Fake(), "images": torch.ones(2, 1), "captions": captions, "false": [[], []]}
    assert rank_first(**settings) == 0.5  # pyright: ignore
    assert rank_first(**settings, scenes=[scene, scene]) == 1  # pyright: ignore


def test_all_pairs_are_in_scenes_all() -> None:
    batch = open_source("scenes-all", resolution=32).load(np.arange(40))
    held = [
        any((g.color, g.shape) in HELD_OUT for g in scene.caption.groups)
        for scene in batch.extra["scene"]
    ]
    assert held == [i % 5 == 0 for i in range(40)]
    plain = open_source("scenes", resolution=32)
    assert batch.captions is not None
    assert plain.captions(np.arange(1, 5)) == batch.captions[1:5]


def test_bad_settings_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="use_ema is True, but must be false"):
        features_config(tmp_path, use_ema=True)
    with pytest.raises(UserError, match="resolution is 40, but must be a multiple of 32"):
        clip_config(tmp_path, resolution=40)
    with pytest.raises(UserError, match="needs captions"):
        train_clip(clip_config(tmp_path, dataset="digits"), progress=False)
    folder = tmp_path / "captioned"
    folder.mkdir()
    rows = []
    for i in range(40):
        Image.new("RGB", (32, 32), (i, 0, 0)).save(folder / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "text": f"number {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    for name in ("hard_negatives", "centre_weight"):
        plain = {"hard_negatives": 0, "centre_weight": 0.0, name: 1}
        with pytest.raises(UserError, match=f"{name} needs scenes"):
            train_clip(clip_config(tmp_path / name, dataset=str(folder), **plain), progress=False)
