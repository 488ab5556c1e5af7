"""Labels and prompts: what is accepted, what is refused, what the transformer receives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nextscale.data.captions import EXAMPLES, VOCABULARY
from nextscale.errors import UserError
from nextscale.tokenizers import MultiscaleVQ
from nextscale.var import (
    ClassConditioner,
    Condition,
    NextScaleTransformer,
    PretrainedTextConditioner,
    SamplingConfig,
    WordConditioner,
    sample,
)
from nextscale.var.conditioning import CONDITIONERS

BuildModel = Callable[..., NextScaleTransformer]
WIDTH = 32
SMALL: dict[str, Any] = {"encoder_width": 16, "encoder_depth": 1, "encoder_heads": 2}


def words(**settings: Any) -> WordConditioner:
    return WordConditioner(width=WIDTH, **{**SMALL, **settings}).eval()


# ---- classes ---------------------------------------------------------------------------------


def test_labels_are_numbers_digits_or_names() -> None:
    conditioner = ClassConditioner(
        width=WIDTH, num_classes=3, class_names=["Cat", "dog", "big owl"]
    )
    ids = conditioner.tokenize([2, "1", "cat", "DOG", "big owl"])
    assert ids.tolist() == [2, 1, 0, 1, 2]


def test_the_null_class_follows_the_last_class() -> None:
    conditioner = ClassConditioner(width=WIDTH, num_classes=3)
    assert conditioner.null(2).tolist() == [3, 3]
    condition = conditioner(conditioner.null(2))
    assert torch.equal(condition.pooled, conditioner.embedding.weight[[3, 3]])
    assert condition.context is None
    assert conditioner.context_dim is None


@pytest.mark.parametrize("label", [3, -1, "3", "-1"])
def test_labels_out_of_range_are_refused(label: int | str) -> None:
    conditioner = ClassConditioner(width=WIDTH, num_classes=3)
    with pytest.raises(UserError, match=f"label {label} is out of range: .* classes 0 to 2"):
        conditioner.tokenize([0, label])


def test_unknown_names_are_refused_and_known_ones_listed() -> None:
    named = ClassConditioner(width=WIDTH, num_classes=2, class_names=["cat", "dog"])
    with pytest.raises(UserError, match='no class "owl"; it knows cat, dog'):
        named.tokenize(["owl"])
    plain = ClassConditioner(width=WIDTH, num_classes=2)
    with pytest.raises(UserError, match='no class "cat"; it knows numbers 0 to 1'):
        plain.tokenize(["cat"])


def test_a_thousand_unnamed_classes_are_those_of_imagenet() -> None:
    conditioner = ClassConditioner(width=WIDTH, num_classes=1000)
    assert conditioner.tokenize(["golden retriever", 88, "macaw"]).tolist() == [207, 88, 88]
    with pytest.raises(
        UserError, match=r'no ImageNet class "goldn retriever"\. Did you mean golden'
    ):
        conditioner.tokenize(["goldn retriever"])


# ---- words -----------------------------------------------------------------------------------


def test_words_are_split_lowered_and_padded() -> None:
    conditioner = words(words=("a", "red", ",", "dot"), max_words=5)
    ids = conditioner.tokenize(["A red dot", "dot,red"])
    start, a, red, comma, dot, pad = 1, 2, 3, 4, 5, 0
    assert ids.tolist() == [[start, a, red, dot, pad, pad], [start, dot, comma, red, pad, pad]]
    assert conditioner.null(1).tolist() == [[start, pad, pad, pad, pad, pad]]
    assert torch.equal(conditioner.tokenize([""]), conditioner.null(1))


def test_word_contexts_are_masked_where_they_are_padded() -> None:
    conditioner = words(words=("a", "b"), max_words=4)
    condition = conditioner(conditioner.tokenize(["a b", "b"]))
    assert condition.pooled.shape == (2, WIDTH)
    assert condition.context is not None
    assert condition.context.shape == (2, 5, conditioner.context_dim)
    assert condition.mask is not None
    assert condition.mask.sum(dim=1).tolist() == [3, 2]


def test_the_length_of_the_padding_does_not_change_a_caption() -> None:
    conditioner = words(words=("a", "b"), max_words=6)
    ids = conditioner.tokenize(["a b a"])
    with torch.no_grad():
        conditioner.position.normal_(generator=torch.Generator().manual_seed(0))
        conditioner.embedding.weight[0] = 50.0  # the padding symbol's
        pooled = conditioner(ids).pooled
        conditioner.embedding.weight[0] = -9.0
        torch.testing.assert_close(conditioner(ids).pooled, pooled)


def test_the_order_of_words_matters(build_model: BuildModel) -> None:
    model = build_model(words(words=("red", "left", "blue"), max_words=3))
    one, other = model.condition(["red left blue"]), model.condition(["blue left red"])
    assert (one.pooled - other.pooled).abs().max() > 1e-3


@pytest.mark.parametrize("example", EXAMPLES)
def test_scenes_prompts_are_brought_into_canonical_form(example: str) -> None:
    conditioner = words(words=VOCABULARY, grammar="scenes")
    expected = conditioner.tokenize([example])
    assert torch.equal(conditioner.tokenize([f"  {example.upper()}. "]), expected)


def test_scenes_prompts_in_other_words_give_the_same_ids() -> None:
    conditioner = words(words=VOCABULARY, grammar="scenes")
    one = conditioner.tokenize(["one red circle to the left of a blue square"])
    assert torch.equal(one, conditioner.tokenize(["a red circle left of a blue square"]))
    assert (conditioner.null(1) != 0).sum() == 1


def test_prompts_outside_the_grammar_show_the_grammar() -> None:
    conditioner = words(words=VOCABULARY, grammar="scenes")
    with pytest.raises(UserError, match='"a photo of a cat" is outside the grammar') as caught:
        conditioner.tokenize(["a photo of a cat"])
    assert EXAMPLES[0] in str(caught.value)


def test_unknown_words_and_long_prompts_are_refused() -> None:
    conditioner = words(words=("a", "cat"), max_words=3)
    with pytest.raises(UserError, match="has not learned: dog, green; it knows 2 words such as a"):
        conditioner.tokenize(["a cat", "a dog green"])
    with pytest.raises(UserError, match="has 4 words, the model reads 3; shorten it"):
        conditioner.tokenize(["a a a cat"])


# ---- learning and files ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["class", "words"])
def test_the_gradient_reaches_the_embedding_of_what_was_asked_for(
    build_model: BuildModel, kind: str
) -> None:
    model = build_model(words(words=("a", "b", "c"), max_words=4) if kind == "words" else None)
    ids = model.conditioner.tokenize(["a b", "b"] if kind == "words" else [1, 3])
    logits = model(torch.zeros(2, 29, 8), ids=ids)
    logits.square().mean().backward()
    gradient = model.conditioner.get_parameter("embedding.weight").grad
    assert gradient is not None
    used = set(torch.nonzero(gradient.abs().sum(dim=1)).flatten().tolist())
    # Words: start, a and b; classes: the two labels.
    assert used - {0} == ({1, 2, 3} if kind == "words" else {1, 3})


def test_the_context_has_an_influence_of_its_own(build_model: BuildModel) -> None:
    model = build_model(words(words=("a", "b"), max_words=4))
    condition = model.condition(["a b"])
    other = Condition(condition.pooled, model.condition(["b b"]).context, condition.mask)
    inputs = torch.zeros(1, 29, 8)
    with torch.no_grad():
        assert (model(inputs, condition) - model(inputs, other)).abs().max() > 1e-3


@pytest.mark.parametrize(
    "conditioner",
    [
        ClassConditioner(width=WIDTH, num_classes=3),
        ClassConditioner(width=WIDTH, num_classes=2, class_names=("cat", "dog")),
        words(words=("a", "b"), max_words=7),
    ],
    ids=["classes", "names", "words"],
)
def test_a_conditioner_is_built_again_from_its_json(
    conditioner: ClassConditioner | WordConditioner,
) -> None:
    values = json.loads(json.dumps(conditioner.config()))
    again = CONDITIONERS[conditioner.kind](**values)
    again.load_state_dict(conditioner.state_dict())
    assert json.loads(json.dumps(again.config())) == values
    assert again.context_dim == conditioner.context_dim


# ---- text encoders of transformers -----------------------------------------------------------


@pytest.fixture(scope="module")
def text_encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Tiny random encoders with a word-level tokenizer, saved as transformers does."""
    transformers = pytest.importorskip("transformers", reason="comes with the extra [align]")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "red": 4, "circle": 5, "blue": 6}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    text = transformers.CLIPTextConfig(
        vocab_size=7,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        eos_token_id=2,
        bos_token_id=1,
        pad_token_id=0,
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=8,
        patch_size=4,
    )
    t5 = transformers.T5Config(
        vocab_size=7,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=2,
    )
    both = transformers.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoders = {
            "clip text tower": transformers.CLIPTextModel(text),
            "clip": transformers.CLIPModel(both),
            "t5": transformers.T5Model(t5),
        }
    folders: dict[str, str] = {}
    for name, encoder in encoders.items():
        folder = tmp_path_factory.mktemp("encoder")
        encoder.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folders[name] = str(folder)
    return folders


ENCODERS = ["clip text tower", "clip", "t5"]


@pytest.mark.parametrize("name", ENCODERS)
def test_a_pretrained_encoder_gives_masked_context_and_a_pooled_vector(
    text_encoders: dict[str, str], name: str
) -> None:
    conditioner = PretrainedTextConditioner(width=WIDTH, model=text_encoders[name], max_words=6)
    ids = conditioner.tokenize(["red circle", "blue"])
    assert ids.shape == (2, 6, 2)
    assert ids[0, :, 0].tolist() == [1, 4, 5, 2, 0, 0]
    condition = conditioner(ids)
    assert condition.pooled.shape == (2, WIDTH)
    assert condition.context is not None
    assert condition.context.shape == (2, 6, 16)
    assert conditioner.context_dim == 16
    assert condition.mask is not None
    assert condition.mask.sum(dim=1).tolist() == [4, 3]
    alone = conditioner(conditioner.tokenize(["blue"]))
    torch.testing.assert_close(alone.pooled, condition.pooled[1:])
    assert torch.equal(conditioner.null(1), conditioner.tokenize([""]))


def test_clip_gives_its_text_tower_and_t5_its_encoder(text_encoders: dict[str, str]) -> None:
    def parts(name: str) -> set[str]:
        conditioner = PretrainedTextConditioner(width=WIDTH, model=text_encoders[name], max_words=6)
        return {key.split(".")[0] for key, _ in conditioner._frozen[0].named_parameters()}

    assert not parts("clip") & {"vision_model", "visual_projection", "logit_scale"}
    assert parts("clip") == parts("clip text tower")
    assert "decoder" not in parts("t5")


def test_the_frozen_encoder_is_neither_trained_nor_stored(
    build_model: BuildModel,
    tiny_tokenizer: MultiscaleVQ,
    text_encoders: dict[str, str],
    tmp_path: Path,
) -> None:
    conditioner = PretrainedTextConditioner(width=WIDTH, model=text_encoders["clip"], max_words=6)
    assert {name for name, _ in conditioner.named_parameters()} == {"pool.weight", "pool.bias"}
    model = build_model(conditioner)
    model.save_pretrained(tmp_path)
    again = NextScaleTransformer.from_pretrained(tmp_path)
    runs = [
        list(
            sample(
                each,
                tiny_tokenizer,
                each.condition(["red circle", "blue"]),
                SamplingConfig(guidance_scale=3.0),
                seeds=[1, 2],
            )
        )
        for each in (model, again)
    ]
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one.logits, other.logits)
    model(torch.zeros(1, 29, 8), model.condition(["red"])).square().mean().backward()
    assert conditioner.pool.weight.grad is not None
    assert conditioner.pool.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in conditioner._frozen[0].parameters())


def test_an_absent_text_encoder_is_named(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="comes with the extra [align]")
    with pytest.raises(UserError, match=r"could not be loaded .* pass a local folder") as caught:
        PretrainedTextConditioner(width=WIDTH, model=str(tmp_path / "absent"))
    assert caught.value.exit_code == 1
