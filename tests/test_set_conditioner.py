"""Contexts of sets: who sees what, absent images, noise levels, divergences and labels."""

import math

import pytest
import torch
from set_networks import ENCODERS, NUM, TINY, build, build_active, random_images, value_of
from torch.distributions import Normal, kl_divergence

from models.set_encoder import leave_one_out_index

P, D = TINY.grid**2, TINY.encoder_dim

every_encoder = pytest.mark.parametrize("changes", ENCODERS.values(), ids=ENCODERS)
both_ways = pytest.mark.parametrize("way", ["film", "lag"])


def without(images, i):
    """The support of image i of one set [n, ...]: [1, n - 1, ...]."""
    return torch.cat([images[:i], images[i + 1 :]])[None]


def join(contexts):
    return contexts[0].concat(*contexts[1:])


def context_and_gradients(network, context, leaf):
    """What the DiT takes, and its gradients with regard to the images and all parameters."""
    value = value_of(context)
    cotangent = torch.randn(
        value.shape, generator=torch.Generator().manual_seed(5), dtype=value.dtype
    )
    inputs = [leaf, *network.conditioner.parameters()]
    return [value, *torch.autograd.grad(value, inputs, cotangent)]


# Leave-one-out.


def test_the_index_of_the_others_leaves_out_one_image_a_row():
    assert leave_one_out_index(3).tolist() == [[1, 2], [0, 2], [0, 1]]
    assert leave_one_out_index(1).shape == (1, 0)


@every_encoder
@both_ways
def test_leave_one_out_equals_a_loop_over_the_images_left_out(changes, way):
    network = build_active(mode_conditioning=way, **changes).double()
    sets = random_images(3, NUM, dtype=torch.float64).requires_grad_()
    together = network.context({"set": sets})
    apart = join([network.context({"support": without(s, i)}) for s in sets for i in range(NUM)])
    assert value_of(together).shape == ((12, D) if way == "film" else (12, P, D))
    pairs = zip(
        context_and_gradients(network, together, sets),
        context_and_gradients(network, apart, sets),
        strict=True,
    )
    for value, expected in pairs:
        torch.testing.assert_close(value, expected)


@every_encoder
@both_ways
def test_without_leave_one_out_every_image_of_a_set_has_the_context_of_all(changes, way):
    network = build_active(mode_conditioning=way, leave_one_out=False, **changes).double()
    sets = random_images(3, NUM, dtype=torch.float64)
    rows = value_of(network.context({"set": sets})).unflatten(0, (3, NUM))
    expected = value_of(network.context({"support": sets}))
    assert not torch.allclose(expected[0], expected[1])
    for i in range(NUM):
        torch.testing.assert_close(rows[:, i], expected)


@every_encoder
@both_ways
@pytest.mark.parametrize("num_sets", [2, NUM], ids=["few sets", "as many sets as images"])
def test_an_output_depends_on_the_other_images_of_its_set_and_on_nothing_else(
    changes, way, num_sets
):
    network = build_active(mode_conditioning=way, **changes)
    sets = random_images(num_sets, NUM).requires_grad_()
    noisy = random_images(num_sets * NUM, seed=3)
    out = network(noisy, torch.full([len(noisy)], 3.0), network.context({"set": sets}))
    for row in range(len(noisy)):
        (gradient,) = torch.autograd.grad(out[row].square().sum(), sets, retain_graph=True)
        seen = gradient.abs().amax((2, 3, 4)) > 0
        expected = torch.zeros(num_sets, NUM, dtype=torch.bool)
        expected[row // NUM] = torch.arange(NUM) != row % NUM
        assert torch.equal(seen, expected)


def test_a_set_of_another_size_than_the_model_was_trained_on_is_refused():
    with pytest.raises(ValueError, match=r"--sample-size: .* sets of 4 images, but a set has 3"):
        build().context({"set": random_images(2, 3)})


def test_a_model_of_sets_needs_one():
    network = build(num_classes=3)
    for call in (network.check, network.context):
        with pytest.raises(ValueError, match="conditioned on sets of images, but none is given"):
            call({"label": torch.tensor([1])})
    network.check({"support": random_images(1, 2)})


# Absent images.


@every_encoder
@both_ways
def test_absent_images_change_nothing_whatever_is_in_their_place(changes, way):
    network = build_active(mode_conditioning=way, **changes).double()
    images = random_images(2, 3, dtype=torch.float64).requires_grad_()
    mask = torch.tensor([[True, True, False], [True, False, False]])
    supports = images[:1, :2], images[1:, :1]
    shorter = join([network.context({"support": support}) for support in supports])
    expected = context_and_gradients(network, shorter, images)
    for garbage in (0.0, 1e30, math.inf, math.nan):
        filled = images.detach().masked_fill(~mask[:, :, None, None, None], garbage)
        filled.requires_grad_()
        masked = network.context({"support": filled, "mask": mask})
        result = context_and_gradients(network, masked, filled)
        for value, other in zip(result, expected, strict=True):
            torch.testing.assert_close(value, other)
        assert (result[1][~mask] == 0).all()


@pytest.mark.parametrize("changes", [ENCODERS[name] for name in ("vit", "second pass", "mean")])
def test_an_image_may_be_absent_anywhere_but_in_a_stack(changes):
    network = build_active(**changes).double()
    images = random_images(1, 3, dtype=torch.float64)
    masked = network.context({"support": images, "mask": torch.tensor([[True, False, True]])})
    shorter = network.context({"support": images[:, [0, 2]]})
    torch.testing.assert_close(masked.vector, shorter.vector)


@every_encoder
@both_ways
def test_sets_of_different_sizes_leave_one_out_as_a_loop_does(changes, way):
    network = build_active(mode_conditioning=way, **changes).double()
    sizes = [4, 3, 2, 1]
    sets = random_images(len(sizes), NUM, dtype=torch.float64)
    mask = torch.arange(NUM) < torch.tensor(sizes)[:, None]
    filled = torch.where(mask[:, :, None, None, None], sets, math.nan)
    together = value_of(network.context({"set": filled, "mask": mask}))
    rows = together.unflatten(0, (len(sizes), NUM))
    for s, i in torch.cartesian_prod(torch.arange(len(sizes)), torch.arange(NUM)).tolist():
        others = [j for j in range(sizes[s]) if j != i]
        if others:
            expected = value_of(network.context({"support": sets[s : s + 1, others]}))[0]
        else:
            expected = network.conditioner.null.expand_as(rows[s, i])
        torch.testing.assert_close(rows[s, i], expected)


def test_without_leave_one_out_a_set_is_encoded_from_the_images_that_it_has():
    network = build_active(leave_one_out=False, encoder_mode="vit")
    sets = random_images(2, NUM)
    mask = torch.tensor([[True, True, True, False], [False, True, False, False]])
    rows = network.context({"set": sets, "mask": mask}).vector
    for row in range(2 * NUM):
        s = row // NUM
        expected = network.context({"support": sets[s : s + 1, mask[s]]}).vector[0]
        torch.testing.assert_close(rows[row], expected)


@every_encoder
@both_ways
def test_a_context_without_images_or_dropped_is_the_learned_null(changes, way):
    network = build_active(mode_conditioning=way, **changes)
    support = random_images(3, 2)
    plain = value_of(network.context({"support": support}))
    mask = torch.tensor([[True, True], [False, False], [True, True]])
    drop = torch.tensor([False, False, True])
    context = value_of(network.context({"support": support, "mask": mask}, drop))
    null = network.conditioner.null.expand_as(context[1])
    torch.testing.assert_close(context[0], plain[0])
    assert torch.equal(context[1], null)
    assert torch.equal(context[2], null)


@both_ways
def test_a_dropped_set_is_dropped_for_all_its_images(way):
    network = build_active(mode_conditioning=way)
    sets = random_images(2, NUM)
    context = value_of(network.context({"set": sets}, torch.tensor([False, True])))
    expected = value_of(network.context({"set": sets}))
    assert torch.equal(context[:NUM], expected[:NUM])
    assert (context[NUM:] == network.conditioner.null).all()


@every_encoder
def test_supports_of_every_size_have_contexts_and_only_a_stack_has_a_limit(changes):
    network = build_active(**changes)
    for count in range(1, NUM):
        context = network.context({"support": random_images(2, count)})
        assert context.vector.shape == (2, D)
        assert context.vector.isfinite().all()
    if changes.get("encoder_mode") == "vit" or "encoder_tokenizer" in changes:
        assert network.context({"support": random_images(2, 2 * NUM)}).vector.shape == (2, D)
        return
    with pytest.raises(ValueError, match="at most 3 images, but a set holds 4"):
        network.context({"support": random_images(2, NUM)})


# Waiting for the noise level.


@every_encoder
@both_ways
def test_a_context_that_waits_is_encoded_at_the_noise_levels_of_the_network(changes, way):
    network = build_active(encoder_time=True, mode_conditioning=way, **changes)
    sets, noisy = random_images(2, NUM), random_images(2 * NUM, seed=3)
    waiting = network.context({"set": sets})
    assert value_of(waiting) is None
    levels = torch.tensor([1.0, 40.0])
    rows = levels.repeat_interleave(NUM)
    told = network.context({"set": sets, "c_noise": levels})
    out = network(noisy, rows, waiting)
    assert torch.equal(out, network(noisy, rows, told))
    # The encoder and not the DiT alone hears of the noise level.
    assert not torch.allclose(
        out, network(noisy, rows, network.conditioner.resolve(waiting, 2 * rows))
    )
    # Every row at a level of its own.
    rows = torch.arange(2.0 * NUM)
    resolved = value_of(network.conditioner.resolve(waiting, rows))
    for row in range(2 * NUM):
        cond = {"support": without(sets[row // NUM], row % NUM), "c_noise": rows[row : row + 1]}
        expected = value_of(network.context(cond))[0]
        torch.testing.assert_close(resolved[row], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["vit", "stack"])
def test_contexts_that_wait_are_joined_repeated_and_indexed(name):
    network = build_active(encoder_time=True, **ENCODERS[name])
    images = random_images(3, 3)
    mask = torch.tensor([[True, True, False], [True, True, True], [False, False, False]])
    levels = torch.tensor([1.0, 10.0, 100.0])

    def waiting(rows, drop=None):
        return network.context({"support": images[rows], "mask": mask[rows]}, drop)

    def resolved(context, rows):
        return network.conditioner.resolve(context, levels[rows]).vector

    expected = resolved(waiting([0, 1, 2]), [0, 1, 2])
    assert torch.equal(expected[2], network.conditioner.null)
    joined = waiting([0]).concat(waiting([1, 2]))
    torch.testing.assert_close(resolved(joined, [0, 1, 2]), expected)
    torch.testing.assert_close(resolved(joined.index(slice(1, 3)), [1, 2]), expected[1:])
    chosen = joined.index(torch.tensor([True, False, True]))
    torch.testing.assert_close(resolved(chosen, [0, 2]), expected[[0, 2]])
    repeated = joined.repeat(2)
    rows = [0, 0, 1, 1, 2, 2]
    torch.testing.assert_close(resolved(repeated, rows), expected[rows])
    dropped = waiting([0, 1], torch.tensor([False, True]))
    torch.testing.assert_close(resolved(dropped, [0, 1])[0], expected[0])
    assert torch.equal(resolved(dropped, [0, 1])[1], network.conditioner.null)
    with pytest.raises(ValueError, match="with and without 'vector'"):
        joined.concat(network.conditioner.resolve(joined, levels))


# A variational context.


def posterior_of(network):
    """A list that gets mean and standard deviation whenever the network makes them."""
    taken = []

    def keep(_, __, out):
        mean, log_variance = out[:, :D], out[:, D:]
        taken.append(Normal(mean, (log_variance.clamp(-10, 10) / 2).exp()))

    network.conditioner.posterior.register_forward_hook(keep)
    return taken


@both_ways
def test_the_divergence_of_every_image_is_that_of_two_normal_distributions(way):
    network = build_active(mode_context="variational", mode_conditioning=way)
    taken = posterior_of(network)
    kl = network.context({"set": random_images(3, NUM)}).kl
    expected = kl_divergence(taken[0], Normal(0.0, 1.0)).sum(-1)
    assert expected.shape == (12,)
    assert expected.unique().numel() == 12
    torch.testing.assert_close(kl, expected)
    # By hand: two of D dimensions with mean 3, others standard normal.
    for layer in (network.conditioner.posterior[0], network.conditioner.posterior[2]):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    with torch.no_grad():
        network.conditioner.posterior[2].bias[:2] = 3
    kl = network.context({"support": random_images(3, 2)}).kl
    assert kl.tolist() == [9.0, 9.0, 9.0]


def test_a_variational_context_is_its_mean_or_drawn_with_the_noise_that_is_given():
    network = build_active(mode_context="variational")
    taken = posterior_of(network)
    sets = random_images(2, NUM)
    torch.testing.assert_close(network.context({"set": sets}).vector, taken[0].mean)
    noise = torch.randn(2, NUM, D, generator=torch.Generator().manual_seed(4))
    drawn = network.context({"set": sets, "context_noise": noise}).vector
    expected = taken[1].mean + taken[1].stddev * noise.view(2 * NUM, D)
    torch.testing.assert_close(drawn, expected)


def test_in_lag_what_is_drawn_joins_the_tokens_and_replaces_none():
    network = build_active(mode_context="variational", mode_conditioning="lag", context_pool_size=4)
    taken = posterior_of(network)
    plain = build(mode_conditioning="lag", context_pool_size=4)
    plain.load_state_dict(network.state_dict(), strict=False)
    sets, noise = random_images(2, NUM), torch.ones(2, NUM, D)
    tokens = network.context({"set": sets, "context_noise": noise}).tokens
    assert tokens.shape == (8, 4 + 1, D)
    torch.testing.assert_close(tokens[:, :-1], plain.context({"set": sets}).tokens)
    torch.testing.assert_close(tokens[:, -1], taken[0].mean + taken[0].stddev)


@both_ways
def test_a_dropped_or_empty_set_has_no_divergence(way):
    network = build_active(mode_context="variational", mode_conditioning=way)
    mask = torch.tensor([[True] * NUM, [True] * NUM, [True] + [False] * (NUM - 1)])
    drop = torch.tensor([False, True, False])
    kl = network.context({"set": random_images(3, NUM), "mask": mask}, drop).kl
    assert (kl[:NUM] > 0).all()
    assert (kl[NUM : 2 * NUM] == 0).all()
    # The only image has no others; those absent would be made from it.
    assert (kl[2 * NUM :] > 0).tolist() == [False, True, True, True]


@pytest.mark.parametrize("sign", [-1, 1])
def test_the_logarithm_of_the_variance_stays_within_ten(sign):
    network = build_active(mode_context="variational")
    torch.nn.init.zeros_(network.conditioner.posterior[2].weight)
    with torch.no_grad():
        network.conditioner.posterior[2].bias.copy_(
            torch.tensor([0.0, sign * 99.0]).repeat_interleave(D)
        )
    noise = torch.ones(1, NUM, D)
    context = network.context({"set": random_images(1, NUM), "context_noise": noise})
    torch.testing.assert_close(context.vector, torch.full([NUM, D], math.exp(5 * sign)))
    expected = D * 0.5 * (math.exp(10 * sign) - 1 - 10 * sign)
    torch.testing.assert_close(context.kl, torch.full([NUM], expected))


# Width, pooling and shapes of what reaches the DiT.


def test_tokens_are_averaged_over_squares_of_the_grid():
    network = build_active(mode_conditioning="lag")
    pooled = build_active(mode_conditioning="lag", context_pool_size=4)
    cond = {"support": random_images(2, 3)}
    tokens, averages = network.context(cond).tokens, pooled.context(cond).tokens
    assert averages.shape == (2, 4, D)
    for i, (top, left) in enumerate([(0, 0), (0, 2), (2, 0), (2, 2)]):
        places = [4 * (top + y) + left + x for y in range(2) for x in range(2)]
        torch.testing.assert_close(averages[:, i], tokens[:, places].sum(1) / 4)


@both_ways
@pytest.mark.parametrize("mode_context", ["deterministic", "variational"])
def test_a_projection_gives_the_context_the_width_that_the_dit_takes(way, mode_context):
    changes = dict(mode_conditioning=way, mode_context=mode_context)
    network = build_active(context_channels=7, context_proj=True, **changes)
    cond = {"support": random_images(3, 2)}
    context = value_of(network.context(cond, torch.tensor([False, False, True])))
    projection, network.conditioner.projection = (
        network.conditioner.projection,
        torch.nn.Identity(),
    )
    network.conditioner.null = torch.nn.Parameter(torch.zeros(D))
    torch.testing.assert_close(context[:2], projection(value_of(network.context(cond)))[:2])
    assert context.shape[-1] == 7
    assert (context[2] == context[2].reshape(-1, 7)[0]).all()


@pytest.mark.parametrize(
    ("vector", "tokens", "message"),
    [
        ((8, D + 1), (8, P, D), r"vector is \[8, 13\], not \[8, 12\]"),
        ((2, D), (8, P, D), r"vector is \[2, 12\], not \[8, 12\]"),
        ((8, D), (8, D), r"tokens are \[8, 12\], not \[8, 16, 12\]"),
        ((8, D), (2, NUM, P, D), r"tokens are \[2, 4, 16, 12\], not"),
        ((8, D), (8, P, D + 1), r"tokens are \[8, 16, 13\], not"),
        ((8, D), (8, P + 2, D), r"tokens are \[8, 18, 12\], not"),
        ((8, D), (4, P, D), r"tokens are \[4, 16, 12\], not"),
    ],
)
def test_an_encoder_that_returns_other_shapes_is_caught(monkeypatch, vector, tokens, message):
    network = build(mode_conditioning="lag")
    outputs = torch.zeros(vector), torch.zeros(tokens)
    monkeypatch.setattr(network.conditioner.encoder, "forward", lambda *_, **__: outputs)
    with pytest.raises(AssertionError, match=message):
        network.context({"set": random_images(2, NUM)})


def test_what_must_not_shrink_is_marked_to_be_spared_from_weight_decay():
    network = build(mode_context="variational", encoder_time=True)
    names = {
        name for name, value in network.named_parameters() if getattr(value, "spares_decay", False)
    }
    encoder = "conditioner.encoder"
    head = {f"{encoder}.head.{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias")}
    assert names == {f"{encoder}.cls", f"{encoder}.positions", "conditioner.null"} | head


# Labels of classes.


@both_ways
def test_labels_are_added_to_the_noise_level_and_drop_to_the_null_class(way):
    network = build_active(mode_conditioning=way, num_classes=3)
    table = network.conditioner.table.embedding_table.weight
    assert table.shape == (4, TINY.hidden_dim)
    sets, label = random_images(2, NUM), torch.tensor([2, 1])

    def labels(drop=None, **cond):
        return network.context({"set": sets, **cond}, drop).label

    assert torch.equal(labels(label=label), table[[2] * NUM + [1] * NUM])
    dropped = labels(torch.tensor([False, True]), label=label)
    assert torch.equal(dropped, table[[2] * NUM + [3] * NUM])
    assert torch.equal(labels(label=torch.tensor([3, 0])), table[[3] * NUM + [0] * NUM])
    assert torch.equal(labels(), table[[3] * 2 * NUM])
    support = {"support": sets[:, 1:], "label": label}
    assert torch.equal(network.context(support).label, table[[2, 1]])
    # A label survives where a set is merely empty.
    mask = torch.tensor([[True] * NUM, [False] * NUM])
    assert torch.equal(labels(label=label, mask=mask), table[[2] * NUM + [1] * NUM])
    out = [
        network(random_images(2), torch.ones(2), network.context({"support": sets[:, 1:], **cond}))
        for cond in ({"label": label}, {})
    ]
    assert (out[0] - out[1]).abs().amax((1, 2, 3)).min() > 0.01


def test_a_model_without_classes_ignores_labels():
    cond = {"support": random_images(1, 2), "label": torch.tensor([7])}
    network = build()
    network.check(cond)
    assert network.context(cond).label is None


def test_labels_may_be_unknown_but_not_out_of_range():
    network = build(num_classes=3)
    for label in ([0, 3], [3, 3], [2, 1]):
        network.check({"support": random_images(2, 2), "label": torch.tensor(label)})
    for label in (4, -1):
        with pytest.raises(ValueError, match=f"Class index {label} is out of range"):
            network.check({"support": random_images(1, 2), "label": torch.tensor([label])})
