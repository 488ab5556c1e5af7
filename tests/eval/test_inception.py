"""Inception under every protocol equals the peer's own feature extractor, same random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nextscale.errors import UserError
from nextscale.eval.inception import TAPS, Inception, read_weights
from nextscale.eval.protocols import PROTOCOLS, inception_splits, prepare

SIZES = [(64, 64), (256, 256), (299, 299), (512, 512), (100, 180)]


def random_pictures(height: int, width: int) -> list[np.ndarray]:
    random = np.random.default_rng(height)
    return [random.integers(0, 256, (height, width, 3), dtype=np.uint8) for _ in range(2)]


def stacked(pictures: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def weights_file(inception_weights: dict[str, Any], tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(inception_weights, path)
    return path


@pytest.fixture(scope="module")
def peer(weights_file) -> Any:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    return FeatureExtractorInceptionV3(
        "peer", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights_file)
    )


@pytest.mark.parametrize("size", SIZES)
def test_adm_equals_torch_fidelity(inception_weights, peer, size) -> None:
    ours = Inception(inception_weights, "adm")
    pictures = random_pictures(*size)
    kept: dict[str, Tensor] = {}
    hook = peer.Mixed_6d.branch1x1.conv.register_forward_hook(
        lambda module, inputs, output: kept.update(spatial=output)
    )
    pool, logits = peer(stacked(pictures))
    hook.remove()
    found = ours(pictures)
    spatial = kept["spatial"][:, :7].permute(0, 2, 3, 1).reshape(len(pictures), -1)
    for tap, expected in (("pool", pool), ("logits", logits), ("spatial", spatial)):
        assert found[tap].shape == (2, TAPS[tap])
        # The raw convolution behind the spatial tap: the peer itself is 2.7e-6 from its float64.
        assert relative(found[tap], expected) < (2e-6 if tap == "spatial" else 1e-6), tap


def trunk(peer: Any, x: Tensor) -> Tensor:
    """The peer's network on resized and normalised input."""
    from nextscale.eval.inception import _TRUNK

    for name in _TRUNK:
        x = getattr(peer, name)(x)
    return x.mean(dim=(2, 3))


@pytest.mark.parametrize("size", SIZES)
def test_clean_equals_clean_fid(inception_weights, peer, size) -> None:
    pytest.importorskip("cleanfid")
    from cleanfid.resize import build_resizer

    pictures = random_pictures(*size)
    resize: Callable[[np.ndarray], np.ndarray] = build_resizer("clean")
    resized = torch.from_numpy(np.stack([resize(p) for p in pictures])).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = trunk(peer, (resized.float() - 128) / 128)
    assert relative(Inception(inception_weights, "clean")(pictures)["pool"], expected) < 1e-6


@pytest.mark.parametrize("size", SIZES)
def test_pytorch_fid_protocol_equals_pytorch_fid(
    inception_weights, monkeypatch: pytest.MonkeyPatch, size
) -> None:
    module = pytest.importorskip("pytorch_fid.inception")
    monkeypatch.setattr(module, "load_state_dict_from_url", lambda *a, **k: inception_weights)
    theirs = module.InceptionV3([3]).eval()
    pictures = random_pictures(*size)
    with torch.no_grad():
        (expected,) = theirs(stacked(pictures).float() / 255)
    found = Inception(inception_weights, "pytorch-fid")(pictures)["pool"]
    assert relative(found, expected[:, :, 0, 0]) < 1e-6


@pytest.mark.parametrize("size", SIZES)
def test_torchmetrics_protocol_equals_torchmetrics(inception_weights, weights_file, size) -> None:
    pytest.importorskip("torchmetrics")
    from torchmetrics.image.fid import NoTrainInceptionV3

    theirs = NoTrainInceptionV3("peer", ["2048"], str(weights_file))
    pictures = random_pictures(*size)
    expected = theirs(stacked(pictures))
    found = Inception(inception_weights, "torchmetrics")(pictures)["pool"]
    assert relative(found, expected) < 1e-6


def test_protocols_are_different_metrics(inception_weights) -> None:
    pictures = random_pictures(256, 256)
    found = {name: Inception(inception_weights, name)(pictures)["pool"] for name in PROTOCOLS}
    assert torch.equal(found["adm"], found["torch-fidelity"])
    for name in ("clean", "pytorch-fid", "torchmetrics"):
        assert relative(found[name], found["adm"]) > 1e-4, name


def test_pictures_of_many_sizes_are_prepared_each_for_itself() -> None:
    mixed = [random_pictures(*size)[0] for size in SIZES]
    for protocol in PROTOCOLS.values():
        together = prepare(mixed, protocol, "cpu")
        for row, picture in enumerate(mixed):
            alone = prepare([picture], protocol, "cpu")[0]
            torch.testing.assert_close(together[row], alone, atol=1e-6, rtol=0)


def test_bf16_is_close_and_labelled(inception_weights) -> None:
    pictures = random_pictures(256, 256)
    exact = Inception(inception_weights)
    half = Inception(inception_weights, precision="bf16")
    assert 1e-5 < relative(half(pictures)["pool"], exact(pictures)["pool"]) < 1e-2
    assert half.fingerprint() != exact.fingerprint()
    with pytest.raises(UserError, match='precision is "fp8"'):
        Inception(inception_weights, precision="fp8")


def test_files_that_are_not_inception(inception_weights, tmp_path) -> None:
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="does not hold the weights of FID's Inception"):
        read_weights(tmp_path / "other.pth")
    smaller = {k: v for k, v in inception_weights.items() if "Mixed_7a" not in k}
    with pytest.raises(UserError, match=r"Mixed_7a.* is missing"):
        Inception(smaller)
    with pytest.raises(UserError, match='no protocol "fid"'):
        Inception(inception_weights, "fid")


def test_inception_splits() -> None:
    adm = inception_splits(PROTOCOLS["adm"], 12_000)
    assert np.bincount(adm).tolist() == [5000, 5000, 2000]
    assert (np.diff(adm) >= 0).all()
    shuffled = inception_splits(PROTOCOLS["torch-fidelity"], 503)
    order = np.random.RandomState(2020).permutation(503)
    assert (np.diff(shuffled[order]) >= 0).all()  # in the peer's shuffled order they are blocks
    assert np.bincount(shuffled).tolist() == [50, 50, 50, 51, 50, 50, 51, 50, 50, 51]
