"""Rewards: the convention and its messages, those without weights, sets, servers, the guard."""

from __future__ import annotations

import base64
import importlib.machinery
import io
import json
import math
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from nextscale import storage
from nextscale.align.rewards import (
    REWARDS,
    HeldOutMonitor,
    PairwiseReward,
    RewardOutput,
    RewardTrend,
    as_reward,
    combine,
    normalized,
    open_reward,
    pairwise_column,
    preference_scores,
    score,
    set_column,
    set_features,
    set_score,
)
from nextscale.align.rewards.classifier import classifier_reward
from nextscale.align.rewards.distribution import (
    FrechetReward,
    VendiReward,
    instance_to_distribution,
    warn_of_small_sets,
)
from nextscale.align.rewards.ocr import ocr_reward, open_recogniser
from nextscale.align.rewards.remote import http_reward
from nextscale.data.checker import check_batch
from nextscale.data.scenes import sample_scene
from nextscale.data.sources import open_source
from nextscale.errors import MissingExtraError, UserError
from nextscale.eval.frechet import Moments, frechet_distance
from nextscale.eval.pairwise import vendi_score

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/align/dragon.json").read_text())
DOUBLE: dict[str, Any] = {"dtype": torch.float64}
TIGHT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-10}


def noise(count: int = 4, side: int = 8, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def fixed(values: Any, **extra: Any) -> Callable[..., Any]:
    return lambda images, prompts: values


def scenes(count: int) -> tuple[Tensor, list[str]]:
    batch = open_source("scenes", resolution=64, num_images=count).load(np.arange(count))
    assert batch.captions is not None
    return batch.images.float() / 255, batch.captions


# ---- the convention --------------------------------------------------------------------------


def test_lists_tensors_and_outputs_are_rewards() -> None:
    images, prompts = noise(2), ["a", "b"]
    expected = torch.tensor([1.0, math.nan])
    output = RewardOutput(expected, {"length": torch.tensor([1, 2])})
    for given in ([1, None], np.array([1.0, math.nan]), expected.double(), output):
        found = as_reward(fixed(given), "mine")(images, prompts)
        torch.testing.assert_close(found.values, expected, equal_nan=True)
        assert found.values.dtype == torch.float32
    assert found.extra["length"].tolist() == [1, 2]


def test_functions_of_two_and_three_arguments_are_called_alike() -> None:
    def by_metadata(images: Tensor, prompts: Any, metadata: Any) -> list[float]:
        return [row["wanted"] for row in metadata]

    reward = as_reward(by_metadata)
    assert reward.name == "by_metadata"
    metadata = [{"wanted": 0.5}, {"wanted": 2}]
    columns, _ = score([reward, as_reward(fixed([3, 4]), "b")], noise(2), ["", ""], metadata)
    assert columns.tolist() == [[0.5, 3], [2, 4]]
    with pytest.raises(UserError, match="must take"):
        as_reward(lambda images: [0.0], "short")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0], r"shape \[1\] for 2 pictures. Return one number per picture"),
        (torch.zeros(2, 1), r"shape \[2, 1\] for 2 pictures"),
        (["a", "b"], "no numbers"),
        (3.0, "no numbers"),
        ([math.inf, 0], "infinite values. Clamp"),
        (RewardOutput(torch.zeros(2), {"x": torch.zeros(3)}), r"extra x of shape \[3\]"),
    ],
)
def test_wrong_results_are_one_plain_line(values: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as found:
        as_reward(fixed(values), "mine")(noise(2), ["", ""])
    assert found.value.exit_code == 1
    assert '"mine"' in str(found.value)
    assert "\n" not in str(found.value)


def test_a_reward_that_raises_is_named() -> None:
    def broken(images: Tensor, prompts: Any) -> list[float]:
        raise KeyError("no such key\nsecond line")

    with pytest.raises(UserError, match=r'"broken" raised KeyError.*NaN') as found:
        as_reward(broken)(noise(2), ["", ""])
    assert found.value.exit_code == 1
    assert "\n" not in str(found.value)
    with pytest.raises(UserError, match="one prompt per picture"):
        as_reward(broken)(noise(2), [""])


def test_a_constant_reward_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    for values in ([2.0] * 7, [2.0, 3.0] * 4, [math.nan] * 7, [math.nan] + [2.0] * 7):
        as_reward(fixed(values), "quiet")(noise(len(values)), [""] * len(values))
    assert not caplog.records
    for name, value, text in (("flat", 2.0, "is 2 for all 8"), ("blind", math.nan, "none of 8")):
        caplog.clear()
        reward = as_reward(fixed([value] * 8), name)
        reward(noise(8), [""] * 8)
        reward(noise(8), [""] * 8)
        (record,) = caplog.records
        assert f'"{name}"' in record.getMessage()
        assert text in record.getMessage()


def test_gradients_reach_the_pictures_only_where_they_are_kept() -> None:
    def mean(images: Tensor, prompts: Any) -> Tensor:
        return images.mean(dim=(1, 2, 3))

    images = noise(2).requires_grad_()
    assert not as_reward(mean)(images, ["", ""]).values.requires_grad
    as_reward(mean, differentiable=True)(images, ["", ""]).values.sum().backward()
    torch.testing.assert_close(images.grad, torch.full_like(images, 1 / 192))


# ---- names -----------------------------------------------------------------------------------


def test_every_name_of_the_table_opens_something() -> None:
    assert open_reward.__doc__ is not None
    for name in REWARDS:
        assert name in open_reward.__doc__


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("chekcer", "Did you mean checker"),
        ("brightness:much", "takes a number"),
        ("brightness:2", r"in \[0, 1\]"),
        ("random:3", "takes nothing behind a colon"),
        ("clip:", "nothing behind its colon"),
        ("color", "write color:red"),
        ("color:reddish", "no colour"),
        ("frechet", "write frechet:scenes"),
        ("http:ftp.example.org", "http:// or https://"),
        ("ocr:eyes", "no OCR package"),
        ("jpeg_compressibility:0", "above 0"),
    ],
)
def test_wrong_names_say_what_to_do(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as found:
        open_reward(name)
    assert found.value.exit_code == 2


# ---- pixels ----------------------------------------------------------------------------------


def test_jpeg_rewards_are_kilobytes() -> None:
    images = torch.cat([torch.full((1, 3, 64, 64), 0.5), noise(1, 64)])
    low, high = open_reward("jpeg_compressibility"), open_reward("jpeg_incompressibility:500")
    columns, _ = score([low, high], images, ["", ""])
    assert columns[0, 0] > columns[1, 0]
    torch.testing.assert_close(columns[:, 0], -500 * columns[:, 1])
    buffer = io.BytesIO()
    pixels = (images[1] * 255 + 0.5).to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    assert columns[1, 0] == pytest.approx(-len(buffer.getvalue()) / 1000)


def test_brightness_and_colour_are_squared_distances() -> None:
    images = torch.zeros(3, 3, 4, 4)
    images[0, 0] = 1  # red
    images[1] = 0.5
    rewards = [open_reward(name) for name in ("brightness:0.5", "color:red", "color:#00ff00")]
    columns, _ = score(rewards, images, ["", "", ""])
    expected = [[-((0.299 - 0.5) ** 2), 0, -2], [0, -0.75, -0.75], [-0.25, -1, -1]]
    torch.testing.assert_close(columns, torch.tensor(expected), rtol=1e-5, atol=1e-6)
    images = noise(2).requires_grad_()
    score(rewards, images, ["", ""])[0].sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0


def test_random_reward_is_a_function_of_picture_and_prompt() -> None:
    reward = open_reward("random")
    images = (noise(400) * 255).round() / 255
    values = score([reward], images, ["a"] * 400)[0][:, 0]
    assert abs(float(values.mean()) - 0.5) < 0.06
    assert 0 <= float(values.min()) < 0.05 < 0.95 < float(values.max()) < 1
    again = score([reward], images.flip(0) + 1e-4, ["a"] * 400)[0][:, 0].flip(0)
    assert (again == values).all()  # what 8 bits do not show plays no part
    assert not (score([reward], images, ["b"] * 400)[0][:, 0] == values).any()


# ---- scenes, classes, text -------------------------------------------------------------------


def test_both_checker_rewards_judge_once(monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[int] = []

    def count(images: Any, captions: Any) -> Any:
        judged.append(len(images))
        return check_batch(images, captions)

    monkeypatch.setattr("nextscale.align.rewards.scenes.check_batch", count)
    images, captions = scenes(4)
    rewards = [open_reward("checker"), open_reward("checker_statements")]
    columns, _ = score(rewards, images, captions)
    assert judged == [4]
    other, _ = score(rewards, images, captions[::-1])  # other captions, the same pictures
    again, _ = score(rewards, images.clone(), captions)
    assert judged == [4, 4, 4]
    assert torch.equal(again, columns)
    assert not torch.equal(other, columns)


def test_checker_rewards_judge_every_kind_of_statement() -> None:
    images, captions = scenes(12)
    rewards = [open_reward("checker"), open_reward("checker_statements")]
    columns, extra = score(rewards, images, captions)
    assert (columns == 1).all()
    wrong = [str(sample_scene(5, i).caption) for i in range(12)]
    columns, extra = score(rewards, images, wrong)
    assert columns[:, 0].sum() < 3
    assert 0 < columns[:, 1].mean() < 1
    color = extra["checker_statements/color"]
    assert color.isfinite().all()
    assert 0 < color.mean() < 1
    assert extra["checker/relation"].isnan().any()  # not every caption has one
    with pytest.raises(UserError, match="got the class label 3"):
        score(rewards, images[:1], [3])


def test_classifier_reward_is_the_log_probability() -> None:
    def classify(images: Tensor) -> Tensor:
        return images.mean(dim=(2, 3)).log()

    images = noise(3).requires_grad_()
    values = classifier_reward(classify)(images, [0, 1, 2]).values
    means = images.mean(dim=(2, 3))
    expected = (means / means.sum(dim=1, keepdim=True)).log().diagonal()
    torch.testing.assert_close(values, expected)
    values.sum().backward()
    for label in (3, -1, "a dog"):
        with pytest.raises(UserError, match=r"class labels in \[0, 3\)"):
            classifier_reward(classify)(noise(1), [label])


@pytest.mark.parametrize("num_classes", [1000, 10])
def test_timm_classifier_reads_its_weights_from_a_file(
    num_classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timm = pytest.importorskip("timm")
    monkeypatch.delenv("NEXTSCALE_CLASSIFIER", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=num_classes).eval()
    path = tmp_path / "w.safetensors"
    storage.write_tensors(path, dict(model.state_dict()))
    side = model.pretrained_cfg["input_size"][-1]
    images = noise(2, side)
    values = score([open_reward(f"classifier:test_resnet@{path}")], images, [3, 7])[0][:, 0]
    mean, std = (torch.tensor(model.pretrained_cfg[k])[:, None, None] for k in ("mean", "std"))
    with torch.no_grad():
        logits = model((images - mean) / std)
    torch.testing.assert_close(values, logits.log_softmax(1)[[0, 1], [3, 7]], rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="classifier:test_resnet@FILE or set NEXTSCALE") as found:
        open_reward("classifier:test_resnet")
    assert found.value.exit_code == 1
    with pytest.raises(UserError, match='timm has no model "resnet51x"'):
        open_reward("classifier:resnet51x")


def test_ocr_reward_follows_its_rule() -> None:
    pytest.importorskip("rapidfuzz")
    read = ["H elLO wor\nld", "say helloworld!", "hallo", "something very different", "", "x"]
    prompts = ['a sign "Hello World"'] * 4 + ["a “sun”", "no quotes"]
    values = ocr_reward(lambda images: read)(noise(6), prompts).values.tolist()
    assert values[:2] == [1, 1]
    assert values[2] == pytest.approx(1 - 6 / 10)  # one letter wrong, five missing
    assert values[3:5] == [0, 0]
    assert math.isnan(values[5])
    with pytest.raises(UserError, match="read 6 texts from 2"):
        ocr_reward(lambda images: read)(noise(2), prompts[:2])


def test_recogniser_is_the_package_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nextscale.align.rewards.ocr.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="paddleocr or easyocr, which is not installed"):
        open_recogniser()
    fake: Any = types.ModuleType("easyocr")
    fake.__spec__ = importlib.machinery.ModuleSpec("easyocr", None)
    fake.Reader = lambda languages, gpu, verbose: types.SimpleNamespace(
        readtext=lambda pixels, detail: [languages[0], str(pixels.shape)]
    )
    monkeypatch.setitem(sys.modules, "easyocr", fake)
    known = {"easyocr": fake.__spec__}
    monkeypatch.setattr("nextscale.align.rewards.ocr.find_spec", known.get)
    assert list(open_recogniser()(noise(1))) == ["en (8, 8, 3)"]


def test_clip_reward_is_the_bundled_cosine() -> None:
    pytest.importorskip("open_clip")
    images, captions = scenes(24)
    columns, _ = score([open_reward("clip")], images, captions)
    assert columns.abs().max() <= 1
    mixed, _ = score([open_reward("clip")], images, captions[1:] + captions[:1])
    assert (columns > mixed).double().mean() > 0.8


# ---- sets and pairs --------------------------------------------------------------------------


def golden_frechet() -> FrechetReward:
    reference = Moments.of(torch.tensor(GOLDEN["reference"], dtype=torch.float64))
    return FrechetReward(lambda images: images[:, :, 0, 0], reference.mean, reference.covariance)


def test_set_rewards_match_the_golden_values() -> None:
    reward = golden_frechet()
    first, second = (torch.tensor(GOLDEN[key], dtype=torch.float64) for key in ("D1", "D2"))
    assert reward.score_set(first) == pytest.approx(-GOLDEN["frechet_D1"], rel=1e-9)
    assert reward.score_set(second) == pytest.approx(-GOLDEN["frechet_D2"], rel=1e-9)
    expected = torch.tensor(GOLDEN["leave_one_out_delta_D1"], dtype=torch.float64)
    torch.testing.assert_close(reward.contributions(first), expected, **TIGHT)
    single = instance_to_distribution(first, reward.mean, reward.covariance)
    wanted = torch.tensor(GOLDEN["instance_to_distribution_D1"], dtype=torch.float64)
    torch.testing.assert_close(single, wanted, **TIGHT)
    vendi = VendiReward(lambda images: images[:, :, 0, 0])
    assert vendi.score_set(first) == pytest.approx(GOLDEN["vendi_D1"], rel=1e-9)


@pytest.mark.parametrize(
    ("count", "dim", "spread"), [(40, 6, 1.0), (6, 9, 1.0), (12, 4, 0.0), (6, 9, 1e-5)]
)
def test_contributions_are_those_of_brute_force(count: int, dim: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(count)
    rows = 3 + spread * torch.randn(count, dim, generator=generator, dtype=torch.float64)
    rows[0] += 100  # with no spread at all, what is left without it is a collapsed set
    moments = Moments.of(torch.randn(50, dim, generator=generator, dtype=torch.float64))
    reward = FrechetReward(lambda images: images, moments.mean, moments.covariance)
    vendi = VendiReward(lambda images: images)

    def distance(kept: Tensor) -> float:
        centred = kept - kept.mean(dim=0)
        covariance = centred.T @ centred / (len(kept) - 1)
        return frechet_distance(kept.mean(dim=0), covariance, moments.mean, moments.covariance)

    left = [torch.cat([rows[:i], rows[i + 1 :]]) for i in range(count)]
    exact = torch.tensor([distance(kept) - distance(rows) for kept in left], **DOUBLE)
    torch.testing.assert_close(reward.contributions(rows), exact, rtol=1e-8, atol=1e-8)
    exact = torch.tensor([vendi_score(rows) - vendi_score(kept) for kept in left], **DOUBLE)
    torch.testing.assert_close(vendi.contributions(rows), exact, rtol=1e-8, atol=1e-8)
    order = torch.randperm(count, generator=generator)
    again = reward.contributions(rows[order])
    torch.testing.assert_close(again, reward.contributions(rows)[order], rtol=1e-8, atol=1e-8)


def test_sets_too_small_are_refused() -> None:
    with pytest.raises(UserError, match='"frechet" needs 3 pictures or more, got 2'):
        golden_frechet().contributions(torch.zeros(2, 3))
    with pytest.raises(UserError, match='"vendi" needs 2 pictures or more, got 1'):
        VendiReward(lambda images: images).contributions(torch.ones(1, 3))


def test_wrong_set_rewards_are_one_plain_line() -> None:
    class Wrong(VendiReward):
        def contributions(self, features: Tensor) -> Any:
            return super().contributions(features)[1:]

    images = noise(5)
    reward = Wrong(lambda images: images.mean(dim=(2, 3)), "mine")
    features = set_features(reward, images, [""] * 5)
    with pytest.raises(UserError, match=r'"mine" must return one finite contribution .* \[4\]'):
        set_column(reward, features)
    torch.testing.assert_close(
        set_column(VendiReward(reward.features_of), features),
        5 * VendiReward(reward.features_of).contributions(features).float(),
    )
    reward.features_of = lambda images: images.mean(dim=(2, 3)) / 0
    with pytest.raises(UserError, match=r"\[5, d\]; 15 are not finite") as found:
        set_features(reward, images, [""] * 5)
    assert found.value.exit_code == 1
    reward.features_of = lambda images: images[9]
    with pytest.raises(UserError, match='"mine" raised IndexError'):
        set_features(reward, images, [""] * 5)


@pytest.mark.parametrize("returned", [None, "good", [], [1.0, 2.0], [[0.5]], torch.zeros(0)])
def test_what_sets_and_pairs_return_is_checked(returned: Any) -> None:
    class Returns(VendiReward):
        def features(self, images: Tensor, prompts: Any) -> Any:
            return returned

        def contributions(self, features: Tensor) -> Any:
            return returned

        def score_set(self, features: Tensor) -> Any:
            return returned

    class Compares:
        name = "mine"

        def compare(self, images: Tensor, prompts: Any) -> Any:
            return returned

    images, reward = noise(4), Returns(lambda images: images, "mine")
    calls = (
        lambda: set_features(reward, images, [""] * 4),
        lambda: set_column(reward, torch.zeros(4, 3)),
        lambda: set_score(reward, torch.zeros(4, 3)),
        lambda: pairwise_column(Compares(), images, [""] * 4, torch.zeros(4, dtype=torch.int64)),
    )
    for one in calls:
        with pytest.raises(UserError, match=r'the reward "mine" must return .*; got') as found:
            one()
        assert found.value.exit_code == 1


def test_plain_lists_of_numbers_are_fine_for_sets_and_pairs() -> None:
    class Lists(VendiReward):
        def features(self, images: Tensor, prompts: Any) -> Any:
            return [[1.0, 0.0], [0.0, 1.0]]

        def contributions(self, features: Tensor) -> Any:
            return [1, 2]

        def score_set(self, features: Tensor) -> Any:
            return 2

    class Compares:
        name = "mine"

        def compare(self, images: Tensor, prompts: Any) -> Any:
            return [[0.5, 0.9], [0.1, 0.5]]

    images, reward = noise(2), Lists(lambda images: images, "mine")
    features = set_features(reward, images, [""] * 2)
    assert set_column(reward, features).tolist() == [2, 4]
    assert set_score(reward, features) == 2
    column = pairwise_column(Compares(), images, [""] * 2, torch.zeros(2, dtype=torch.int64))
    assert column.tolist() == pytest.approx([0.9, 0.1])


def test_frechet_reference_is_a_folder_or_statistics(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    from nextscale.eval.feature_network import small_features
    from nextscale.eval.features import extract
    from nextscale.eval.images import open_images
    from nextscale.eval.statistics import save_statistics, statistics_of

    images, _ = scenes(12)
    pixels = (images * 255 + 0.5).to(torch.uint8)
    (tmp_path / "real").mkdir()
    for i, picture in enumerate(pixels.permute(0, 2, 3, 1).numpy()):
        Image.fromarray(picture).save(tmp_path / "real" / f"{i}.png")
    reward: Any = open_reward(f"frechet:{tmp_path / 'real'}")
    features = reward.features(images, [""] * 12)
    assert reward.score_set(features) == pytest.approx(0, abs=1e-6)
    assert reward.score_set(features.flip(0)[:6]) < -0.1
    network = small_features()
    found = extract(open_images(pixels), network, moments=["scenes"])
    statistics = statistics_of(found, network.fingerprint(), "real")
    save_statistics(statistics, tmp_path / "real.npz")
    again: Any = open_reward(f"frechet:{tmp_path / 'real.npz'}")
    torch.testing.assert_close(again.covariance, reward.covariance, rtol=1e-3, atol=1e-5)
    single: Any = open_reward(f"frechet_instance:{tmp_path / 'real.npz'}")
    values = single(images, [""] * 12).values.double()
    expected = instance_to_distribution(features, reward.mean, reward.covariance)
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)
    np.savez(tmp_path / "other.npz", mu=np.zeros(2), sigma=np.eye(2))
    with pytest.raises(UserError, match="not of scenes-features"):
        open_reward(f"frechet:{tmp_path / 'other.npz'}")
    assert open_reward("vendi").score_set(features) > 2  # pyright: ignore


def test_thumbnails_compare_palettes_and_layouts(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    rng = np.random.default_rng(0)
    for i in range(40):  # bright on the left, dark on the right
        picture = np.full((16, 16, 3), 20, np.uint8)
        picture[:, :8] = 200
        picture = (picture + rng.integers(0, 20, (1, 1, 3))).astype(np.uint8)
        Image.fromarray(picture).save(tmp_path / "real" / f"{i}.png")
    same = torch.full((8, 3, 32, 32), 30 / 255)
    same[:, :, :, :16] = 210 / 255
    turned, flat = same.flip(3), torch.full((8, 3, 32, 32), 120 / 255)
    for size, apart in (("", True), ("@2", True), ("@1", False)):
        reward: Any = open_reward(f"frechet_pixels:{tmp_path / 'real'}{size}")
        scores = [
            reward.score_set(reward.features(images, [""] * 8)) for images in (same, turned, flat)
        ]
        assert -0.05 < scores[0] <= 0
        assert (scores[1] < scores[0] - 0.1) is apart  # one field sees no layout
        single: Any = open_reward(f"frechet_pixels_instance:{tmp_path / 'real'}{size}")
        assert bool((single(same, [""] * 8).values >= single(turned, [""] * 8).values - 1e-6).all())
    with pytest.raises(UserError, match='the size "big" is no number'):
        open_reward(f"frechet_pixels:{tmp_path / 'real'}@big")
    (tmp_path / "texts.txt").write_text("a dog")
    with pytest.raises(UserError, match="only CLIP reads"):
        open_reward(f"frechet_pixels:{tmp_path / 'texts.txt'}")


def test_exemplars_may_be_texts_in_the_space_of_clip(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("open_clip")
    from nextscale.eval.clip import BUNDLED, open_clip_model

    images, captions = scenes(200)
    colours = {c: [i for i, t in enumerate(captions) if c in t] for c in ("red", "blue")}
    red, blue = (
        sorted(set(colours[a]) - set(colours[b])) for a, b in (("red", "blue"), ("blue", "red"))
    )
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"{captions[i]}\n\n" for i in red))
    reward: Any = open_reward(f"frechet_clip:{texts}@{BUNDLED}")
    assert f"holds {len(red)} exemplars, fewer than the" in caplog.text
    rows = open_clip_model(BUNDLED).texts([captions[i] for i in red]).double()
    torch.testing.assert_close(reward.mean, rows.mean(dim=0))
    torch.testing.assert_close(reward.covariance, Moments.of(rows).covariance)
    count = min(len(red), len(blue))
    near, far = (
        reward.score_set(reward.features(images[i[:count]], [""] * count)) for i in (red, blue)
    )
    assert near > far  # pictures of what the texts say
    alone: Any = open_reward(f"frechet_clip_instance:{texts}@{BUNDLED}")
    values = [alone(images[i[:count]], [""] * count).values.mean() for i in (red, blue)]
    assert values[0] > values[1]


def test_sets_smaller_than_their_features_are_said(caplog: pytest.LogCaptureFixture) -> None:
    reward = golden_frechet()
    warn_of_small_sets(reward, len(reward.mean) + 1)
    assert not caplog.text
    warn_of_small_sets(reward, len(reward.mean))
    assert f"sets of {len(reward.mean)} pictures, fewer than its" in caplog.text


def test_exemplars_that_are_none(tmp_path: Path) -> None:
    for kind in ("frechet", "frechet_instance", "frechet_clip"):
        with pytest.raises(UserError, match=r"there are no exemplars .*nothing"):
            open_reward(f"{kind}:{tmp_path / 'nothing'}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="there is no image in"):
        open_reward(f"frechet:{tmp_path / 'empty'}")
    (tmp_path / "one").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "one" / "a.png")
    with pytest.raises(UserError, match="holds one exemplar, which has no spread"):
        open_reward(f"frechet:{tmp_path / 'one'}")
    (tmp_path / "texts.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is no text in UTF-8"):
        open_reward(f"frechet_clip:{tmp_path / 'texts.txt'}")
    (tmp_path / "texts.txt").write_text("\n\n")
    with pytest.raises(UserError, match="holds no texts"):
        open_reward(f"frechet_clip:{tmp_path / 'texts.txt'}")
    with pytest.raises(UserError, match="which only CLIP reads: use frechet_clip"):
        open_reward(f"frechet:{tmp_path / 'texts.txt'}")


class Brighter:
    """Prefers the brighter of two pictures, the more the brighter."""

    name = "brighter"

    def compare(self, images: Tensor, prompts: Any) -> Tensor:
        means = images.mean(dim=(1, 2, 3))
        return torch.sigmoid(means[:, None] - means)


def test_preference_scores_are_spos() -> None:
    preferences = torch.tensor([[9.0, 0.7, 0.2], [0.3, 9.0, math.nan], [0.8, math.nan, 9.0]])
    torch.testing.assert_close(preference_scores(preferences), torch.tensor([0.45, 0.3, 0.8]))
    assert preference_scores(torch.zeros(1, 1)).isnan().all()


def test_a_pairwise_reward_becomes_a_column_within_groups() -> None:
    images = torch.tensor([0.9, 0.1, 0.5, 0.2, 0.3]).view(5, 1, 1, 1).expand(5, 3, 4, 4)
    groups = torch.tensor([0, 1, 0, 1, 2])
    reward = Brighter()
    assert isinstance(reward, PairwiseReward)
    column = pairwise_column(reward, images, [""] * 5, groups)
    up, down = torch.sigmoid(torch.tensor([0.4, 0.1])), torch.sigmoid(torch.tensor([-0.4, -0.1]))
    expected = torch.stack([up[0], down[1], down[0], up[1], torch.tensor(math.nan)])
    torch.testing.assert_close(column, expected, equal_nan=True)
    columns, _ = score([reward, as_reward(fixed([1.0] * 5))], images, [""] * 5)
    assert columns[:, 0].isnan().all()
    assert (columns[:, 1] == 1).all()

    class Odds(Brighter):
        def compare(self, images: Tensor, prompts: Any) -> Tensor:
            return 3 * torch.ones(len(images), len(images))

    with pytest.raises(UserError, match=r"of probabilities .* got values from 3 to 3"):
        pairwise_column(Odds(), images, [""] * 5, groups)


# ---- composition and the guard ---------------------------------------------------------------


def test_combine_modes() -> None:
    nan = math.nan
    columns = torch.tensor([[1.0, 0.2, 0.9], [0.0, 1.0, nan], [nan, nan, nan], [0.6, 0.1, 0.2]])
    weights = [1.0, 2.0, 1.0]
    expected = {
        "sum": [2.3, nan, nan, 1.0],
        "min": [0.4, nan, nan, 0.2],
        "majority": [0, 1, nan, 0],  # 2 of 4 are no majority; 2 of 3 are
    }
    for mode, values in expected.items():
        found = combine(columns, weights, mode)
        torch.testing.assert_close(found, torch.tensor(values), equal_nan=True)
    with pytest.raises(UserError, match="mode is lagrangian, but must be one of sum, min"):
        combine(columns, weights, "lagrangian")
    with pytest.raises(UserError, match=r"\[B, 2\]"):
        combine(columns, weights[:2])


def test_normalized_rewards_keep_the_raw_value() -> None:
    reward = as_reward(fixed([13.0, 26.0]), "pickscore", range=(0, 52))
    scaled = normalized(reward, 26)
    columns, extra = score([scaled, normalized(reward, offset=13, scale=2)], noise(2), ["", ""])
    assert columns.tolist() == [[0.5, 0], [1, 6.5]]
    assert extra["pickscore/raw"].tolist() == [13, 26]
    assert scaled.range == (0, 2)


def test_a_trend_is_a_rise_beyond_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(100, 40, generator=generator).tolist()

    def p_value(values: list[float]) -> float | None:
        trend = RewardTrend()
        for i, value in enumerate(values):
            trend.update(i, value)
        copy = RewardTrend()
        copy.load_state_dict(json.loads(json.dumps(trend.state_dict())))
        assert copy.p_value() == trend.p_value()
        return trend.p_value()

    rising = [[0.1 * i + x for i, x in enumerate(row)] for row in noise]
    falling = [[-0.1 * i + x for i, x in enumerate(row)] for row in noise]
    assert max(map(p_value, rising)) < 0.01  # pyright: ignore[reportArgumentType]
    assert min(map(p_value, falling)) > 0.99  # pyright: ignore[reportArgumentType]
    assert sum(p_value(row) < 0.05 for row in noise) in range(1, 12)  # pyright: ignore
    early = [[4.0 * (i > 5) + x for i, x in enumerate(row)] for row in noise]
    assert max(map(p_value, early)) < 0.01  # pyright: ignore[reportArgumentType]
    assert p_value([1.0] * 30) == 1
    assert p_value([1.0] * 4 + [0.5] + [1.0] * 15) == 1
    assert p_value([0.0] * 10 + [1.0] * 10) == 0
    assert p_value([float(i) for i in range(19)] + [math.nan]) is None
    again = RewardTrend()
    for number, value in [*enumerate(rising[0]), (39, -9.0), (39, rising[0][39])]:
        again.update(number, value)  # a rollout that a resumed run draws again counts once
    assert again.p_value() == p_value(rising[0])


def test_the_monitor_stops_when_held_out_rewards_fall() -> None:
    def run(monitor: HeldOutMonitor, *rows: tuple[float, float, float, float]) -> list[bool]:
        return [monitor.update(t, {"a": a, "b": b, "c": c}) for t, a, b, c in rows]

    hacking = [(t, -t, -t, t) for t in map(float, range(6))]
    assert run(HeldOutMonitor(), *hacking) == [False, False, False, True, True, True]
    assert not any(run(HeldOutMonitor(min_held_out=3), *hacking))  # c rises
    assert not any(run(HeldOutMonitor(), *[(-t, -t, -t, -t) for t, *_ in hacking]))
    assert not any(run(HeldOutMonitor(), *[(t, -t, math.nan, t) for t, *_ in hacking]))
    broken = [*hacking[:3], (2.0, -2.0, -2.0, 2.0), *hacking[3:]]  # a pause begins anew
    assert run(HeldOutMonitor(), *broken) == [False] * 6 + [True]
    few, none = HeldOutMonitor(2), HeldOutMonitor(1)
    assert [few.update(t, {"a": -t}) for t in range(3)] == [False, False, True]
    assert [none.update(t, {}) for t in range(3)] == [False] * 3


def test_the_monitor_resumes_alike() -> None:
    first, second = HeldOutMonitor(2), HeldOutMonitor(2)
    for t in range(2):
        assert not first.update(t, {"a": -t, "b": -t})
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.update(2, {"a": -2, "b": -2})


# ---- a server --------------------------------------------------------------------------------


Answers = Callable[[dict[str, Any], int], Any]


class Server:
    """Answers every request by a function of its content and number."""

    def __init__(self, answer: Answers) -> None:
        self.requests: list[dict[str, Any]] = []
        self.stop, self.pause = threading.Event(), 0.0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append(content)
                found = answer(content, len(outer.requests))
                if found is None:
                    outer.stop.wait(10)
                    return
                code, body = found if isinstance(found, tuple) else (200, found)
                text = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(code)
                self.end_headers()
                step = 1 if outer.pause else len(text) or 1
                for i in range(0, len(text), step):
                    self.wfile.write(text[i : i + step])
                    outer.stop.wait(outer.pause)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/score"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    def close(self) -> None:
        self.stop.set()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Answers], Server]]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    servers: list[Server] = []

    def start(answer: Answers) -> Server:
        servers.append(Server(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def test_a_server_gets_png_and_json(serve: Callable[[Answers], Server]) -> None:
    def answer(content: dict[str, Any], number: int) -> Any:
        pictures = [Image.open(io.BytesIO(base64.b64decode(p))) for p in content["images"]]
        means = [float(np.asarray(picture).mean()) for picture in pictures]
        assert {picture.format for picture in pictures} == {"PNG"}
        rows = zip(content["prompts"], means, strict=True)
        return {"scores": [None if p == "skip" else m for p, m in rows]}

    server = serve(answer)
    images = noise(5)
    prompts: list[str | int] = ["a", "skip", 3, "b", "c"]
    values = http_reward(server.url, batch_size=2)(images, prompts, [{"i": i} for i in range(5)])
    expected = (images * 255 + 0.5).floor().mean(dim=(1, 2, 3))
    expected[1] = math.nan
    torch.testing.assert_close(values.values, expected, equal_nan=True)
    assert [len(r["images"]) for r in server.requests] == [2, 2, 1]
    assert server.requests[1]["prompts"] == [3, "b"]
    assert server.requests[2]["metadata"] == [{"i": 4}]
    assert open_reward(server.url)(images[:1], ["a"]).values.isfinite().all()  # pyright: ignore


def test_a_server_that_hangs_costs_its_batch_alone(
    serve: Callable[[Answers], Server], caplog: pytest.LogCaptureFixture
) -> None:
    def answer(content: dict[str, Any], number: int) -> Any:
        return None if "hang" in content["prompts"] else {"scores": [1.0] * len(content["images"])}

    server = serve(answer)
    reward = http_reward(server.url, timeout=0.2, retries=1, backoff=0.01, batch_size=2)
    start = time.monotonic()
    values = reward(noise(5), ["a", "b", "hang", "c", "d"]).values
    assert time.monotonic() - start < 3
    assert values.isnan().tolist() == [False, False, True, True, False]
    assert len(server.requests) == 4  # one of them again
    (record,) = caplog.records
    assert "for 2 pictures, which are left out" in record.getMessage()


def test_a_server_that_dribbles_has_no_more_time(
    serve: Callable[[Answers], Server], caplog: pytest.LogCaptureFixture
) -> None:
    server = serve(lambda content, number: {"scores": [1.0]})
    server.pause = 0.2
    start = time.monotonic()
    values = http_reward(server.url, timeout=0.5, retries=0)(noise(1), ["a"]).values
    assert time.monotonic() - start < 2
    assert values.isnan().all()
    assert "no whole answer within 0.5 s" in caplog.records[0].getMessage()


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"<html>", "Expecting value"),
        ({"scores": [1.0]}, "1 scores for 2 pictures"),
        ([1.0, 2.0], "the answer is not"),
        ({"scores": ["good", 1.0]}, "'good', which is no finite number"),
        ({"scores": [math.inf, 1.0]}, "inf, which is no finite number"),
        ((503, b""), "HTTP 503"),
    ],
)
def test_garbage_of_a_server_is_unscorable_after_retries(
    serve: Callable[[Answers], Server],
    caplog: pytest.LogCaptureFixture,
    body: Any,
    problem: str,
) -> None:
    server = serve(lambda content, number: body if number < 5 else {"scores": [1.0, 2.0]})
    reward = http_reward(server.url, retries=1, backoff=0.0)
    assert reward(noise(2), ["", ""]).values.isnan().all()
    assert problem in caplog.text
    assert reward(noise(2), ["", ""]).values.isnan().all()
    assert reward(noise(2), ["", ""]).values.tolist() == [1, 2]


def test_a_server_that_refuses_or_is_not_there(
    serve: Callable[[Answers], Server], caplog: pytest.LogCaptureFixture
) -> None:
    server = serve(lambda content, number: (404, b""))
    with pytest.raises(UserError, match="refuses the request: HTTP 404") as found:
        http_reward(server.url)(noise(2), ["", ""])
    assert found.value.exit_code == 1
    assert len(server.requests) == 1
    with pytest.raises(UserError, match="sends metadata as JSON"):
        http_reward(server.url)(noise(1), [""], [{"t": torch.zeros(1)}])
    server.close()
    values = http_reward(server.url, retries=1, backoff=0.0)(noise(2), ["", ""]).values
    assert values.isnan().all()
    assert "refused" in caplog.text
