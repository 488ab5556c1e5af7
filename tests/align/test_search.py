"""Search at inference time: what it draws, chooses and costs."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_pipelines
import torch
from PIL import Image
from torch import Tensor

from nextscale.align.policies.next_scale import NextScalePolicy
from nextscale.align.rewards import as_reward, open_reward
from nextscale.align.rewards.composition import Preference
from nextscale.align.search import BestOf, GenARM, MGSelect, Search, TreeSearch
from nextscale.align.search.search import Drawer
from nextscale.cli import main
from nextscale.cli.generate import GenerateConfig
from nextscale.data.images import to_uint8
from nextscale.errors import UserError
from nextscale.pipeline import NextScalePipeline, Request
from nextscale.streams import candidate_seeds
from nextscale.tokenizers import MultiscaleVQ
from nextscale.var import NextScaleTransformer, SamplingConfig
from nextscale.var.filtering import ImageDraws, filter_logits

LABELS = [0, 1, 2, 3]


@pytest.fixture(scope="module")
def pipe(
    build_model: Callable[..., NextScaleTransformer], tiny_tokenizer: MultiscaleVQ
) -> NextScalePipeline:
    return NextScalePipeline(tiny_tokenizer, build_model(), SamplingConfig(guidance_scale=2.0))


def light(images: Tensor, prompts: Sequence[Any]) -> Tensor:
    return images.mean((1, 2, 3))


REWARD = as_reward(light, "light")
SEARCHES: dict[str, Callable[[int], Search]] = {
    "best_of": lambda n: BestOf(REWARD, n),
    "greedy": lambda n: TreeSearch(REWARD, n),
    "sampling": lambda n: TreeSearch(REWARD, n, greedy=False),
}


@pytest.mark.parametrize("name", [*SEARCHES, "mg_select"])
def test_one_sample_is_the_picture_without_search(name: str, pipe: NextScalePipeline) -> None:
    search = MGSelect(1) if name == "mg_select" else SEARCHES[name](1)
    plain = pipe(class_labels=LABELS, seed=5, output_type="pt")
    found = pipe(class_labels=LABELS, seed=5, output_type="pt", search=search)
    assert torch.equal(found.tokens, plain.tokens)
    torch.testing.assert_close(found.images, plain.images)
    first = 5 / 30 if name == "mg_select" else 0  # of the tokens, which are compared first
    assert search.cost.passes == pytest.approx(4 + 4 * first)
    assert (search.cost.samples, search.cost.pictures) == (4, 4)


@pytest.mark.parametrize("name", ["best_of", "greedy"])
def test_more_samples_never_choose_a_worse_one(name: str, pipe: NextScalePipeline) -> None:
    values = []
    for count in (1, 4, 8):
        out = pipe(class_labels=LABELS, seed=5, output_type="pt", search=SEARCHES[name](count))
        values.append(light(out.images, LABELS))
    assert bool((values[1] >= values[0]).all())
    assert bool((values[2] >= values[1]).all())
    assert values[2].mean() > values[0].mean()


@pytest.mark.parametrize("name", [*SEARCHES, "mg_select"])
def test_batches_change_nothing(name: str, pipe: NextScalePipeline) -> None:
    make: Any = SEARCHES.get(name, MGSelect)
    whole = pipe(class_labels=LABELS, seed=5, output_type="pt", search=make(5))
    parts = pipe(class_labels=LABELS, seed=5, batch_size=1, output_type="pt", search=make(5))
    assert torch.equal(whole.tokens, parts.tokens)


def test_what_parts_late_shares_the_first_scales(pipe: NextScalePipeline) -> None:
    seen: list[Drawer] = []

    class Kept(TreeSearch):
        def choose(self, drawer: Drawer) -> Sequence[int]:
            seen.append(drawer)
            return super().choose(drawer)

    search = Kept(REWARD, 10, steps=(2,), width=4, growth=0)
    pipe(class_labels=[1], seed=0, search=search)
    (drawer,) = seen
    assert drawer.trajectory is not None
    assert search.cost.samples == 10
    coarse = torch.cat(drawer.trajectory.actions[:2], dim=1)
    assert len({tuple(row) for row in coarse.tolist()}) <= 4  # width children of the root
    fine = torch.cat(drawer.trajectory.actions, dim=1)
    assert len({tuple(row) for row in fine.tolist()}) == 10
    # 4 whole samples; 3 that continue 5 of 30 tokens, which run once more for all 3; 3 one by one
    assert search.cost.passes == pytest.approx(4 + (5 / 30 + 3 * 25 / 30) + 3)


def test_by_default_a_tree_goes_on_from_its_samples(pipe: NextScalePipeline) -> None:
    """Else it would be best-of-N under another name."""
    fresh = []

    class Counted(Drawer):
        def sample(self, pictures: Sequence[int]) -> list[int]:
            fresh.extend(pictures)
            return super().sample(pictures)

    search = TreeSearch(REWARD, 16)
    drawer = Counted(NextScalePolicy(pipe), REWARD, [1, 2], [0, 1], search.cost)
    search.choose(drawer)
    assert search.cost.samples == 32
    assert 2 * 2 <= len(fresh) <= 2 * 8


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_the_unit_of_a_reward_changes_no_tree(scale: float, pipe: NextScalePipeline) -> None:
    scaled = as_reward(lambda images, prompts: 7 + scale * light(images, prompts), "scaled")
    trees = [TreeSearch(reward, 12) for reward in (REWARD, scaled)]
    found = [pipe(class_labels=LABELS, seed=5, search=tree).tokens for tree in trees]
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("name", ["best_of", "greedy"])
def test_what_cannot_be_better_takes_no_more_samples(name: str, pipe: NextScalePipeline) -> None:
    limit = float(light(pipe(class_labels=LABELS, seed=0, output_type="pt").images, []).median())

    def verdict(images: Tensor, prompts: Sequence[Any]) -> Tensor:
        return (light(images, prompts) > limit).float()

    searches = []
    for range_ in (None, (0.0, 1.0)):
        reward = as_reward(verdict, "verdict", range=range_)
        made = BestOf(reward, 6) if name == "best_of" else TreeSearch(reward, 6)
        found = pipe(class_labels=LABELS, seed=0, output_type="pt", search=made)
        searches.append((made.cost, found))
    (whole, first), (short, second) = searches
    assert whole.samples == 24 > short.samples >= 4
    right = verdict(second.images, LABELS)
    assert torch.equal(right, verdict(first.images, LABELS))
    if name == "best_of":
        assert torch.equal(first.tokens, second.tokens)
    drawn = TreeSearch(as_reward(verdict, "verdict", range=(0.0, 1.0)), 6, greedy=False)
    pipe(class_labels=LABELS, seed=0, search=drawn)
    assert drawn.cost.samples == 24  # stopping would tilt what it draws


def test_sampling_draws_its_answer_by_reward(pipe: NextScalePipeline) -> None:
    """DTS gives a sample of the tilted distribution, not the best one."""
    labels, seeds = [i % 5 for i in range(48)], list(range(48))
    policy = NextScalePolicy(pipe)

    def value(**settings: Any) -> float:
        chosen = TreeSearch(REWARD, 6, **settings).on(policy, labels, seeds)
        return float(light(policy.decode(chosen), labels).mean())

    plain = float(light(policy.decode(BestOf(REWARD, 1).on(policy, labels, seeds)), labels).mean())
    sampled = value(greedy=False, sharpness=2.0)
    assert plain < sampled < value(greedy=False, sharpness=50.0) == pytest.approx(value(), abs=0.01)


def test_a_tree_finds_what_independent_samples_do_not(
    pipe: NextScalePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rare things, one of the first scales and one of the last: one is kept for the other."""
    worth = torch.randn(30, 32, generator=torch.Generator().manual_seed(0))
    policy = NextScalePolicy(pipe, replace(pipe.generation, temperature=3.0))
    labels, seeds = [i % 5 for i in range(64)], list(range(64))

    def parts(trajectory: Any) -> Tensor:
        tokens = torch.cat(trajectory.actions, dim=1)
        each = worth[torch.arange(30), tokens]
        return torch.stack([each[:, :5].mean(1), each[:, 14:].mean(1)], dim=1)

    generators = [torch.Generator().manual_seed(i) for i in range(500)]
    base = policy.sample(policy.encode([i % 5 for i in range(500)]), generators=generators)
    limits = parts(base).quantile(0.85, dim=0)

    def decode(policy: NextScalePolicy, trajectory: Any) -> Tensor:
        found = (parts(trajectory) > limits).float().mean(1)
        return found[:, None, None, None].expand(-1, 3, 1, 1)

    monkeypatch.setattr(NextScalePolicy, "decode", decode)
    both = {}
    for search in (BestOf(REWARD, 16), TreeSearch(REWARD, 16, steps=(2, 3))):
        chosen = search.on(policy, labels, seeds)
        both[type(search).__name__] = float((parts(chosen) > limits).all(1).float().mean())
    assert both["TreeSearch"] > both["BestOf"] + 0.1, both


def test_sampling_settings_hold_in_a_search(
    pipe: NextScalePipeline, caplog: pytest.LogCaptureFixture
) -> None:
    """Also those that training could not judge, without a word about it."""
    for settings in ({"top_k": 4}, {"guidance_threshold": 0.05}, {"control_guidance_scale": 2.0}):
        own = NextScalePipeline(
            pipe.tokenizer, pipe.transformer, replace(pipe.generation, **settings)
        )
        found = own(class_labels=LABELS, seed=5, search=BestOf(REWARD, 1)).tokens
        assert torch.equal(found, own(class_labels=LABELS, seed=5).tokens)
    assert not torch.equal(found, pipe(class_labels=LABELS, seed=5, top_k=4).tokens)
    assert not caplog.records


def test_unscorable_samples_are_never_chosen(pipe: NextScalePipeline) -> None:
    policy, seen = NextScalePolicy(pipe), []
    limit = float(light(pipe(class_labels=LABELS, seed=0, output_type="pt").images, []).median())

    def picky(images: Tensor, prompts: Sequence[Any]) -> Tensor:
        values = -light(images, prompts)  # the best of those that count lie at the limit
        seen.extend(values.tolist())
        return torch.where(-values <= limit, torch.nan, values)

    for search in (BestOf(as_reward(picky, "picky"), 8), TreeSearch(as_reward(picky, "picky"), 8)):
        found = policy.decode(search.on(policy, LABELS, [0, 1, 2, 3]))
        assert bool((light(found, []) > limit).all())
    assert min(-value for value in seen) <= limit < max(-value for value in seen)


def test_mg_select_takes_what_the_prompt_decided(pipe: NextScalePipeline) -> None:
    ids = pipe.transformer.conditioner.tokenize([1] * 6)
    steps = list(pipe.stream(ids, pipe.generation, seeds=candidate_seeds([3], 6)))
    tokens = torch.cat([step.tokens for step in steps], dim=1)
    apart = [torch.zeros(6)]
    for step in steps:
        if step.unconditional is not None:
            p, q = (x.log_softmax(-1) for x in (step.conditional, step.unconditional))
            apart.append(apart[-1] + (p.exp() * (p - q)).sum((1, 2)))
    # the first scale is not guided; by default two of four count
    for scales, values in ((4, apart[-1]), (None, apart[1]), (3, apart[2])):
        search = MGSelect(6, scales=scales)
        found = pipe(class_labels=[1], seed=3, search=search).tokens
        assert torch.equal(found[0], tokens[values.argmax()])
        compared = sum(pipe.transformer.schedule.lengths[: scales or 2])
        assert search.cost.passes == pytest.approx(6 * compared / 30 + 1)
    assert len({int(values.argmax()) for values in apart[1:]}) > 1
    with pytest.raises(UserError, match="guidance is off"):
        pipe(class_labels=[1], seed=3, guidance_scale=1.0, search=MGSelect(6))
    with pytest.raises(UserError, match="guidance is off"):
        pipe(class_labels=[1], seed=3, search=MGSelect(6, scales=1))
    with pytest.raises(UserError, match="leave out one of the two"):
        pipe(class_labels=[1], seed=3, guidance_threshold=0.1, search=MGSelect(6))


def test_another_model_weighs_the_tokens(
    pipe: NextScalePipeline, build_model: Callable[..., NextScaleTransformer]
) -> None:
    """What is drawn from base x judge^weight, given all tokens before it and equal uniforms."""
    model = build_model(seed=7)
    judge = NextScalePipeline(pipe.tokenizer, model)
    plain = pipe(class_labels=LABELS, seed=5, output_type="pt")
    off = GenARM(judge, 0.0)
    base = pipe(class_labels=LABELS, seed=5, output_type="pt", search=off)
    assert torch.equal(base.tokens, plain.tokens)
    mixed = GenARM(judge, 0.5)
    found = pipe(class_labels=LABELS, seed=5, guidance_scale=1.0, output_type="pt", search=mixed)
    assert (mixed.cost.samples, mixed.cost.passes) == (4, 8)  # without guidance both cost the same
    assert off.cost.passes == pytest.approx(4 * (1 + 30 / (1 + 2 * 29)))
    ids = pipe.transformer.conditioner.tokenize(LABELS)
    inputs = pipe.tokenizer.teacher_inputs(found.tokens)
    with torch.no_grad():
        logits = pipe.transformer(inputs, ids=ids) + 0.5 * model(inputs, ids=ids)
    draws = ImageDraws(found.seeds, pipe.tokenizer.schedule.lengths)
    for scale, where in enumerate(pipe.tokenizer.schedule.slices):
        assert torch.equal(draws.tokens(scale, logits[:, where]), found.tokens[:, where])
    assert not torch.equal(
        found.tokens, pipe(class_labels=LABELS, seed=5, guidance_scale=1.0).tokens
    )


def test_temperature_holds_for_both_and_filters_for_the_base(
    pipe: NextScalePipeline, build_model: Callable[..., NextScaleTransformer]
) -> None:
    model = build_model(seed=7)
    settings: dict[str, Any] = {"guidance_scale": 1.0, "temperature": 0.7, "top_k": 5}
    search = GenARM(NextScalePipeline(pipe.tokenizer, model), 0.5)
    found = pipe(class_labels=LABELS, seed=5, search=search, **settings)
    ids = pipe.transformer.conditioner.tokenize(LABELS)
    inputs = pipe.tokenizer.teacher_inputs(found.tokens)
    with torch.no_grad():
        base = filter_logits(pipe.transformer(inputs, ids=ids) / 0.7, top_k=5, top_p=1.0)
        logits = base + 0.5 * model(inputs, ids=ids) / 0.7
    draws = ImageDraws(found.seeds, pipe.tokenizer.schedule.lengths)
    for scale, where in enumerate(pipe.tokenizer.schedule.slices):
        assert torch.equal(draws.tokens(scale, logits[:, where]), found.tokens[:, where])


def test_a_judge_of_other_tokens_is_refused(
    pipe: NextScalePipeline, build_model: Callable[..., NextScaleTransformer]
) -> None:
    other = copy.deepcopy(pipe.tokenizer)
    other.quantizer.codebook.weight.data += 1
    search = GenARM(NextScalePipeline(other, build_model()))
    with pytest.raises(UserError, match="another tokenizer"):
        pipe(class_labels=[0], seed=0, search=search)
    with pytest.raises(UserError, match="more_smooth"):
        pipe(class_labels=[0], seed=0, more_smooth=True, search=GenARM(pipe))
    with pytest.raises(UserError, match="be 0 or more"):
        GenARM(pipe, -1.0)


def test_what_is_no_search_is_refused(pipe: NextScalePipeline) -> None:
    for wrong in ("best_of", BestOf):
        given: Any = wrong
        with pytest.raises(UserError, match="it takes an object such as BestOf"):
            pipe(class_labels=[0], search=given)
    with pytest.raises(UserError, match="takes the place of num_candidates"):
        pipe(class_labels=[0], search=BestOf(REWARD), num_candidates=4)
    name: Any = "clip"
    with pytest.raises(UserError, match=r'open_reward\("clip"\) opens one by name'):
        BestOf(as_reward(name))

    def blind(images: Tensor, prompts: Sequence[Any]) -> list[None]:
        return [None] * len(images)

    with pytest.raises(UserError, match='"blind" could score none of 8 samples'):
        pipe(class_labels=[0, 1], seed=0, search=BestOf(as_reward(blind, "blind"), 4))


def test_what_does_not_fit_is_refused(pipe: NextScalePipeline) -> None:
    with pytest.raises(UserError, match="does not judge pictures one by one"):
        BestOf(open_reward("vendi"))
    with pytest.raises(UserError, match="does not judge pictures one by one"):
        BestOf(Preference(REWARD))
    with pytest.raises(UserError, match="rise from 1"):
        TreeSearch(REWARD, steps=(2, 1))
    with pytest.raises(UserError, match="steps ends at 9"):
        pipe(class_labels=[0], seed=0, search=TreeSearch(REWARD, steps=(9,)))
    for extra in ({"return_scales": True}, {"start": torch.zeros(1, 32)}):
        with pytest.raises(UserError, match="search takes no start"):
            pipe(class_labels=[0], seed=0, search=BestOf(REWARD), **extra)
    ids = pipe.transformer.conditioner.tokenize([0])
    request = Request([0], ids, pipe.generation, [0], ids, [])
    with pytest.raises(UserError, match="leave out controls, negative_prompt"):
        BestOf(REWARD)(pipe, request)


# ---- the command ---------------------------------------------------------------------------------


def test_generate_searches(
    pipe: NextScalePipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe.save_pretrained(tmp_path / "model")
    command = ["generate", "--model", str(tmp_path / "model"), "--class_labels", "0", "1"]
    command += ["--seed", "3", "--dtype", "float32", "--quiet", "--num_images", "2"]
    flags = ["--search", "best_of", "--search_reward", "brightness", "--search_samples", "4"]
    assert main([*command, "--output_dir", str(tmp_path / "plain")]) == 0
    capsys.readouterr()
    assert main([*command, *flags, "--json", "--output_dir", str(tmp_path / "best")]) == 0
    told = json.loads(capsys.readouterr().out)["search"]
    assert (told["samples"], told["evaluations_per_picture"], len(told["rewards"])) == (16, 4, 4)
    light = {
        name: [np.asarray(Image.open(tmp_path / name / f"00000{i}.png")).mean() for i in range(4)]
        for name in ("plain", "best")
    }
    assert all(b >= p - 1e-3 for p, b in zip(light["plain"], light["best"], strict=True))
    assert sum(light["best"]) > sum(light["plain"])
    recipe = str(tmp_path / "best" / "recipe.yaml")
    again = ["generate", "--config", recipe, "--quiet", "--output_dir", str(tmp_path / "again")]
    assert main(again) == 0
    pictures = [(tmp_path / name / "000000.png").read_bytes() for name in ("best", "again")]
    assert pictures[0] == pictures[1]
    capsys.readouterr()
    for wrong, message in (
        (["--search", "tree"], "needs a reward"),
        (["--search_samples", "3"], "not read without --search"),
        (["--search", "mg_select", "--search_reward", "clip"], "not read by --search mg_select"),
        ([*flags, "--save_scales"], "does not go with save_scales: leave save_scales out"),
        ([*flags, "--num_candidates", "4"], "takes the place of num_candidates"),
        ([*flags, "--more_smooth"], "give --more_smooth False"),
    ):
        assert main([*command, *wrong, "--output_dir", str(tmp_path / "x")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", ["best_of", "mg_select", "genarm"])
@pytest.mark.parametrize("setting", ["negative_prompt", "control_type", "more_smooth"])
def test_a_search_takes_the_settings_that_it_draws_by(
    tmp_path: Path, name: Any, setting: str
) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "edges.png")
    given: dict[str, Any] = {
        "negative_prompt": {"negative_prompt": "a red circle"},
        "control_type": {
            "control_type": ("canny",),
            "control_image": (str(tmp_path / "edges.png"),),
        },
        "more_smooth": {"more_smooth": True},
    }[setting]
    given["search_model"] = "judge" if name == "genarm" else None
    takes = name == "mg_select" or (name, setting) == ("genarm", "negative_prompt")
    refused = pytest.raises(UserError, match=rf"--search {name} does not go with {setting}")
    with contextlib.nullcontext() if takes else refused:
        GenerateConfig(search=name, **given)


@pytest.mark.parametrize(
    "flags",
    [
        ("tree", "--search_reward", "brightness", "--search_steps", "1", "3"),
        ("dts", "--search_reward", "brightness"),
        ("mg_select",),
        ("mg_select", "--more_smooth", "True"),
        ("genarm", "--search_weight", "0.5", "--search_model"),
    ],
    ids=lambda flags: " ".join(flags[:2]),
)
def test_every_search_draws_by_command_as_in_python(
    pipe: NextScalePipeline,
    build_model: Callable[..., NextScaleTransformer],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
) -> None:
    judge = NextScalePipeline(pipe.tokenizer, build_model(seed=7))
    pipe.save_pretrained(tmp_path / "model")
    judge.save_pretrained(tmp_path / "judge")
    brightness = open_reward("brightness")
    search: dict[str, Any] = {
        "tree": TreeSearch(brightness, 8, steps=(1, 3)),
        "dts": TreeSearch(brightness, 8, greedy=False),
        "mg_select": MGSelect(8),
        "genarm": GenARM(judge, 0.5),
    }
    command = ["generate", "--model", str(tmp_path / "model"), "--class_labels", "0", "1"]
    command += ["--seed", "3", "--dtype", "float32", "--quiet", "--search", *flags]
    command += [str(tmp_path / "judge")] if flags[0] == "genarm" else []
    assert main([*command, "--output_dir", str(tmp_path / "out")]) == 0
    smooth = "--more_smooth" in flags
    settings: dict[str, Any] = {"search": search[flags[0]], "more_smooth": smooth}
    found = pipe(class_labels=[0, 1], seed=3, output_type="pt", **settings)
    for number, image in enumerate(to_uint8(found.images)):
        written = np.asarray(Image.open(tmp_path / "out" / f"00000{number}.png"))
        assert np.array_equal(written, image.permute(1, 2, 0).numpy())
    if flags[0] == "genarm":  # another judge of the same name
        NextScalePipeline(pipe.tokenizer, build_model(seed=8)).save_pretrained(tmp_path / "judge")
        (tmp_path / "out" / "000001.png").unlink()
        assert main([*command, "--output_dir", str(tmp_path / "out"), "--resume"]) == 2
        assert "weights" in capsys.readouterr().err


@pytest.fixture(scope="module")
def diffusers_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipe") / "pipe"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tiny_pipelines.stable_diffusion().save_pretrained(folder)
    return folder


def test_generate_searches_by_diffusion(
    diffusers_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", "red", "blue", "--model", str(diffusers_folder), "--seed", "3"]
    command += ["--num_images", "2", "--batch_size", "3", "--num_inference_steps", "4", "--quiet"]
    reward = ["--search_reward", "brightness"]

    def light(name: str, *flags: str) -> list[float]:
        assert main([*command, *flags, "--output_dir", str(tmp_path / name)]) == 0
        found = sorted((tmp_path / name).glob("0*.png"))
        assert len(found) == 4
        return [float(np.asarray(Image.open(path)).mean()) for path in found]

    plain = light("plain")
    assert light("again") == plain
    assert light("always", "--guidance_threshold", "0") == plain
    assert light("once", "--guidance_threshold", "1") != plain
    one = light("one", "--search", "best_of", *reward, "--search_samples", "1")
    for name in ("best_of", "tree"):
        best = light(name, "--search", name, *reward, "--search_samples", "4")
        assert all(b >= o for b, o in zip(best, one, strict=True))
        assert sum(best) > sum(one)
    recipe = str(tmp_path / "tree" / "recipe.yaml")
    assert main(["generate", "--config", recipe, "--quiet", "--output_dir", f"{tmp_path}/r"]) == 0
    pictures = [(tmp_path / name / "000003.png").read_bytes() for name in ("tree", "r")]
    assert pictures[0] == pictures[1]
    assert (tmp_path / "tree" / "grid.png").is_file()
    capsys.readouterr()
    for wrong, message in (
        (["--search", "best_of"], "needs a reward"),
        (["--search", "mg_select"], "is for next-scale models"),
        (["--top_k", "5", "--lora", "x"], "top_k, lora: not for"),
        (["--guidance_scale", "2", "3"], "is one number"),
        (["--eta", "0.5"], "give --search too"),
        (["--eta", "2", "--search", "best_of", *reward], "eta is 2.0"),
        (["--search", "tree", *reward, "--search_steps", "9", "--overwrite"], "steps ends at 9"),
        ([], "is not empty"),
    ):
        folder = "plain" if not wrong or "--overwrite" in wrong else "x"
        assert main([*command, *wrong, "--output_dir", str(tmp_path / folder)]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    assert len(list((tmp_path / "plain").glob("0*.png"))) == 4


def test_next_scale_models_take_no_denoising_steps(
    pipe: NextScalePipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe.save_pretrained(tmp_path / "model")
    words = ["generate", "--model", str(tmp_path / "model"), "--class_labels", "0", "--eta", "0.5"]
    assert main([*words, "--output_dir", str(tmp_path / "x")]) == 2
    assert "eta: for diffusers pipelines" in capsys.readouterr().err
