"""Training on features: the sampler of buckets, the objective, compilation."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from data.features.codec import FeatureCodec
from data.features.config import FeatureConfig
from data.features.dataset import pad_texts
from data.samplers import BucketSampler
from diffusion.precond import FlowPrecond
from models import build_network
from models.architectures.feature_dit import FeatureDiTConfig
from torch_utils.rng import Step
from torch_utils.stats import StatsCollector
from training.config import TrainingConfig
from training.feature_objective import (
    FeatureObjective,
    drop_of_uniform,
    patch_bias,
    rows_of_categories,
)
from training.optimizer import learning_rate

MODEL = FeatureDiTConfig(
    hidden_dim=32,
    num_blocks=2,
    num_heads=4,
    resolution=64,
    latent_channels=4,
    text_dim=12,
    visual_dim=10,
    buckets=("64x64", "96x32", "32x96"),
    max_text_tokens=16,
)
LENGTHS = (4, 8, 16)
COUNTS = (50, 7, 3)


def sampler_of(*, rank=0, world_size=1, batch_gpu=4, start=0, batch=8, counts=COUNTS, seed=3):
    return BucketSampler(
        counts,
        seed=seed,
        start_nimg=start,
        batch_size=batch,
        batch_gpu=batch_gpu,
        rank=rank,
        world_size=world_size,
    )


def take(sampler, num):
    iterator = iter(sampler)
    return [next(iterator) for _ in range(num)]


def bucket_of(index, counts=COUNTS):
    return int(np.searchsorted(np.cumsum(counts), index, side="right"))


def test_every_step_is_of_one_bucket_whatever_ranks_and_rounds():
    whole = take(sampler_of(batch_gpu=8), 200)
    for batch in whole:
        assert len({bucket_of(index) for index in batch}) == 1
    rounds = take(sampler_of(batch_gpu=2), 800)
    joined = [[i for part in rounds[4 * n : 4 * n + 4] for i in part] for n in range(200)]
    assert joined == whole
    ranks = [take(sampler_of(rank=r, world_size=2), 200) for r in range(2)]
    assert [first + second for first, second in zip(*ranks, strict=True)] == whole


def test_buckets_come_in_proportion_to_their_images():
    buckets = sampler_of().buckets(20_000)
    shares = np.bincount(buckets, minlength=3) / len(buckets)
    np.testing.assert_allclose(shares, np.array(COUNTS) / sum(COUNTS), atol=0.01)
    # A longer look ahead changes nothing of what is near.
    np.testing.assert_array_equal(sampler_of().buckets(10), buckets[:10])


def test_an_epoch_of_a_bucket_has_each_image_once_and_small_ones_wrap():
    seen = {bucket: [] for bucket in range(3)}
    for batch in take(sampler_of(batch_gpu=8), 400):
        seen[bucket_of(batch[0])] += batch
    for bucket, count in enumerate(COUNTS):
        first = sum(COUNTS[:bucket])
        epochs = [seen[bucket][i : i + count] for i in range(0, len(seen[bucket]), count)][:-1]
        assert len(epochs) > 1
        for epoch in epochs:
            assert sorted(epoch) == list(range(first, first + count))
    assert seen[0][:50] != seen[0][50:100]


def test_a_sampler_goes_on_from_any_step():
    whole = take(sampler_of(), 120)
    for step in (1, 7, 30):
        assert take(sampler_of(start=8 * step), 20) == whole[2 * step : 2 * step + 20]
    assert sampler_of().bucket_at(8 * 30) == bucket_of(whole[60][0])


def test_another_seed_is_another_order():
    assert take(sampler_of(), 5) != take(sampler_of(seed=4), 5)


def test_texts_are_padded_to_the_first_length_that_holds_them_and_cut_at_the_last():
    texts = [np.full((length, 3), length, np.float16) for length in (2, 5)]
    padded, mask = pad_texts(texts, LENGTHS)
    assert padded.shape == (2, 8, 3)
    assert mask.sum(1).tolist() == [2, 5]
    assert (padded[mask] != 0).all()
    assert not padded[~mask].any()
    padded, mask = pad_texts([np.ones((30, 3), np.float16)], LENGTHS)
    assert padded.shape == (1, 16, 3)
    assert mask.all()


def test_categories_are_the_four_with_their_meaning_and_their_shares():
    config = FeatureConfig()
    uniform = torch.tensor([0.0, 0.0999, 0.1001, 0.3999, 0.4001, 0.4499, 0.4501, 0.9999])
    none, text, visual, both = [True] * 3, [False, True, True], [True, False, False], [False] * 3
    expected = [none, none, text, text, visual, visual, both, both]
    assert drop_of_uniform(config, uniform).tolist() == expected
    rows = rows_of_categories(drop_of_uniform(config, uniform))
    assert {name: value.nonzero().flatten().tolist() for name, value in rows.items()} == dict(
        none=[0, 1], text=[2, 3], visual=[4, 5], both=[6, 7]
    )
    many = torch.rand(40_000, generator=torch.Generator().manual_seed(0))
    shares = {
        k: v.float().mean() for k, v in rows_of_categories(drop_of_uniform(config, many)).items()
    }
    for name, share in dict(none=0.10, text=0.30, visual=0.05, both=0.55).items():
        assert shares[name] == pytest.approx(share, abs=0.01)
    with pytest.raises(ValueError, match=r"add up to 1\.1"):
        FeatureConfig(drop_all=0.5, text_only=0.3, visual_only=0.3)
    with pytest.raises(ValueError, match="--text-lengths: got 8,4"):
        FeatureConfig(text_lengths=(8, 4))


def batch_of(size=(64, 64), num=4, length=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows, columns = MODEL.patch_grid(*size)
    latents = torch.randn(num, *MODEL.latent_shape(*size), generator=generator)
    return latents, dict(
        text=torch.randn(num, length, 12, generator=generator),
        text_mask=torch.ones(num, length, dtype=torch.bool),
        cls=torch.randn(num, 10, generator=generator),
        patches=torch.randn(num, rows * columns, 10, generator=generator),
        size=torch.tensor(size),
    )


def objective_of(**changes):
    torch.manual_seed(0)
    network = build_network(MODEL)
    config = dataclasses.replace(FeatureConfig(text_lengths=LENGTHS), **changes)
    return FeatureObjective(network, FlowPrecond(), FeatureCodec(None, None), config=config)


def draws_of(objective, size=(64, 64), num=4, cur_nimg=0, seed=1):
    shape = MODEL.latent_shape(*size)
    return objective.draw(Step(seed, cur_nimg, num, shape, torch.device("cpu")))


def test_the_loss_is_the_error_of_the_velocity_at_the_drawn_times():
    objective = objective_of()
    latents, cond = batch_of()
    draws = draws_of(objective)
    t = (draws.sigma / (1 + draws.sigma)).reshape(-1, 1, 1, 1)
    context = objective.network.context(cond, draws.drop)
    velocity = objective.network((1 - t) * latents + t * draws.noise, t.flatten(), context)
    expected = (velocity - (draws.noise - latents)).square()
    torch.testing.assert_close(objective(latents, cond, draws), expected)


def test_draws_depend_on_seed_and_position_and_every_row_on_its_place_alone():
    objective = objective_of()
    first, again, later = (draws_of(objective, cur_nimg=n) for n in (8, 8, 12))
    assert torch.equal(first.noise, again.noise)
    assert torch.equal(first.drop, again.drop)
    assert not torch.equal(first.noise, later.noise)
    other = draws_of(objective, cur_nimg=8, seed=2)
    assert not torch.equal(first.sigma, other.sigma)


def test_statistics_tell_losses_by_category_and_by_time():
    objective, stats = objective_of(), StatsCollector()
    latents, cond = batch_of(num=64)
    draws = draws_of(objective, num=64)
    loss = objective(latents, cond, draws)
    objective.report(stats, loss, draws)
    fields = stats.collect()
    per_row = loss.detach().mean(dim=(1, 2, 3))
    rows = draws.drop.all(dim=1)
    assert fields["Flow/loss_none"]["num"] == int(rows.sum())
    assert fields["Flow/loss_none"]["mean"] == pytest.approx(per_row[rows].mean().item(), rel=1e-5)
    assert fields["Flow/share_none"]["mean"] == pytest.approx(rows.float().mean().item())
    t = draws.sigma / (1 + draws.sigma)
    late = (t >= 0.75) & (t < 1)
    assert fields["Flow/loss_t0.75-1.00"]["mean"] == pytest.approx(
        per_row[late].mean().item(), rel=1e-5
    )
    shares = sum(
        fields[f"Flow/share_{name}"]["mean"] for name in ("none", "text", "visual", "both")
    )
    assert shares == pytest.approx(1)
    assert 0 < fields["Flow/velocity_rms"]["mean"] < 0.5
    loss.mean().backward()
    found = objective.diagnose(latents, cond, draws)
    assert found["Flow/grad_norm_dino_patch_proj"] > 0


def test_the_bias_of_added_patches_rises_to_zero():
    config = FeatureConfig(patch_bias_kimg=10)
    shape = MODEL.latent_shape(64, 64)
    values = [patch_bias(config, MODEL, nimg, shape) for nimg in (0, 5000, 10_000, 20_000)]
    start = -(np.log(16) + 4)
    assert values == pytest.approx([start, start / 2, 0, 0])
    assert patch_bias(FeatureConfig(), MODEL, 0, shape) is None
    without = dataclasses.replace(MODEL, use_dino_patches=False)
    assert patch_bias(config, without, 0, shape) is None
    # It acts in training.
    latents, cond = batch_of()
    losses = []
    for kimg in (0.0, 10.0):
        objective = objective_of(patch_bias_kimg=kimg, drop_all=0.0, text_only=0.0)
        for block in objective.network.backbone.blocks:
            torch.nn.init.normal_(block.modulation.weight, std=0.1)
        torch.nn.init.normal_(objective.network.backbone.head.weight, std=0.3)
        losses.append(objective(latents, cond, draws_of(objective)).mean().item())
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)


def test_the_learning_rate_warms_up_and_falls_by_a_cosine():
    config = TrainingConfig(lr=3e-4, lr_rampup=1.0, lr_schedule="cosine", lr_final=1e-6, batch=100)

    def rate(nimg):
        return learning_rate(config, nimg, 100, 11_000)

    assert rate(0) == pytest.approx(3e-5)
    assert rate(900) == pytest.approx(3e-4)
    assert rate(5900) == pytest.approx((3e-4 + 1e-6) / 2)
    assert rate(10_900) == pytest.approx(1e-6)
    rates = [rate(nimg) for nimg in range(900, 11_000, 100)]
    assert all(a >= b for a, b in itertools.pairwise(rates))
    constant = TrainingConfig(lr=3e-4, lr_rampup=1.0)
    assert learning_rate(constant, 0, 100, 11_000) == 0
    assert learning_rate(constant, 500, 100, 11_000) == pytest.approx(1.5e-4)
    assert learning_rate(constant, 9000, 100, 11_000) == pytest.approx(3e-4)


class CountingBackend:
    """Runs graphs as they are, and counts them."""

    def __init__(self):
        self.num_graphs = 0

    def __call__(self, graph, inputs):
        self.num_graphs += 1
        return graph.forward


def test_a_compiled_network_has_one_graph_for_each_number_of_tokens_and_makes_no_more():
    torch._dynamo.reset()
    objective, backend = objective_of(), CountingBackend()
    assert objective.num_shapes == 9
    plain = objective_of()
    objective.network.compile_parts(objective.num_shapes, backend=backend)
    objective.warm_up(objective, 4, torch.device("cpu"))
    # Two numbers of patches in three buckets, with three of the text's tokens.
    assert backend.num_graphs == 6
    for step in range(12):
        size = ((64, 64), (96, 32), (32, 96))[step % 3]
        latents, cond = batch_of(size, length=LENGTHS[step % 2 + 1], seed=step)
        draws = draws_of(objective, size, cur_nimg=4 * step)
        loss = objective(latents, cond, draws)
        loss.mean().backward()
        torch.testing.assert_close(loss, plain(latents, cond, draws), rtol=1e-4, atol=1e-5)
    assert backend.num_graphs == 6


@pytest.mark.compiled
def test_inductor_compiles_it_too():
    torch._dynamo.reset()
    objective, plain = objective_of(), objective_of()
    objective.network.compile_parts(objective.num_shapes)
    latents, cond = batch_of()
    draws = draws_of(objective)
    loss = objective(latents, cond, draws)
    loss.mean().backward()
    torch.testing.assert_close(loss, plain(latents, cond, draws), rtol=1e-4, atol=1e-5)
    assert all(p.grad is not None for p in objective.network.parameters())
