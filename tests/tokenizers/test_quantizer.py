"""The multi-scale residual quantizer: what must hold for any weights and any schedule."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nextscale.errors import UserError
from nextscale.tokenizers import MultiscaleQuantizer, ScaleSchedule, phi_index

CODES, CHANNELS = 24, 6


def random_quantizer(seed: int, **changes: object) -> MultiscaleQuantizer:
    sizes = {"codebook_size": CODES, "codebook_dim": CHANNELS, **changes}
    quantizer = MultiscaleQuantizer(**sizes)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.normal_(std=0.7 if parameter.ndim == 2 else 0.2, generator=generator)
    return quantizer


def random_latents(seed: int, schedule: ScaleSchedule, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1000)
    return torch.randn(batch, CHANNELS, *schedule.grid, generator=generator)


def as_rows(maps: Tensor) -> Tensor:
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])


seeds = st.integers(0, 10_000)
schedules = st.sampled_from(
    [
        ScaleSchedule(s)
        for s in ([1, 2, 3, 4], [4], [1, (1, 2), (3, 2), (5, 4)], [2, 4, 4], [3, 2, 6])
    ]
)
few = settings(max_examples=25)


# ---- which convolution belongs to which scale ------------------------------------------------


@pytest.mark.parametrize(
    "table",
    [
        "03",
        "023",
        "0123",
        "01223",
        "001233",
        "0012233",
        "00112233",
        "001122233",
        "0011122333",
        "00011222333",
        "000111222333",
        "0001112222333",
        "00011112222333",
    ],
    ids=len,
)
def test_phi_index_gives_the_table_of_the_released_checkpoints(table: str) -> None:
    assert phi_index(len(table)) == [int(j) for j in table]


def test_phi_index_of_other_counts_uses_centred_ticks() -> None:
    assert phi_index(4, num_phi=2) == [0, 0, 1, 1]
    assert phi_index(5, num_phi=1) == [0] * 5
    assert phi_index(6, num_phi=3) == [0, 0, 1, 1, 2, 2]


def test_a_single_scale_uses_the_first_convolution() -> None:
    assert phi_index(1) == [0]


# ---- encoding --------------------------------------------------------------------------------


@given(seeds, schedules)
@few
def test_no_other_code_is_nearer_than_the_chosen_one(seed: int, schedule: ScaleSchedule) -> None:
    quantizer = random_quantizer(seed)
    codes = quantizer.codebook.weight.double()
    for vectors, tokens, _ in quantizer.residuals(random_latents(seed, schedule), schedule):
        distances = torch.cdist(vectors.double(), codes).square()
        chosen = distances.gather(1, tokens.reshape(-1, 1))[:, 0]
        assert torch.all(chosen <= distances.amin(dim=1) + 1e-4)


@given(seeds, schedules)
@few
def test_contributions_and_the_last_residual_add_up_to_the_input(
    seed: int, schedule: ScaleSchedule
) -> None:
    quantizer, f = random_quantizer(seed), random_latents(seed, schedule)
    rest = f
    for k, (vectors, _, h) in enumerate(quantizer.residuals(f, schedule)):
        pooled = F.adaptive_avg_pool2d(rest, schedule.sides[k])
        torch.testing.assert_close(vectors, as_rows(pooled), atol=1e-5, rtol=0)
        rest = rest - h.detach()
    *_, (last, _) = quantizer.accumulate(quantizer.encode(f, schedule), schedule)
    torch.testing.assert_close(last + rest, f, atol=1e-5, rtol=0)


@given(seeds, schedules)
@few
def test_accumulating_tokens_gives_the_sum_built_while_encoding(
    seed: int, schedule: ScaleSchedule
) -> None:
    quantizer, f = random_quantizer(seed), random_latents(seed, schedule)
    total = torch.zeros_like(f)
    tokens = quantizer.encode(f, schedule)
    steps = list(quantizer.accumulate(tokens, schedule))
    for k, (_, found, h) in enumerate(quantizer.residuals(f, schedule)):
        total = total + h
        assert torch.equal(found, schedule.split(tokens)[k])
        torch.testing.assert_close(steps[k][0], total, atol=1e-5, rtol=0)
        following = steps[k][1]
        if k + 1 < schedule.num_scales:
            pooled = F.adaptive_avg_pool2d(total, schedule.sides[k + 1])
            torch.testing.assert_close(following, pooled, atol=1e-5, rtol=0)
        else:
            assert torch.equal(following, steps[k][0])


def test_ties_go_to_the_lowest_index() -> None:
    quantizer = random_quantizer(0)
    with torch.no_grad():
        quantizer.codebook.weight[[5, 9, 20]] = torch.arange(CHANNELS).float()
    assert quantizer.nearest(torch.arange(CHANNELS).float()[None]).tolist() == [5]
    with torch.no_grad():
        quantizer.codebook.weight.fill_(7)
        quantizer.codebook.weight[3], quantizer.codebook.weight[11] = -1, 1
    assert quantizer.nearest(torch.zeros(1, CHANNELS)).tolist() == [3]


def test_cosine_search_ignores_length_but_adds_the_raw_code() -> None:
    schedule = ScaleSchedule([2])
    quantizer = random_quantizer(3, cosine=True, num_phi=0)
    vectors = torch.randn(50, CHANNELS, generator=torch.Generator().manual_seed(4))
    similarity = F.cosine_similarity(vectors[:, None], quantizer.codebook.weight[None], dim=-1)
    assert torch.equal(quantizer.nearest(vectors), similarity.argmax(dim=1))
    assert torch.equal(quantizer.nearest(vectors), quantizer.nearest(vectors * 100))
    f = random_latents(5, schedule)
    ((_, tokens, h),) = quantizer.residuals(f, schedule)
    assert torch.equal(as_rows(h), quantizer.codebook.weight[tokens.flatten()])


def test_without_phi_a_contribution_is_the_upsampled_code_map() -> None:
    schedule = ScaleSchedule([2, 4])
    quantizer = random_quantizer(6, num_phi=0)
    codes = random_latents(7, ScaleSchedule([2]))
    grown = F.interpolate(codes, size=(4, 4), mode="bicubic", align_corners=False)
    assert torch.equal(quantizer.contribution(codes, 0, schedule), grown)
    fine = random_latents(8, schedule)
    assert torch.equal(quantizer.contribution(fine, 1, schedule), fine)


def test_phi_mixes_its_input_with_its_convolution() -> None:
    quantizer = random_quantizer(9, phi_ratio=0.25)
    h = random_latents(10, ScaleSchedule([4]))
    conv = quantizer.phi[2]
    expected = 0.75 * h + 0.25 * F.conv2d(h, conv.weight, conv.bias, padding=1)  # type: ignore
    torch.testing.assert_close(conv(h), expected)


def test_encoding_stays_in_float32_under_autocast() -> None:
    schedule = ScaleSchedule([1, 2, 4])
    quantizer, f = random_quantizer(11), random_latents(12, schedule, batch=64)
    with torch.autocast("cpu", torch.bfloat16):
        tokens = quantizer.encode(f, schedule)
        trained = quantizer(f, schedule)
    assert torch.equal(tokens, quantizer.encode(f, schedule))
    assert torch.equal(trained.tokens, tokens)
    assert trained.f_hat.dtype == trained.loss.dtype == torch.float32
    half = f.bfloat16()
    assert torch.equal(quantizer.encode(half, schedule), quantizer.encode(half.float(), schedule))


def test_a_latent_of_another_grid_is_refused() -> None:
    with pytest.raises(UserError, match=r"\(3, 3\) does not match the last scale \(4, 4\)"):
        random_quantizer(0).encode(torch.zeros(1, CHANNELS, 3, 3), ScaleSchedule([1, 2, 4]))


# ---- oracle ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_equals_residual_vq_when_every_scale_has_full_size(seed: int) -> None:
    """vector-quantize-pytorch's ResidualVQ: one codebook for all stages, no resizing, no phi."""
    module = pytest.importorskip("vector_quantize_pytorch", reason="the oracle is a dev extra")
    stages, schedule = 4, ScaleSchedule([5] * 4)
    quantizer, f = random_quantizer(seed, num_phi=0), random_latents(seed, schedule, batch=3)
    oracle = module.ResidualVQ(
        dim=CHANNELS,
        codebook_size=CODES,
        num_quantizers=stages,
        shared_codebook=True,
        learnable_codebook=True,
        ema_update=False,
    ).eval()
    with torch.no_grad():
        oracle.layers[0]._codebook.embed.copy_(quantizer.codebook.weight[None])
        rows = f.flatten(2).transpose(1, 2)
        quantized, indices, _ = oracle(rows)
    tokens = quantizer.encode(f, schedule)
    assert torch.equal(torch.stack(schedule.split(tokens), dim=-1), indices)
    *_, (f_hat, _) = quantizer.accumulate(tokens, schedule)
    torch.testing.assert_close(f_hat.flatten(2).transpose(1, 2), quantized, atol=1e-6, rtol=0)


# ---- training --------------------------------------------------------------------------------


def test_training_forward_equals_encoding_and_passes_the_gradient_straight_through() -> None:
    schedule = ScaleSchedule([1, 2, 3, 4])
    quantizer = random_quantizer(13)
    f = random_latents(14, schedule).requires_grad_()
    out = quantizer(f, schedule)
    tokens = quantizer.encode(f, schedule)
    assert torch.equal(out.tokens, tokens)
    *_, (f_hat, _) = quantizer.accumulate(tokens, schedule)
    torch.testing.assert_close(out.f_hat, f_hat, atol=1e-5, rtol=0)
    assert [r.shape[0] for r in out.residuals] == [2 * n for n in schedule.lengths]
    probe = random_latents(15, schedule)
    (gradient,) = torch.autograd.grad((out.f_hat * probe).sum(), f, retain_graph=True)
    assert torch.equal(gradient, probe)
    for parameter in (quantizer.codebook.weight, quantizer.phi[0].weight):
        (gradient,) = torch.autograd.grad(out.loss, parameter, retain_graph=True)  # type: ignore
        assert gradient.abs().sum() > 0


def test_loss_equals_the_formula() -> None:
    schedule = ScaleSchedule([1, 3, 4])
    quantizer = random_quantizer(16, commitment_weight=0.4)
    f = random_latents(17, schedule)
    sums = [s for s, _ in quantizer.accumulate(quantizer.encode(f, schedule), schedule)]
    # Value of the commitment and of the codebook term is the same: they differ in gradient only.
    expected = sum((1 + 0.4) * (s - f).square().mean() for s in sums) / 3
    torch.testing.assert_close(quantizer(f, schedule).loss, expected)


def test_commitment_weight_scales_the_gradient_of_the_latents_alone() -> None:
    schedule = ScaleSchedule([1, 2, 4])
    gradients = []
    for weight in (0.25, 0.5):
        quantizer = random_quantizer(18, commitment_weight=weight)
        f = random_latents(19, schedule).requires_grad_()
        quantizer(f, schedule).loss.backward()
        gradients.append((f.grad, quantizer.codebook.weight.grad))
    (f_small, code_small), (f_large, code_large) = gradients
    torch.testing.assert_close(f_large, 2 * f_small)
    assert torch.equal(code_large, code_small)


def test_scale_dropout_cuts_the_output_of_each_image_but_not_the_loss() -> None:
    schedule = ScaleSchedule([1, 2, 3, 4])
    quantizer, f = random_quantizer(20), random_latents(21, schedule, batch=4)
    full = quantizer(f, schedule)
    cut = quantizer(f, schedule, num_scales=torch.tensor([1, 2, 3, 4]))
    sums = [s for s, _ in quantizer.accumulate(full.tokens, schedule)]
    for image in range(4):
        torch.testing.assert_close(cut.f_hat[image], sums[image][image], atol=1e-5, rtol=0)
    assert torch.equal(cut.tokens, full.tokens)
    assert torch.equal(cut.loss, full.loss)
