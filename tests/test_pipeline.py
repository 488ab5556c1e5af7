"""The pipeline: what a call returns, and that draws belong to the picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from nextscale.errors import UserError
from nextscale.pipeline import NextScalePipeline, resolve_dtype
from nextscale.streams import candidate_seeds, image_seeds
from nextscale.tokenizers import MultiscaleVQ
from nextscale.training.session import resolve_precision
from nextscale.var import NextScaleTransformer, SamplingConfig, WordConditioner


@pytest.fixture(scope="module")
def pipe(tiny_tokenizer: MultiscaleVQ, tiny_model: NextScaleTransformer) -> NextScalePipeline:
    settings = SamplingConfig(guidance_scale=2.0, top_k=16, top_p=0.9)
    return NextScalePipeline(tiny_tokenizer, tiny_model, settings)


def test_output_is_prompt_major_and_seeded_per_image(pipe: NextScalePipeline) -> None:
    out = pipe(class_labels=[1, 3], num_images_per_prompt=2, seed=7)
    assert out.seeds == [7, 8, 9, 10]
    assert len(out.images) == 4
    assert out.images[0].size == (8, 8)
    alone = pipe(class_labels=3, seed=9)
    assert torch.equal(alone.tokens[0], out.tokens[2])


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5])
def test_batch_size_changes_no_token(pipe: NextScalePipeline, batch_size: int) -> None:
    whole = pipe(class_labels=[0, 1, 2, 3, 4], seed=3)
    parts = pipe(class_labels=[0, 1, 2, 3, 4], seed=3, batch_size=batch_size)
    assert torch.equal(whole.tokens, parts.tokens)


def test_output_types_agree(pipe: NextScalePipeline) -> None:
    pt = pipe(class_labels=0, seed=1, output_type="pt").images
    array = pipe(class_labels=0, seed=1, output_type="np").images
    pil = pipe(class_labels=0, seed=1).images[0]
    assert pt.shape == (1, 3, 8, 8)
    assert 0 <= pt.min() <= pt.max() <= 1
    assert np.array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    assert np.array_equal(np.asarray(pil), (array[0] * 255).round().astype(np.uint8))


def test_scales_end_in_the_picture(pipe: NextScalePipeline) -> None:
    out = pipe(class_labels=[0, 1, 2], seed=1, output_type="pt", return_scales=True, batch_size=2)
    assert out.scales is not None
    assert len(out.scales) == 4
    assert torch.equal(out.scales[-1], out.images)


def test_the_likeliest_candidate_is_kept(pipe: NextScalePipeline) -> None:
    model, tokenizer = pipe.transformer, pipe.tokenizer
    best = pipe(class_labels=[0, 1, 2], seed=1, num_candidates=4, return_scales=True)
    for i, label in enumerate([0, 1, 2]):
        seeds = candidate_seeds([1 + i], 4)
        assert seeds[0] == 1 + i  # candidate 0 is the picture without candidates
        tokens = pipe(class_labels=[label] * 4, seed=seeds).tokens
        with torch.no_grad():  # teacher-forced, as an oracle of the cached pass
            logits = model(tokenizer.teacher_inputs(tokens), class_labels=[label] * 4)
        chosen = logits.log_softmax(-1).gather(2, tokens[..., None]).sum(dim=(1, 2))
        assert len(chosen.unique()) > 1
        assert torch.equal(best.tokens[i], tokens[chosen.argmax()])
    assert best.scales is not None
    assert len(best.scales[0]) == len(best.images) == 3
    parts = pipe(class_labels=[0, 1, 2], seed=1, num_candidates=4, batch_size=2)
    assert torch.equal(parts.tokens, best.tokens)


def test_save_and_load_give_the_same_tokens(pipe: NextScalePipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "model")
    again = NextScalePipeline.from_pretrained(tmp_path / "model", dtype="float32", device="cpu")
    assert again.generation == pipe.generation
    assert torch.equal(
        again(class_labels=[0, 4], seed=5).tokens, pipe(class_labels=[0, 4], seed=5).tokens
    )
    assert "a prompt" not in (tmp_path / "model" / "README.md").read_text()


def test_generators(pipe: NextScalePipeline) -> None:
    def draw() -> list[int]:
        return pipe(class_labels=[0, 1], generator=torch.Generator().manual_seed(4)).seeds

    assert draw() == draw()
    assert draw()[1] == draw()[0] + 1
    listed = [torch.Generator().manual_seed(i) for i in (4, 4)]
    seeds = pipe(class_labels=[0, 1], generator=listed).seeds
    assert seeds[0] == seeds[1]


def test_random_seeds_are_returned_and_differ(pipe: NextScalePipeline) -> None:
    first, second = pipe(class_labels=0), pipe(class_labels=0)
    assert first.seeds != second.seeds
    assert torch.equal(pipe(class_labels=0, seed=first.seeds[0]).tokens, first.tokens)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one"),
        ({"prompt": "x", "class_labels": 1}, "exactly one"),
        ({"prompt": "x"}, "takes class_labels"),
        ({"class_labels": 5}, "0 to 4"),
        ({"class_labels": []}, "empty"),
        ({"class_labels": 0, "top_p": 0.0}, "Use 1.0 to switch"),
        ({"class_labels": 0, "top_k": -1}, "top_k"),
        ({"class_labels": 0, "temperature": 0.0}, "temperature"),
        ({"class_labels": 0, "seed": -1}, "out of range"),
        ({"class_labels": [0, 1], "seed": 2**32 - 1}, "out of range"),
        ({"class_labels": 0, "num_images_per_prompt": 0}, "num_images_per_prompt"),
        ({"class_labels": 0, "output_type": "jpeg"}, "output_type"),
        ({"class_labels": 0, "negative_prompt": "x"}, "negative_prompt"),
        ({"class_labels": 0, "seed": 1, "generator": torch.Generator()}, "not both"),
    ],
)
def test_bad_values_are_explained(pipe: NextScalePipeline, arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        pipe(**arguments)


def test_unknown_keywords_are_explained(pipe: NextScalePipeline) -> None:
    with pytest.raises(TypeError, match="number of scales"):
        pipe(class_labels=0, num_inference_steps=50)
    with pytest.raises(TypeError, match=r"guidance_scale=2\.5"):
        pipe(class_labels=0, cfg=1.5)


def test_negative_prompt_replaces_the_null_condition(
    tiny_tokenizer: MultiscaleVQ, build_model: Callable[..., NextScaleTransformer]
) -> None:
    words = WordConditioner(width=32, words=("red", "blue"), encoder_width=16, encoder_heads=2)
    pipe = NextScalePipeline(tiny_tokenizer, build_model(words), SamplingConfig(guidance_scale=4.0))
    plain = pipe("red", seed=0, num_images_per_prompt=4).tokens
    against = pipe("red", negative_prompt="blue", seed=0, num_images_per_prompt=4).tokens
    itself = pipe("red", negative_prompt="red", seed=0, num_images_per_prompt=4).tokens
    unguided = pipe("red", guidance_scale=1.0, seed=0, num_images_per_prompt=4).tokens
    assert not torch.equal(plain, against)
    assert torch.equal(itself, unguided)


def test_a_pipeline_says_what_it_is(pipe: NextScalePipeline) -> None:
    assert repr(pipe).startswith("NextScalePipeline(8x8 pixels from class labels, 4 scales, ")


def test_edit_keeps_the_outside_of_the_box(pipe: NextScalePipeline) -> None:
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    kept = pipe.edit(images, box=(0.0, 0.0, 0.5, 0.5), seed=1)
    source = pipe.tokenizer.encode(images * 2 - 1)
    last = pipe.tokenizer.schedule.slices[-1]
    grid = (kept.tokens == source)[:, last].view(2, 4, 4)
    assert grid[:, 2:].all()
    assert grid[:, :, 2:].all()
    assert kept.images[0].size == (8, 8)
    hot = {"box": (0.0, 0.0, 0.5, 0.5), "seed": 1, "temperature": 2.0}
    best = pipe.edit(images, **hot, num_candidates=8)
    grid = (best.tokens == source)[:, last].view(2, 4, 4)
    assert grid[:, 2:].all()
    assert not torch.equal(
        best.tokens, pipe.edit(images, **hot).tokens
    )  # a candidate is likelier than the first


def test_mismatched_parts_are_refused(
    tiny_tokenizer: MultiscaleVQ, build_model: Callable[..., NextScaleTransformer]
) -> None:
    with pytest.raises(UserError, match="do not belong together"):
        NextScalePipeline(tiny_tokenizer, build_model(codebook_size=16))


def test_image_seeds_stay_in_range_for_any_generator() -> None:
    for seed in range(200):
        seeds = image_seeds(None, torch.Generator().manual_seed(seed), 100)
        assert max(seeds) < 2**32


@pytest.mark.parametrize(
    ("abilities", "dtype", "precision"),
    [
        ({"amx_bf16": True}, torch.bfloat16, "bf16"),
        ({"amx_bf16": False, "avx512_bf16": True}, torch.bfloat16, "bf16"),
        ({"avx512_f": True, "amx_tile": True}, torch.float32, "no"),
        ({}, torch.float32, "no"),
    ],
)
def test_auto_is_bfloat16_where_the_cpu_multiplies_in_it(
    abilities: dict[str, bool], dtype: torch.dtype, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: abilities)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_dtype("auto", torch.device("cpu")) == dtype
    assert resolve_precision("auto") == precision
    assert resolve_dtype("float16", torch.device("cpu")) == torch.float16
