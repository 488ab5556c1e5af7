"""`erase` as a whole on a tiny class model: the concept goes, the base stays."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nextscale.align.erasure.config import EraseConfig
from nextscale.align.erasure.train import erase
from nextscale.errors import UserError
from nextscale.pipeline import NextScalePipeline
from nextscale.storage import read_tensors
from nextscale.tokenizers import MultiscaleVQ
from nextscale.var import NextScaleTransformer, SamplingConfig
from nextscale.var.delta import load_delta
from nextscale.var.model_folder import save_model


@pytest.fixture(scope="module")
def model(
    tmp_path_factory: pytest.TempPathFactory,
    build_model: Callable[..., NextScaleTransformer],
    tiny_tokenizer: MultiscaleVQ,
) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    save_model(folder, tiny_tokenizer, build_model(), SamplingConfig(guidance_scale=1.0))
    return folder


def config(model: Path, folder: Path, **changes: Any) -> EraseConfig:
    values: dict[str, Any] = {
        "model": str(model),
        "output_dir": str(folder),
        "concepts": ("2",),
        "num_pairs": 12,
        "train_batch_size": 8,
        "max_train_steps": 20,
        "learning_rate": 2e-2,
        "report_to": "none",
        "logging_steps": 20,
        "window_smallest": 5,
        "num_eval_prompts": 0,
        "mixed_precision": "no",
    }
    return EraseConfig(**{**values, **changes})


def run(settings: EraseConfig) -> NextScalePipeline:
    return erase(settings, progress=False).pipe


@torch.no_grad()
def logits(transformer: NextScaleTransformer, label: int, tokens: Tensor) -> Tensor:
    embedded = torch.randn(len(tokens), 29, 8, generator=torch.Generator().manual_seed(0))
    return transformer(embedded, class_labels=[label] * len(tokens))


def divergence(first: Tensor, second: Tensor) -> float:
    p, q = first.log_softmax(-1), second.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


METHODS: dict[str, dict[str, Any]] = {
    "ear": {"gate_quantile": 0.0},
    "ear, joint": {"method": "ear", "mode": "joint", "space": "logits", "gate": 0.0},
    "svare": {"method": "svare"},
    "d2o": {"method": "d2o", "preserve_weight": 0.1},
    "weights": {"method": "svare", "lora_rank": 0, "learning_rate": 1e-3},
}


@pytest.mark.parametrize("name", METHODS)
def test_the_concept_moves_and_other_classes_stay(name: str, model: Path, tmp_path: Path) -> None:
    settings = config(model, tmp_path / "run", retain_prompts=(str(tmp_path / "r.jsonl"),))
    lines = [json.dumps({"class_label": label}) for label in (0, 1, 3, 4)]
    (tmp_path / "r.jsonl").write_text("\n".join(lines))
    settings = replace(settings, **METHODS[name])
    base = NextScalePipeline.from_pretrained(model, dtype="float32").transformer
    edited = run(settings).transformer
    tokens = torch.zeros(2, 30, dtype=torch.long)
    moved = [divergence(logits(base, k, tokens), logits(edited, k, tokens)) for k in range(5)]
    assert moved[2] > 0.05
    assert moved[2] > 3 * max(moved[k] for k in (0, 1, 3, 4))


@pytest.mark.parametrize("rank", [4, 0])
def test_the_adapter_off_is_the_base_bit_for_bit(rank: int, model: Path, tmp_path: Path) -> None:
    run(config(model, tmp_path / "run", lora_rank=rank, max_train_steps=9, gate=0.0))
    pipe = NextScalePipeline.from_pretrained(model, dtype="float32")
    before = {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    pipe.load_lora(tmp_path / "run" / "adapter")
    changed = pipe(class_labels=[2], seed=0, output_type="pt")
    pipe.unload_lora()
    after = pipe.transformer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    plain = pipe(class_labels=[2], seed=0, output_type="pt")
    assert not torch.equal(plain.images, changed.images)
    tensors = read_tensors(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    kinds = ("qkv", "modulation", "fc1", "fc2")
    assert all(any(f".{kind}." in name for kind in kinds) for name in tensors)


def test_strength_scales_a_delta(model: Path, tmp_path: Path) -> None:
    run(config(model, tmp_path / "run", lora_rank=0, max_train_steps=9, gate=0.0))
    folder = tmp_path / "run" / "adapter"
    base = NextScaleTransformer.from_pretrained(model)
    half, whole = (NextScaleTransformer.from_pretrained(model) for _ in range(2))
    load_delta(half, folder, 0.5)
    load_delta(whole, folder, 1.0)
    name = "blocks.0.feed_forward.fc1.weight"
    start, middle, end = (m.state_dict()[name] for m in (base, half, whole))
    torch.testing.assert_close(middle - start, (end - start) / 2)
    with pytest.raises(UserError, match="belong to other weights"):
        load_delta(whole, folder)


def test_an_infinite_gate_changes_nothing_and_says_so(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no window was ever above its threshold"):
        run(config(model, tmp_path / "run", gate=float("inf"), max_train_steps=8))
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.mark.parametrize("mode", ["windowed", "joint"])
def test_a_gate_of_zero_is_no_gate(mode: str, model: Path, tmp_path: Path) -> None:
    settings = config(model, tmp_path / "run", mode=mode, gate=0.0, max_train_steps=6)
    run(settings)
    lines = [json.loads(x) for x in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    shares = [v for line in lines for k, v in line.items() if k.startswith("updated/")]
    assert shares
    assert set(shares) == {1.0}


def test_an_eta_of_zero_to_the_same_prompt_moves_nothing(model: Path, tmp_path: Path) -> None:
    line = {"original": 2, "modified": 2, "concept": "2", "replacement": "2"}
    (tmp_path / "same.jsonl").write_text(json.dumps(line))
    with pytest.raises(UserError, match="no window was ever above"):
        run(
            config(
                model, tmp_path / "run", pairs=str(tmp_path / "same.jsonl"), eta=0.0, gate=0.0,
                max_train_steps=8,
            )
        )  # fmt: skip


def test_concepts_one_after_the_other(model: Path, tmp_path: Path) -> None:
    both = config(model, tmp_path / "run", concepts=("2", "4"), sequential=True, gate=0.0)
    edited = run(both).transformer
    base = NextScaleTransformer.from_pretrained(model)
    tokens = torch.zeros(2, 30, dtype=torch.long)
    moved = [divergence(logits(base, k, tokens), logits(edited, k, tokens)) for k in (2, 4)]
    assert min(moved) > 0.02


def test_a_swapped_class_draws_its_replacement(model: Path, tmp_path: Path) -> None:
    result = erase(config(model, tmp_path / "run", method="class_swap"), progress=False)
    other = int(result.pairs[0].modified)
    pipe = NextScalePipeline.from_pretrained(model, dtype="float32")
    wanted = pipe(class_labels=[other], seed=3, output_type="pt").tokens
    pipe.load_lora(tmp_path / "run" / "adapter")
    assert torch.equal(pipe(class_labels=[2], seed=3, output_type="pt").tokens, wanted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"concepts": ()}, "concepts is empty"),
        ({"concepts": (), "pairs": "templates"}, "concepts is empty"),
        ({"concepts": ("9",)}, "no class of the model, 0 to 4"),
        ({"concepts": tuple("01234")}, "every class is to be erased"),
        ({"method": "uce"}, "this model has none"),
        ({"train_scales": 9}, "train_scales is 9, the model has 4 scales"),
        ({"targets": ("nothing",), "lora_rank": 0}, "targets nothing name no weights"),
        ({"retain_prompts": ("classes",)}, "retain_prompts ask for what is erased"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps"),
    ],
)
def test_what_does_not_fit_is_refused(
    changes: dict[str, Any], message: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        run(config(model, tmp_path / "run", **changes))
    assert not (tmp_path / "run" / "adapter").exists()
