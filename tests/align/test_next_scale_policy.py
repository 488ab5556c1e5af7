"""A next-scale transformer as a policy: what it draws, what it says of it, and branches."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from nextscale.align.policies.next_scale import NextScalePolicy
from nextscale.align.references import AdapterOff, FrozenCopy, NamedAdapter
from nextscale.align.trajectory import Trajectory
from nextscale.align.units import pull_back, scale_weights
from nextscale.errors import UserError
from nextscale.pipeline import NextScalePipeline
from nextscale.streams import stream
from nextscale.tokenizers import MultiscaleVQ, ScaleSchedule, TokenizerConfig
from nextscale.var import ClassConditioner, NextScaleTransformer, SamplingConfig, TransformerConfig
from nextscale.var.lora import add_lora

_FOLDER = Path(__file__).parents[1] / "golden" / "align"
GOLDEN = json.loads((_FOLDER / "next_scale_logprob.json").read_text())
GUIDED = SamplingConfig(guidance_scale=2.5, temperature=0.8)


def generators(count: int, seed: int = 0) -> list[torch.Generator]:
    return [stream(seed, i) for i in range(count)]


@pytest.fixture
def pipe(
    build_model: Callable[..., NextScaleTransformer], tiny_tokenizer: MultiscaleVQ
) -> NextScalePipeline:
    """A model of its own, because tests change it."""
    return NextScalePipeline(tiny_tokenizer, build_model())


@pytest.fixture
def policy(pipe: NextScalePipeline) -> NextScalePolicy:
    """Guided, and hot enough that siblings differ."""
    return NextScalePolicy(pipe, replace(GUIDED, temperature=1.5))


def drawn(policy: NextScalePolicy, count: int = 6, seed: int = 0) -> Trajectory:
    labels = policy.encode([i % 3 for i in range(count)])
    return policy.sample(labels, generators=generators(count, seed))


def joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts), dim=1)


# ---- log-probabilities -------------------------------------------------------------------------


@pytest.mark.parametrize("space", ["guided", "conditional", "behaviour"])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_one_pass_over_all_scales_says_what_sampling_said(
    pipe: NextScalePipeline, space: Any, guidance: float
) -> None:
    settings = replace(GUIDED, guidance_scale=guidance)
    policy = NextScalePolicy(pipe, settings, logp_space=space)
    trajectory = drawn(policy)
    found = policy.evaluate(trajectory, need=("logp", "entropy"))
    torch.testing.assert_close(found.logp, joined(trajectory.logps), atol=1e-4, rtol=0)
    ratio = (found.logp - joined(trajectory.logps)).exp()
    assert (ratio - 1).abs().max() < 1e-4  # the first micro-batch's importance ratio
    assert found.entropy is not None
    assert bool((found.entropy >= 0).all())


@pytest.mark.parametrize(
    ("space", "name"),
    [("guided", "guided"), ("conditional", "conditional"), ("behaviour", "guided_topk")],
)
def test_log_probabilities_equal_the_reference_data(
    monkeypatch: pytest.MonkeyPatch, space: Any, name: str
) -> None:
    """The network is replaced by stored logits: everything after it is ours."""
    lengths = GOLDEN["tokens_per_scale"]
    parts = {key: [] for key in ("cond_logits", "uncond_logits", "tokens")}
    for scale in GOLDEN["scales"]:
        for key, values in parts.items():
            values.append(torch.tensor(scale[key], dtype=torch.float64))
    logits = torch.cat([joined(parts["cond_logits"]), joined(parts["uncond_logits"])])
    policy = NextScalePolicy.__new__(NextScalePolicy)
    schedule = ScaleSchedule((1, 2, 3))
    policy.model = Fixed(schedule, logits)  # pyright: ignore[reportAttributeAccessIssue]
    policy.tokenizer = Inputs()  # pyright: ignore[reportAttributeAccessIssue]
    top_k = GOLDEN["top_k"] if space == "behaviour" else 0
    settings = SamplingConfig(
        guidance_scale=tuple(GOLDEN["cfg_scale_per_scale"]),
        temperature=GOLDEN["temperature"],
        top_k=top_k,
    )
    from nextscale.align.policies.next_scale import _Distribution

    policy.distribution = _Distribution(
        space, tuple(settings.guidance(3)), settings.temperatures(3), top_k, 1.0
    )
    tokens = [t.long() for t in parts["tokens"]]
    trajectory = policy._trajectory(torch.zeros(2), tokens, tokens)
    found = policy.evaluate(trajectory, need=("logp", "entropy"))
    for part, scale in zip(found.logp.split(lengths, 1), GOLDEN["scales"], strict=True):
        wanted = torch.tensor(scale[f"logp_{name}"], dtype=torch.float64)
        finite = wanted.isfinite()
        torch.testing.assert_close(part[finite].double(), wanted[finite], rtol=1e-6, atol=1e-7)
    total = torch.tensor(GOLDEN["sequence_logp"][name], dtype=torch.float64)
    torch.testing.assert_close(found.logp.double().sum(1), total, rtol=1e-6, atol=1e-6)
    if space == "guided":
        weights = scale_weights(lengths, "scale")
        per_action = torch.tensor(GOLDEN["per_action_normalised_guided"], dtype=torch.float64)
        torch.testing.assert_close((found.logp * weights).sum(1).double(), per_action, rtol=1e-6,
                                   atol=1e-6)  # fmt: skip


class Fixed(nn.Module):
    """A transformer that says what it is told: the conditional rows, then the others."""

    def __init__(self, schedule: ScaleSchedule, logits: Tensor) -> None:
        super().__init__()
        self.schedule, self.values = schedule, logits
        self.conditioner = ClassConditioner(width=4, num_classes=1)

    def forward(self, inputs: Tensor, *, ids: Tensor, num_scales: int) -> Tensor:
        return self.values[: len(ids)]


class Inputs:
    """A tokenizer whose inputs nobody reads."""

    def teacher_inputs(self, tokens: Tensor) -> Tensor:
        return torch.zeros(len(tokens), tokens.shape[1] - 1, 2)


def tiny_enumeration() -> NextScalePolicy:
    """Two scales of 1 + 4 tokens, three codes: 243 pictures."""
    sizes = {"scales": (1, 2), "codebook_size": 3, "codebook_dim": 4}
    tokenizer = MultiscaleVQ(
        TokenizerConfig(**sizes, channels=8, channel_multipliers=(1, 1), num_res_blocks=1,
                        norm_groups=4)
    )  # fmt: skip
    config = TransformerConfig(**sizes, depth=1, width=16, num_heads=2)
    model = NextScaleTransformer(config, ClassConditioner(width=16, num_classes=2))
    generator = torch.Generator().manual_seed(3)
    for module in (tokenizer, model):
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.5, generator=generator)
    return NextScalePolicy(NextScalePipeline(tokenizer, model), replace(GUIDED, temperature=1.0))


def test_the_probabilities_of_all_pictures_sum_to_one_and_are_their_frequencies() -> None:
    policy = tiny_enumeration()
    codes = torch.cartesian_prod(*[torch.arange(3)] * 5)
    ids = policy.encode([1]).repeat_interleave(len(codes), 0)
    unknown = [torch.zeros(len(codes), 1), torch.zeros(len(codes), 4)]
    everything = policy._trajectory(ids, list(codes.split([1, 4], 1)), unknown)
    with torch.no_grad():
        p = policy.evaluate(everything).logp.sum(1).exp().double()
    assert float(p.sum()) == pytest.approx(1, abs=1e-5)
    count = 3000
    draws = policy.sample(
        policy.encode([1]).repeat_interleave(count, 0), generators=generators(count)
    )
    seen = Counter(map(tuple, joined(draws.actions).tolist()))
    observed = torch.tensor([seen[tuple(row)] for row in codes.tolist()], dtype=torch.float64)
    order = p.argsort(descending=True)
    common = order[p[order] * count >= 5]
    rest = count - observed[common].sum()
    expected = torch.cat([p[common] * count, (1 - p[common].sum())[None] * count])
    found = torch.cat([observed[common], rest[None]])
    expected = expected * found.sum() / expected.sum()
    assert stats.chisquare(found.numpy(), expected.numpy()).pvalue > 1e-3


def test_only_the_wanted_scales_count(policy: NextScalePolicy) -> None:
    trajectory = drawn(policy)
    whole, part = policy.evaluate(trajectory), policy.evaluate(trajectory, [1, 2])
    assert part.logp.shape[1] == 14  # nothing is computed beyond the last wanted scale
    torch.testing.assert_close(part.logp, whole.logp[:, :14], atol=1e-5, rtol=1e-5)
    assert part.mask[0].tolist() == [False] + [True] * 13


def test_exact_kl_is_zero_at_the_reference_and_grows_with_the_distance(
    pipe: NextScalePipeline,
) -> None:
    policy = NextScalePolicy(pipe, GUIDED, reference=FrozenCopy(pipe.transformer))
    trajectory = drawn(policy)
    same = policy.evaluate(trajectory, need=("logp", "kl"))
    assert same.kl is not None
    assert bool((same.kl.abs() < 1e-5).all())
    with torch.no_grad():
        pipe.transformer.head.weight.mul_(1.2)
    moved = policy.evaluate(drawn(policy), need=("logp", "kl"))
    assert moved.kl is not None
    assert bool((moved.kl > 0).all())
    moved.kl.sum().backward()
    assert pipe.transformer.head.weight.grad is not None


def test_the_seed_decides_and_not_the_batch(pipe: NextScalePipeline) -> None:
    together = drawn(NextScalePolicy(pipe, GUIDED))
    alone = drawn(NextScalePolicy(pipe, GUIDED, batch_size=1))
    assert torch.equal(joined(together.actions), joined(alone.actions))


# ---- branches ----------------------------------------------------------------------------------


@pytest.mark.parametrize("at_step", [0, 1, 2, 3])
def test_siblings_share_the_prefix_and_its_log_probabilities(
    policy: NextScalePolicy, at_step: int
) -> None:
    parents = drawn(policy, 4)
    before = [a.clone() for a in parents.actions]
    branched = policy.branch(parents, at_step, 3, generators=generators(12, seed=1))
    for k in range(at_step):
        repeated = parents.actions[k].repeat_interleave(3, 0)
        assert torch.equal(branched.actions[k], repeated)
        assert torch.equal(branched.logps[k], parents.logps[k].repeat_interleave(3, 0))
    last = branched.actions[-1].view(4, 3, -1)
    assert not torch.equal(last[:, 0], last[:, 1])
    assert branched.branch_id.tolist() == [i for i in range(4) for _ in range(3)]
    assert branched.parent_step == at_step
    assert all(torch.equal(a, b) for a, b in zip(before, parents.actions, strict=True))
    found = policy.evaluate(branched)
    torch.testing.assert_close(found.logp, joined(branched.logps), atol=1e-4, rtol=0)


def test_a_branch_at_the_end_is_the_parent_and_at_the_start_a_fresh_sample(
    policy: NextScalePolicy,
) -> None:
    parents = drawn(policy, 4)
    copies = policy.branch(parents, policy.num_steps, 2, generators=[])
    assert torch.equal(joined(copies.actions), joined(parents.actions).repeat_interleave(2, 0))
    fresh = policy.branch(parents, 0, 1, generators=generators(4))
    assert torch.equal(joined(fresh.actions), joined(parents.actions))
    with pytest.raises(UserError, match="at_step is 5"):
        policy.branch(parents, 5, 1, generators=generators(4))


def test_a_branch_is_what_the_sampler_draws_after_the_same_prefix(policy: NextScalePolicy) -> None:
    """The repeated cache against a run of its own for every sibling."""
    parents = drawn(policy, 3)
    branched = policy.branch(parents, 2, 2, generators=generators(6, seed=1))
    alone = policy.branch(parents.repeat_interleave(2), 2, 1, generators=generators(6, seed=1))
    assert torch.equal(joined(branched.actions), joined(alone.actions))
    torch.testing.assert_close(joined(branched.logps), joined(alone.logps), atol=1e-5, rtol=1e-5)


# ---- references --------------------------------------------------------------------------------


def test_adapters_off_is_the_base_to_the_bit(pipe: NextScalePipeline) -> None:
    policy = NextScalePolicy(pipe, GUIDED, reference=AdapterOff())
    trajectory = drawn(policy)
    with torch.no_grad():
        base = policy.evaluate(trajectory).logp
    add_lora(pipe.transformer, rank=2)
    for name, parameter in pipe.transformer.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(0))
    found = policy.evaluate(trajectory, need=("logp", "ref_logp"))
    assert found.ref_logp is not None
    assert torch.equal(found.ref_logp, base)
    assert (found.logp - base).abs().max() > 1e-3
    found.logp.sum().backward()
    grads = {n: p.grad is not None for n, p in pipe.transformer.named_parameters()}
    assert all(has == (".lora_" in name) for name, has in grads.items())


def test_a_reference_is_put_back_after_an_error(pipe: NextScalePipeline) -> None:
    add_lora(pipe.transformer, rank=2)
    policy = NextScalePolicy(pipe, GUIDED, reference=AdapterOff())
    trajectory = drawn(policy)
    for parameter in pipe.transformer.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(0))
    before, state = policy.evaluate(trajectory).logp, torch.get_rng_state()
    pipe.transformer.train()
    with pytest.raises(RuntimeError), policy.reference():
        raise RuntimeError
    assert pipe.transformer.training
    assert torch.equal(policy.evaluate(trajectory).logp, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert pipe.transformer.training  # judged in evaluation mode, and put back


def test_a_named_adapter_is_the_reference(pipe: NextScalePipeline) -> None:
    tuner = add_lora(pipe.transformer, rank=2)
    tuner.peft_config["old"] = tuner.peft_config["default"]
    tuner.inject_adapter(pipe.transformer, "old")
    for name, parameter in pipe.transformer.named_parameters():
        if "lora_B" in name:
            scale = 0.3 if "old" in name else 0.1
            nn.init.normal_(parameter, std=scale, generator=torch.Generator().manual_seed(0))
    policy = NextScalePolicy(pipe, GUIDED, reference=NamedAdapter("old"))
    trajectory = drawn(policy)
    found = policy.evaluate(trajectory, need=("logp", "ref_logp"))
    assert found.ref_logp is not None
    assert (found.ref_logp - found.logp).abs().max() > 1e-3
    policy.baseline = NamedAdapter("default")
    with torch.no_grad():  # with a gradient another attention kernel runs
        same = policy.evaluate(trajectory, need=("logp", "ref_logp"))
    assert same.ref_logp is not None
    assert torch.equal(same.ref_logp, same.logp)
    policy.baseline = NamedAdapter("none")
    with pytest.raises(UserError, match='no adapter "none"'):
        policy.evaluate(trajectory, need=("ref_logp",))


# ---- pictures, pairs, weights ------------------------------------------------------------------


def test_pair_scores_are_the_unguided_likelihood(pipe: NextScalePipeline) -> None:
    policy = NextScalePolicy(pipe, GUIDED)
    trajectory = drawn(policy)
    score, mask = policy.pair_score(trajectory, generators=[])
    plain = NextScalePolicy(pipe, GUIDED, logp_space="conditional")
    wanted = plain.evaluate(replace(trajectory, settings=plain._trajectory(
        trajectory.conditions, trajectory.actions, trajectory.logps).settings)).logp  # fmt: skip
    torch.testing.assert_close(score, wanted, atol=1e-5, rtol=1e-5)
    assert bool((mask == 1).all())


def test_given_pictures_become_their_tokens(policy: NextScalePolicy) -> None:
    trajectory = drawn(policy, 3)
    images = policy.decode(trajectory)
    assert images.shape == (3, 3, 8, 8)
    assert 0 <= float(images.min()) <= float(images.max()) <= 1
    again = policy.trajectory_of(images, trajectory.conditions)
    assert [a.shape for a in again.actions] == [a.shape for a in trajectory.actions]
    assert bool(joined(again.logps).isnan().all())


def test_filters_that_leave_ratios_undefined_are_refused(
    pipe: NextScalePipeline, caplog: pytest.LogCaptureFixture
) -> None:
    filtered = replace(GUIDED, top_k=4)
    for space in ("behaviour", "conditional"):
        with pytest.raises(UserError, match="would have no importance ratio"):
            NextScalePolicy(pipe, filtered, logp_space=space)  # pyright: ignore[reportArgumentType]
    NextScalePolicy(pipe, filtered)
    assert "unfiltered" in caplog.text


def test_a_trajectory_of_other_settings_is_refused(pipe: NextScalePipeline) -> None:
    trajectory = drawn(NextScalePolicy(pipe, GUIDED))
    other = NextScalePolicy(pipe, replace(GUIDED, temperature=1.0))
    with pytest.raises(UserError, match="another temperature"):
        other.evaluate(trajectory)


def test_checkpointing_changes_no_gradient(pipe: NextScalePipeline) -> None:
    policy = NextScalePolicy(pipe, GUIDED)
    trajectory = drawn(policy)
    found = []
    for again in (False, True):
        pipe.transformer.gradient_checkpointing = again
        pipe.transformer.zero_grad()
        policy.evaluate(trajectory).logp.mean().backward()
        found.append([p.grad.clone() for p in pipe.transformer.parameters() if p.grad is not None])
    for plain, computed_again in zip(*found, strict=True):
        torch.testing.assert_close(plain, computed_again)


def test_scale_weights() -> None:
    assert scale_weights((1, 4), "scale").tolist() == [1, 0.25, 0.25, 0.25, 0.25]
    assert scale_weights((1, 4), "power", 0.5)[1].item() == pytest.approx(0.5)
    assert scale_weights((1, 4), [2.0, 0.0]).tolist() == [2, 0, 0, 0, 0]
    with pytest.raises(UserError, match="needs 2 numbers"):
        scale_weights((1, 4), [1.0])


def test_masks_are_pulled_back_to_every_scale() -> None:
    mask = torch.zeros(1, 8, 8)
    mask[:, :4, 4:] = 1
    weights = pull_back(mask, ScaleSchedule((1, 2, 4)), floor=0.1)
    assert weights[0, 1:5].tolist() == pytest.approx([0.1, 1, 0.1, 0.1])
    assert weights[0, 5:].view(4, 4)[:2, 2:].tolist() == [[1, 1], [1, 1]]
    assert float(weights.sum()) == pytest.approx(5 + weights[0, 0].item() + 0.1 * 15)


def test_the_last_scale_is_redrawn_with_a_gradient(pipe: NextScalePipeline) -> None:
    """Its tokens follow the policy's distribution; the gradient raises what is asked for."""
    pipe.tokenizer.requires_grad_(False)
    policy = NextScalePolicy(pipe, GUIDED)
    trajectory = policy.sample(policy.encode([0] * 64), generators=generators(64))
    pictures = policy.redraw(trajectory, 1, generators=generators(64, 1))
    assert pictures.shape == policy.decode(trajectory).shape
    shift = (pictures.detach().mean() - policy.decode(trajectory).mean()).abs()
    scatter = policy.decode(trajectory).mean((1, 2, 3)).std() / 8
    assert shift < 3 * 2**0.5 * scatter
    pipe.transformer.zero_grad()
    pictures.mean().backward()
    with torch.no_grad():
        for weight in pipe.transformer.parameters():
            if weight.grad is not None:
                weight += 50 * weight.grad
    after = policy.redraw(trajectory, 1, generators=generators(64, 1))
    assert after.mean() > pictures.mean()
    with pytest.raises(UserError, match="only the last scale"):
        policy.redraw(trajectory, 2, generators=generators(1))
