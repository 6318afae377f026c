"""Encoders of sets: patches, tokens and attention, against loops and explicit formulas."""

import math

import pytest
import torch
from set_networks import CHANNELS, ENCODERS, TINY, build, build_active, random_images

from models.set_encoder import StackTokeniser, extract_patches, shift_images

P, D = TINY.grid**2, TINY.encoder_dim

every_encoder = pytest.mark.parametrize("changes", ENCODERS.values(), ids=ENCODERS)


def bare_encoder(network):
    """Strip the network's encoder of blocks and head: its outputs are what it makes of tokens."""
    encoder = network.conditioner.encoder
    encoder.blocks, encoder.head = torch.nn.ModuleList(), torch.nn.Identity()
    return encoder


# Tokens.


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_patches_are_cut_row_by_row_with_channels_last(patch):
    images = torch.randn(2, 3, 5, 4, 8)
    patches = extract_patches(images, patch)
    assert patches.shape == (2, 3, 32 // patch**2, 5 * patch**2)
    per_row = 8 // patch
    for place in range(32 // patch**2):
        top, left = place // per_row * patch, place % per_row * patch
        for y in range(patch):
            for x in range(patch):
                for c in range(5):
                    number = patches[:, :, place, (y * patch + x) * 5 + c]
                    assert torch.equal(number, images[:, :, c, top + y, left + x])


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_shifted_images_are_half_a_patch_away_on_each_diagonal(patch):
    images = torch.randn(2, 3, 8, 8)
    shifted = shift_images(images, patch).unflatten(1, (5, 3))
    assert torch.equal(shifted[:, 0], images)
    step = {1: 1, 2: 1, 4: 2}[patch]
    offsets = [(-step, -step), (-step, step), (step, -step), (step, step)]
    for i, (dy, dx) in enumerate(offsets, start=1):
        for y in range(8):
            for x in range(8):
                inside = 0 <= y + dy < 8 and 0 <= x + dx < 8
                expected = images[:, :, y + dy, x + dx] if inside else torch.zeros(2, 3)
                assert torch.equal(shifted[:, i, :, y, x], expected)


def test_a_stack_orders_rows_columns_channels_and_then_images():
    encoder = build().conditioner.encoder
    taken = []
    encoder.tokeniser.norm.register_forward_pre_hook(lambda _, args: taken.append(args[0]))
    images = random_images(1, 3)
    encoder.tokenise(images)
    (stacked,) = taken
    assert stacked.shape == (1, P, 4 * CHANNELS * 3)
    for place in range(P):
        top, left = place // 4 * 2, place % 4 * 2
        expected = [
            images[0, s, c, top + y, left + x].item()
            for y in range(2)
            for x in range(2)
            for c in range(CHANNELS)
            for s in range(3)
        ]
        assert stacked[0, place].tolist() == expected


@pytest.mark.parametrize("second_pass", [False, True])
def test_outputs_of_vit_are_averaged_over_images_place_by_place(second_pass):
    encoder = bare_encoder(build(encoder_mode="vit", second_pass=second_pass, encoder_pool="mean"))
    torch.nn.init.zeros_(encoder.positions)
    # The number of a token is 100 times its image plus its place.
    number = 100.0 * torch.arange(3)[:, None] + torch.arange(P)
    tokens = number[None, :, :, None].expand(1, 3, P, D)
    vector, out = encoder(tokens)
    assert out[0, :, 0].tolist() == [100.0 + place for place in range(P)]
    assert vector[0, 0] == 100 + (P - 1) / 2
    _, out = encoder(tokens, mask=torch.tensor([[True, False, True]]))
    assert out[0, :, 0].tolist() == [100.0 + place for place in range(P)]
    _, out = encoder(tokens, mask=torch.tensor([[False, True, True]]))
    assert out[0, :, 0].tolist() == [150.0 + place for place in range(P)]


def test_the_mean_of_all_tokens_counts_cls_and_time_and_every_patch_of_images_present():
    encoder = bare_encoder(build(encoder_mode="vit", encoder_pool="mean-all"))
    torch.nn.init.zeros_(encoder.positions)
    torch.nn.init.constant_(encoder.cls, 1000.0)
    number = 100.0 * torch.arange(3)[:, None] + torch.arange(P)
    tokens = number[None, :, :, None].expand(1, 3, P, D).clone()
    vector, _ = encoder(tokens)
    total = 1000 + 0 + sum(100 * image + place for image in range(3) for place in range(P))
    torch.testing.assert_close(vector, torch.full([1, D], total / (2 + 3 * P)))
    # An absent image counts for nothing, whatever is in its place.
    tokens[:, 1] = 1e4
    vector, _ = encoder(tokens, mask=torch.tensor([[True, False, True]]))
    total = 1000 + 0 + sum(100 * image + place for image in (0, 2) for place in range(P))
    torch.testing.assert_close(vector, torch.full([1, D], total / (2 + 2 * P)))


@pytest.mark.parametrize(
    "changes",
    [dict(), dict(encoder_mode="vit", second_pass=True), dict(encoder_tokenizer="per_sample_mean")],
    ids=["stack", "second pass", "per sample mean"],
)
def test_the_mean_of_all_tokens_is_over_those_of_the_last_pass(changes):
    encoder = build_active(encoder_pool="mean-all", **changes).conditioner.encoder
    left = []
    encoder.blocks[-1].register_forward_hook(lambda *args: left.append(args[2]))
    vector, _ = encoder(encoder.tokenise(random_images(2, 3)))
    assert left[-1].shape == (2, P + 2, D)
    torch.testing.assert_close(vector, encoder.head(left[-1].sum(1) / (P + 2)))


@pytest.mark.parametrize(
    "changes",
    [
        dict(encoder_mode="vit"),
        dict(encoder_mode="vit", second_pass=True),
        dict(encoder_tokenizer="per_sample_mean"),
    ],
    ids=["vit", "second pass", "per sample mean"],
)
def test_the_mean_of_all_tokens_depends_on_no_order_of_the_images(changes):
    encoder = build_active(encoder_pool="mean-all", **changes).conditioner.encoder
    images = random_images(2, 4)
    vector, _ = encoder(encoder.tokenise(images))
    for order in ([1, 0, 2, 3], [3, 1, 0, 2]):
        other, _ = encoder(encoder.tokenise(images[:, order]))
        torch.testing.assert_close(other, vector, rtol=1e-4, atol=1e-5)
    # Three of four images, the fourth masked: the same as three.
    mask = torch.tensor([[True, True, False, True]]).expand(2, -1)
    garbage = torch.where(mask[:, :, None, None, None], images, 1e3)
    masked, _ = encoder(encoder.tokenise(garbage, mask), mask=mask)
    three, _ = encoder(encoder.tokenise(images[:, [0, 1, 3]]))
    torch.testing.assert_close(masked, three, rtol=1e-4, atol=1e-5)
    assert (three - vector).abs().max() > 1e-3


def test_a_second_pass_runs_the_blocks_again_over_the_average():
    network = build_active(encoder_mode="vit", second_pass=True)
    encoder = network.conditioner.encoder
    entered, left = [], []
    encoder.blocks[0].register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    encoder.blocks[-1].register_forward_hook(lambda *args: left.append(args[2]))
    mask = torch.tensor([[True, True, True], [True, False, True]])
    vector, tokens = encoder(encoder.tokenise(random_images(2, 3)), mask=mask)
    assert len(entered) == len(left) == 2
    images = left[0][:, 2:].unflatten(1, (3, P))
    average = torch.stack([images[0].sum(0) / 3, (images[1, 0] + images[1, 2]) / 2])
    torch.testing.assert_close(entered[1], torch.cat([left[0][:, :2], average], dim=1))
    torch.testing.assert_close(vector, encoder.head(left[1][:, 0]))
    torch.testing.assert_close(tokens, encoder.head(left[1][:, 2:]))


def test_equal_images_have_equal_tokens_in_vit():
    network = build_active(encoder_mode="vit")
    taken = []
    blocks = network.conditioner.encoder.blocks
    blocks[0].register_forward_pre_hook(lambda _, args: taken.append(args[0]))
    network.context({"support": random_images(1, 1).expand(1, 3, -1, -1, -1)})
    assert taken[0].shape == (1, 2 + 3 * P, D)
    patches = taken[0][:, 2:].unflatten(1, (3, P))
    assert torch.equal(patches[:, 0], patches[:, 1])
    assert torch.equal(patches[:, 0], patches[:, 2])
    assert not torch.isclose(patches[:, 0, 0], patches[:, 0, 1]).any()


@every_encoder
def test_tokens_are_cls_then_time_then_patches_each_with_its_position(changes):
    network = build_active(**changes)
    encoder = bare_encoder(network)
    images = random_images(2, 3)
    embedded = encoder.tokenise(images)
    if not encoder.is_set_mode:
        embedded = embedded.mean(1)
    vector, tokens = encoder(encoder.tokenise(images))
    torch.testing.assert_close(tokens, embedded + encoder.positions[:, 2:])
    expected = (encoder.cls + encoder.positions[:, :1])[:, 0].expand(2, -1)
    torch.testing.assert_close(vector, expected)


@pytest.mark.parametrize(("name", "depends"), [("mean", False), ("vit", False), ("stack", True)])
def test_only_a_stack_depends_on_the_order_of_the_images(name, depends):
    network = build_active(**ENCODERS[name])
    images = random_images(1, 3)
    one, other = (network.context({"support": s}).vector for s in (images, images[:, [2, 0, 1]]))
    assert torch.allclose(one, other, rtol=1e-4, atol=1e-5) != depends


def test_a_stack_normalises_over_what_is_present_and_scales_up_the_rest():
    torch.manual_seed(0)
    tokeniser = StackTokeniser(patch_dim=3, set_size=4, dim=5).double()
    torch.nn.init.normal_(tokeniser.norm.weight)
    torch.nn.init.normal_(tokeniser.norm.bias)
    patches = torch.randn(2, 3, 2, 3, dtype=torch.float64)
    mask = torch.tensor([[True, False, True], [True, True, True]])
    out = tokeniser(patches, mask)
    norm, linear = tokeniser.norm, tokeniser.linear
    for b in range(2):
        for place in range(2):
            present = [(f, s) for f in range(3) for s in range(3) if mask[b, s]]
            values = torch.stack([patches[b, s, place, f] for f, s in present])
            normal = (values - values.mean()) / (values.var(correction=0) + norm.eps).sqrt()
            expected = linear.bias.clone()
            for (f, s), value in zip(present, normal, strict=True):
                column = f * 4 + s
                value = norm.weight[column] * value + norm.bias[column]
                expected += linear.weight[:, column] * value * 4 / mask[b].sum()
            torch.testing.assert_close(out[b, place], expected)
    # The same without a mask, and with all four images: an ordinary layer norm.
    torch.testing.assert_close(tokeniser(patches[1:], None), out[1:], rtol=1e-12, atol=1e-12)
    full = torch.randn(1, 4, 2, 3, dtype=torch.float64)
    torch.testing.assert_close(
        tokeniser(full, None), tokeniser(full, torch.ones(1, 4, dtype=torch.bool))
    )


# Attention.


@pytest.mark.parametrize("mode", ["vit", "vit_set"])
def test_attention_of_the_encoder_equals_an_explicit_softmax(mode):
    network = build_active(encoder_mode=mode).double()
    attn = network.conditioner.encoder.blocks[0].attn
    taken = []
    attn.register_forward_hook(lambda _, args, out: taken.append((args[0], out)))
    network.context({"support": random_images(2, 2, dtype=torch.float64)})
    ((x, out),) = taken
    q, k, v = (x @ weight.T for weight in attn.qkv.weight.chunk(3))
    heads = []
    for h in range(3):
        columns = slice(5 * h, 5 * h + 5)
        scores = q[..., columns] @ k[..., columns].transpose(1, 2)
        if mode == "vit":
            scores = scores / 5**0.5
        else:
            scores = scores * attn.log_temperature.exp()
            scores[:, range(x.shape[1]), range(x.shape[1])] = -math.inf
        heads.append(scores.softmax(-1) @ v[..., columns])
    expected = torch.cat(heads, -1) @ attn.proj.weight.T + attn.proj.bias
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(("mode", "sees_itself"), [("vit", True), ("vit_set", False)])
def test_in_locality_attention_no_token_takes_its_own_value(mode, sees_itself):
    network = build_active(encoder_mode=mode)
    attn = network.conditioner.encoder.blocks[0].attn
    outs, place = [], 7
    attn.register_forward_hook(lambda *args: outs.append(args[2]))
    cond = {"support": random_images(1, 1)}
    network.context(cond)

    def move_value(_, __, qkv):
        moved = qkv.clone()
        moved[:, place, 2 * 15 :] += 1
        return moved

    attn.qkv.register_forward_hook(move_value)
    network.context(cond)
    moved = ~torch.isclose(*outs).all(-1)[0]
    expected = torch.ones(2 + P, dtype=torch.bool)
    expected[place] = sees_itself
    assert torch.equal(moved, expected)


def test_temperatures_begin_at_the_usual_scale_and_are_learned_only_by_locality_attention():
    for mode in ("vit", "vit_set"):
        network = build(encoder_mode=mode)
        for block in network.conditioner.encoder.blocks:
            attn = block.attn
            assert attn.qkv.weight.shape == (3 * 15, 12)  # Three heads of five, tokens of twelve.
            assert attn.qkv.bias is None
            assert attn.proj.bias is not None
            if mode == "vit":
                assert attn.log_temperature is None
            else:
                assert attn.log_temperature.exp().item() == pytest.approx(5**-0.5)


# Pools and the noise level.


@pytest.mark.parametrize("pool", ["cls", "mean", "sum"])
def test_the_head_applies_to_what_is_pooled_and_to_each_token(pool):
    network = build_active(encoder_pool=pool)
    encoder = network.conditioner.encoder
    taken = []
    encoder.blocks[-1].register_forward_hook(lambda *args: taken.append(args[2]))
    vector, tokens = encoder(encoder.tokenise(random_images(2, 3)))
    last, patches = taken[0], taken[0][:, 2:]
    pooled = {"cls": last[:, 0], "mean": patches.sum(1) / P, "sum": patches.sum(1)}[pool]
    torch.testing.assert_close(vector, encoder.head(pooled))
    torch.testing.assert_close(tokens, encoder.head(patches))


def test_the_time_token_is_nothing_or_tells_the_noise_level():
    taken = []

    def time_tokens(network, **cond):
        block = network.conditioner.encoder.blocks[0]
        hook = block.register_forward_pre_hook(lambda _, args: taken.append(args[0][:, 1]))
        network.context({"support": random_images(2, 2), **cond})
        hook.remove()
        return taken.pop() - network.conditioner.encoder.positions[:, 1]

    assert (time_tokens(build_active()) == 0).all()
    network = build_active(encoder_time=True)
    time = time_tokens(network, c_noise=torch.tensor([1.0, 5.0]))
    # Two sinusoids of each kind, cosines first; the frequencies are 1 and 1 / 100.
    angles = torch.tensor([1.0, 5.0])[:, None] * torch.tensor([1.0, 0.01])
    expected = network.conditioner.encoder.time_mlp(torch.cat([angles.cos(), angles.sin()], 1))
    torch.testing.assert_close(time, expected)
    assert not torch.isclose(time[0], time[1]).any()


def test_an_encoder_that_depends_on_the_noise_level_does_not_guess_it():
    encoder = build(encoder_time=True).conditioner.encoder
    with pytest.raises(ValueError, match="depends on the noise level, which was not given"):
        encoder(encoder.tokenise(random_images(1, 2)))


def test_learned_tokens_and_positions_begin_small():
    encoder = build(hdim=256).conditioner.encoder
    assert encoder.positions.shape == (1, 2 + P, 256)
    for parameter in (encoder.cls, encoder.positions):
        assert parameter.std().item() == pytest.approx(0.02, rel=0.1)
