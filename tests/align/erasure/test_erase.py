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
from nextscale.align.erasure.data import Drawn
from nextscale.align.erasure.pairs import ConceptPair
from nextscale.align.erasure.task import Erasing, Retained
from nextscale.align.erasure.train import erase
from nextscale.align.references import AdapterOff, FrozenCopy
from nextscale.errors import UserError
from nextscale.pipeline import NextScalePipeline
from nextscale.storage import read_tensors
from nextscale.tokenizers import MultiscaleVQ
from nextscale.training.batches import micro_batch
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


def adapter(folder: Path) -> dict[str, Tensor]:
    return read_tensors(folder / "adapter" / "adapter_model.safetensors")


def test_counts_of_updates_go_on_after_a_resume(model: Path, tmp_path: Path) -> None:
    """What never updated is not made well by going on, nor bad what did update once."""
    settings = config(model, tmp_path / "a", gate=float("inf"), max_train_steps=4)
    settings = replace(settings, checkpointing_steps=4)
    message = "no window was ever above its threshold"
    with pytest.raises(UserError, match=message):
        run(settings)
    again = replace(settings, max_train_steps=8, resume_from_checkpoint="latest")
    with pytest.raises(UserError, match=message):
        run(again)
    settings = replace(settings, output_dir=str(tmp_path / "b"), gate=0.0)
    before = erase(settings, progress=False).windows
    again = replace(settings, max_train_steps=8, resume_from_checkpoint="latest", gate=float("inf"))
    after = erase(again, progress=False).windows
    assert [w["share"] for w in before] == [1.0] * len(before)
    assert min(w["share"] for w in after) < 1
    assert max(w["share"] for w in after) > 0


@pytest.mark.parametrize("mode", ["windowed", "joint"])
def test_a_gate_of_zero_is_no_gate(
    mode: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many updates as turns, and bit for bit the weights of a run whose gate is always open."""
    settings = config(model, tmp_path / "run", mode=mode, gate=0.0, max_train_steps=8)
    windows = erase(settings, progress=False).windows
    assert [w["stop"] for w in windows][-1] == 30
    assert {w["share"] for w in windows} == {1.0}
    never = lambda self, network: torch.full((len(self.windows),), -torch.inf)  # noqa: E731
    monkeypatch.setattr(Erasing, "_thresholds", never)
    run(replace(settings, output_dir=str(tmp_path / "open")))
    first, second = adapter(tmp_path / "run"), adapter(tmp_path / "open")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_closed_window_changes_nothing_in_joint_mode(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(
        model, tmp_path / "all", mode="joint", gate=0.0, max_train_steps=4, preserve_weight=0.0
    )
    run(settings)

    def first_alone(self: Erasing, network: object) -> Tensor:
        return torch.tensor([-torch.inf] + [torch.inf] * (len(self.windows) - 1))

    monkeypatch.setattr(Erasing, "_thresholds", first_alone)
    windows = erase(replace(settings, output_dir=str(tmp_path / "one")), progress=False).windows
    assert [w["share"] for w in windows] == [1.0] + [0.0] * (len(windows) - 1)
    first, second = adapter(tmp_path / "all"), adapter(tmp_path / "one")
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_a_quantile_closes_windows(model: Path, tmp_path: Path) -> None:
    shares = []
    for quantile in (0.0, 0.7):
        settings = config(model, tmp_path / str(quantile), mode="joint", gate_quantile=quantile)
        shares.append([w["share"] for w in erase(settings, progress=False).windows])
    assert sum(shares[1]) < sum(shares[0])


def test_thresholds_see_all_concepts(model: Path, tmp_path: Path) -> None:
    settings = config(model, tmp_path / "run", concepts=("2", "4"), num_pairs=80)
    pipe = NextScalePipeline.from_pretrained(model, dtype="float32")
    pairs = [ConceptPair(2, 0, "2")] * 80 + [ConceptPair(4, 1, "4")] * 80
    tokens = torch.zeros(160, 30, dtype=torch.long)
    drawn = Drawn(pairs, tokens, tokens, {})
    task = Erasing(settings, pipe, drawn, Retained([], tokens[:0]), FrozenCopy(pipe.transformer))
    seen: list[Tensor] = []

    def spy(network: object, batch: dict[str, Tensor], count: int) -> Tensor:
        seen.append(batch["original"])
        return torch.zeros(len(batch["original"]), 30)

    task._ear_losses = spy  # pyright: ignore
    task._thresholds(pipe.transformer)
    assert len(seen[0]) == 64
    assert (seen[0] == task.ids["original"][0]).sum() == 32


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


def moved(model: Path, settings: EraseConfig) -> list[float]:
    """How far each class is from where it was, after a run."""
    edited = run(settings).transformer
    base = NextScaleTransformer.from_pretrained(model)
    tokens = torch.zeros(2, 30, dtype=torch.long)
    return [divergence(logits(base, k, tokens), logits(edited, k, tokens)) for k in range(5)]


def retained(folder: Path, *labels: int) -> tuple[str]:
    lines = [json.dumps({"class_label": label}) for label in labels]
    (folder / "retain.jsonl").write_text("\n".join(lines))
    return (str(folder / "retain.jsonl"),)


def test_concepts_one_after_the_other(model: Path, tmp_path: Path) -> None:
    both = config(
        model, tmp_path / "run", concepts=("2", "4"), sequential=True, gate=0.0,
        retain_prompts=retained(tmp_path, 0, 1, 3), retain_weight=3.0, max_train_steps=32,
    )  # fmt: skip
    found = moved(model, both)
    assert min(found[2], found[4]) > 2 * max(found[k] for k in (0, 1, 3))


def test_a_resumed_run_goes_on_with_what_it_began(model: Path, tmp_path: Path) -> None:
    began = config(
        model, tmp_path / "run", concepts=("2", "4"), sequential=True, gate=0.0, max_train_steps=2
    )
    run(began)
    before = adapter(tmp_path / "run")
    again = replace(began, resume_from_checkpoint="latest")
    for change in ({"concepts": ("3",)}, {"method": "svare"}, {"max_train_steps": 4}):
        (name,) = change
        with pytest.raises(UserError, match=f"began with {name} "):
            run(replace(again, **change))
    after = adapter(tmp_path / "run")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_preservation_holds_the_rest(model: Path, tmp_path: Path) -> None:
    """Modified prompts by one weight, retain prompts by another."""
    given: dict[str, Any] = {"mode": "joint", "gate": 0.0}
    pair = {"original": 2, "modified": 0, "concept": "2", "replacement": "0"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair))
    given |= {"concepts": (), "pairs": str(tmp_path / "pairs.jsonl"), "num_pictures": 12}
    free = moved(model, config(model, tmp_path / "free", preserve_weight=0.0, **given))
    held = moved(model, config(model, tmp_path / "held", preserve_weight=20.0, **given))
    assert held[0] < 0.5 * free[0]
    given |= {"retain_prompts": retained(tmp_path, 3), "retain_weight": 20.0}
    kept = moved(model, config(model, tmp_path / "kept", preserve_weight=0.0, **given))
    assert kept[3] < 0.5 * free[3]


def test_the_prefix_is_of_the_prompt_that_was_chosen(model: Path, tmp_path: Path) -> None:
    sides = []
    for prefix in ("neutral", "concept"):
        run(config(model, tmp_path / prefix, mode="joint", prefix=prefix, max_train_steps=3))
        sides.append(adapter(tmp_path / prefix))
    assert any(not torch.equal(sides[0][name], sides[1][name]) for name in sides[0])


def test_d2o_leaves_the_concept_for_the_other(model: Path, tmp_path: Path) -> None:
    pipe = NextScalePipeline.from_pretrained(model, dtype="float32")
    line = {"original": 2, "modified": 0, "concept": "2", "replacement": "0"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(line))
    settings = config(
        model, tmp_path / "run", method="d2o", concepts=(), pairs=str(tmp_path / "pairs.jsonl"),
        num_pictures=12, preserve_weight=0.0,
    )  # fmt: skip
    tokens = [pipe(class_labels=[label] * 12, seed=0, output_type="pt").tokens for label in (2, 0)]

    @torch.no_grad()
    def likelihood(transformer: NextScaleTransformer, wanted: Any) -> float:
        inputs = pipe.tokenizer.teacher_inputs(wanted)
        logps = transformer(inputs, class_labels=[2] * 12).log_softmax(-1)
        return float(logps.gather(-1, wanted[..., None]).sum() / 12)

    before = [likelihood(pipe.transformer, part) for part in tokens]
    edited = run(settings).transformer
    after = [likelihood(edited, part) for part in tokens]
    assert after[0] < before[0] - 1
    assert after[1] > after[0] + (before[1] - before[0])


def test_sace_trains_the_first_scales_and_keeps_them_sharp(model: Path, tmp_path: Path) -> None:
    tokens, entropies = torch.zeros(2, 30, dtype=torch.long), []
    for weight in (0.0, 5.0):
        settings = config(model, tmp_path / str(weight), method="sace", entropy_weight=weight)
        logp = logits(run(settings).transformer, 2, tokens)[:, :1].log_softmax(-1)
        entropies.append(float(-(logp.exp() * logp).sum(-1).mean()))
    assert entropies[1] < entropies[0] - 0.1


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
        ({"targets": ("nothing",)}, "targets nothing name no weights"),
        ({"concepts": ("\u00b2",)}, "no class of the model"),
        ({"retain_prompts": ("classes",)}, "retain_prompts ask for what is erased"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps"),
        ({"method": "uce", "resume_from_checkpoint": "latest"}, "trains nothing"),
        ({"attack_prompts": "list.txt"}, "attacks of the report, which are off"),
    ],
)
def test_what_does_not_fit_is_refused(
    changes: dict[str, Any], message: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        run(config(model, tmp_path / "run", **changes))
    assert not (tmp_path / "run" / "adapter").exists()


def test_nothing_is_written_over_the_base_or_an_earlier_result(model: Path, tmp_path: Path) -> None:
    for folder in (model, model / "inside", model.parent):
        with pytest.raises(UserError, match="the model is never written to"):
            run(config(model, folder))
    settings = config(model, tmp_path / "run", method="class_swap", max_train_steps=4)
    run(settings)
    before = adapter(tmp_path / "run")
    for method in ("class_swap", "ear"):
        with pytest.raises(UserError, match="already holds an adapter"):
            run(replace(settings, method=method))
    assert adapter(tmp_path / "run").keys() == before.keys()


def test_retain_rows_differ_between_micro_batches(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step sees as many different retain prompts, however it is shared out."""
    pipe = NextScalePipeline.from_pretrained(model, dtype="float32")
    tokens = torch.zeros(64, 30, dtype=torch.long)
    retain = Retained([i % 5 for i in range(64)], tokens + torch.arange(64)[:, None] % 32)
    drawn = Drawn([ConceptPair(2, 0, "2")] * 64, tokens, tokens, {})

    def rows(batch: int, micro: int, world: int) -> list[int]:
        settings = config(
            model, tmp_path / "run", mode="joint", train_batch_size=batch,
            gradient_accumulation_steps=micro,
        )  # fmt: skip
        monkeypatch.setattr("nextscale.processes.world_size", lambda: world)
        found = []
        for m in range(micro):
            for rank in range(world):
                monkeypatch.setattr("nextscale.processes.rank", lambda rank=rank: rank)
                task = Erasing(settings, pipe, drawn, retain, AdapterOff())
                indices = micro_batch(settings, 64, 3, m, rank, world)
                found += task.load_batch(indices, 3)["retain_tokens"][:, 0].tolist()
        return found

    whole = rows(12, 1, 1)
    assert rows(2, 3, 2) == rows(4, 3, 1) == rows(6, 1, 2) == whole
