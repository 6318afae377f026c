"""The feature-conditioned DiT and its conditioner: shapes, truth tables, published counts."""

import dataclasses
import math
import weakref

import pytest
import torch

from models import build_network
from models.architectures.feature_dit import FeatureDiTConfig
from torch_utils.misc import count_parameters

TINY = FeatureDiTConfig(
    hidden_dim=32,
    num_blocks=2,
    num_heads=4,
    resolution=64,
    latent_channels=4,
    text_dim=12,
    visual_dim=10,
    visual_patch_size=16,
)
SIZES = ((64, 64), (96, 32), (32, 96))


def features(config=TINY, size=(64, 64), num=3, length=5, seed=0):
    """Return conditions of images of one size; the last text is shorter than the others."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = config.patch_grid(*size)
    mask = torch.ones(num, length, dtype=torch.bool)
    mask[-1, length - 2 :] = False
    return dict(
        text=torch.randn(num, length, config.text_dim, generator=generator),
        text_mask=mask,
        cls=torch.randn(num, config.visual_dim, generator=generator),
        patches=torch.randn(num, rows * columns, config.visual_dim, generator=generator),
        size=torch.tensor(size),
    )


def network_of(config=TINY, seed=0, active=True):
    """Return a network; ``active`` gives the modulations weights, which begin at zero."""
    torch.manual_seed(seed)
    network = build_network(config).eval()
    if active:
        for block in network.backbone.blocks:
            torch.nn.init.normal_(block.modulation.weight, std=0.1)
        torch.nn.init.normal_(network.backbone.head.weight, std=0.1)
    return network


def run(network, cond, drop=None, size=(64, 64), seed=1):
    num = len(cond["cls"])
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num, *network.config.latent_shape(*size), generator=generator)
    t = torch.linspace(0.2, 0.8, num)
    return network(x, t, network.context(cond, drop, num=num))


def drop_of(text=False, cls=False, patches=False, num=3):
    return torch.tensor([[text, cls, patches]]).expand(num, 3)


@pytest.mark.parametrize(
    ("dim", "blocks", "heads", "text_dim", "gates", "count"),
    [
        (384, 12, 6, 4096, False, 41_621_072),
        (384, 12, 6, 4096, True, 46_943_312),
        (384, 12, 6, 1024, False, 40_438_352),
        (768, 18, 12, 4096, False, 239_269_712),
        (768, 18, 12, 4096, True, 271_161_680),
        (768, 18, 12, 1024, False, 236_907_344),
    ],
)
def test_parameters_are_as_many_as_published(dim, blocks, heads, text_dim, gates, count):
    config = FeatureDiTConfig(
        hidden_dim=dim, num_blocks=blocks, num_heads=heads, text_dim=text_dim, gates=gates
    )
    with torch.device("meta"):
        assert count_parameters(build_network(config)) == count


def test_a_model_without_patches_has_none_of_their_parameters():
    names = set(dict(network_of().named_parameters()))
    without = set(
        dict(network_of(dataclasses.replace(TINY, use_dino_patches=False)).named_parameters())
    )
    assert names - without == {
        "conditioner.dino_patch_proj.weight",
        "conditioner.dino_patch_proj.bias",
        "conditioner.null_dino_patch_token",
    }
    assert without < names


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("patch", [14, 16])
def test_one_network_takes_every_size(size, patch):
    network = network_of(dataclasses.replace(TINY, visual_patch_size=patch))
    cond = features(network.config, size)
    context = network.context(cond, num=3)
    rows, columns = network.config.patch_grid(*size)
    assert context.tokens.shape == (3, 5 + 1 + rows * columns, 32)
    assert context.mask.shape == context.tokens.shape[:2]
    assert run(network, cond, size=size).shape == (3, 4, size[1] // 8, size[0] // 8)


def test_wide_and_high_images_of_one_number_of_patches_differ():
    network = network_of()
    wide, high = features(size=(96, 32)), features(size=(32, 96))
    high = {**wide, "size": high["size"]}
    contexts = [network.context(cond, num=3) for cond in (wide, high)]
    assert contexts[0].tokens.shape == contexts[1].tokens.shape
    assert not torch.allclose(contexts[0].tokens, contexts[1].tokens)


def test_patch_positions_are_those_of_the_tokens_at_the_same_places():
    network = network_of(dataclasses.replace(TINY, patch_pos=True))
    found = network.conditioner._positions_of(96, 32)
    torch.testing.assert_close(found, network.backbone.positions((2, 6), torch.device("cpu")))
    # Patches of 32 pixels lie between tokens: at 0.5, 2.5, ... in tokens.
    coarse = network_of(dataclasses.replace(TINY, visual_patch_size=32)).conditioner
    column = coarse._positions_of(64, 64)[1, 16:24]
    expected = [math.sin(2.5 * 10_000 ** (-i / 8)) for i in range(8)]
    assert column.tolist() == pytest.approx(expected, abs=1e-5)


def test_positions_of_an_image_size_are_kept_but_not_those_of_every_size_ever_seen():
    network = network_of(dataclasses.replace(TINY, patch_pos=True))
    cpu = torch.device("cpu")
    for positions in (
        lambda num: network.conditioner._positions_of(16 * num, 16),
        lambda num: network.backbone.positions((1, num), cpu),
    ):
        assert positions(2) is positions(2)
        made = [weakref.ref(positions(num)) for num in range(1, 100)]
        assert 0 < sum(reference() is not None for reference in made) <= 64


def test_the_first_velocity_is_small_and_the_first_loss_about_two():
    config = dataclasses.replace(TINY, hidden_dim=128)
    torch.manual_seed(0)
    network = build_network(config)
    cond = features(config)
    generator = torch.Generator().manual_seed(2)
    x0, noise = (torch.randn(3, 4, 8, 8, generator=generator) for _ in range(2))
    v = network((x0 + noise) / 2, torch.full([3], 0.5), network.context(cond, num=3))
    assert 0 < v.std() < 0.3
    assert (v - (noise - x0)).square().mean().item() == pytest.approx(2, abs=0.5)


def test_what_begins_at_zero_is_zero_and_everything_learns_within_three_steps():
    for gates in (False, True):
        torch.manual_seed(0)
        network = build_network(dataclasses.replace(TINY, gates=gates))
        for block in network.backbone.blocks:
            assert not block.modulation.weight.any()
            assert not block.modulation.bias.any()
        assert not network.backbone.refine.weight.any()
        optimizer = torch.optim.Adam(network.parameters(), 1e-2)
        cond = features()
        drop = torch.tensor([[True, False, False], [False, True, True], [False, False, False]])
        for _ in range(4):
            optimizer.zero_grad()
            (run(network, cond, drop) - 1).square().mean().backward()
            optimizer.step()
        for name, parameter in network.named_parameters():
            assert parameter.grad.abs().sum() > 0, name


def test_every_parameter_is_in_the_graph_of_every_batch():
    network = network_of()
    for drop in (drop_of(), drop_of(True, True, True)):
        network.zero_grad()
        run(network, features(), drop).square().mean().backward()
        assert all(p.grad is not None for p in network.parameters())


def test_dropped_conditions_tell_nothing():
    """The whole truth table: each condition acts where it is given, and nowhere else."""
    network = network_of()
    own, other = features(seed=0), features(seed=9)
    for text in (False, True):
        for cls in (False, True):
            for patches in (False, True):
                drop = drop_of(text, cls, patches)
                reference = run(network, own, drop)
                for name, dropped in (("text", text), ("cls", cls), ("patches", patches)):
                    changed = run(network, {**own, name: other[name]}, drop)
                    assert torch.equal(changed, reference) == dropped, (name, drop)


def test_dropped_text_does_not_tell_its_length():
    network = network_of()
    short = features(length=3)
    long = {**features(length=9), **{k: short[k] for k in ("cls", "patches", "size")}}
    drop = drop_of(text=True)
    expected = run(network, short, drop)
    torch.testing.assert_close(run(network, long, drop), expected)
    # As without any text.
    absent = {k: v for k, v in short.items() if not k.startswith("text")}
    torch.testing.assert_close(run(network, absent), expected)


def test_absent_conditions_are_dropped_ones():
    network = network_of()
    cond = features()
    text_alone = {k: v for k, v in cond.items() if k not in ("cls", "patches")}
    x = torch.randn(3, 4, 8, 8)
    t = torch.full([3], 0.5)
    dropped = network(x, t, network.context(cond, drop_of(cls=True, patches=True)))
    torch.testing.assert_close(network(x, t, network.context(text_alone)), dropped)
    nothing = network.context({"size": cond["size"]}, num=3)
    all_dropped = network.context(cond, drop_of(True, True, True))
    torch.testing.assert_close(network(x, t, nothing), network(x, t, all_dropped))


def test_padding_of_the_text_changes_nothing():
    network = network_of()
    cond = features()
    padded = dict(cond)
    padded["text"] = torch.cat([cond["text"], torch.full([3, 4, 12], 7.0)], dim=1)
    padded["text_mask"] = torch.cat([cond["text_mask"], torch.zeros(3, 4, dtype=torch.bool)], dim=1)
    torch.testing.assert_close(run(network, padded), run(network, cond))


def test_a_row_is_the_same_in_any_batch():
    network = network_of()
    cond, drop = features(), torch.tensor([[False] * 3, [True, False, False], [False, True, True]])
    whole = network.context(cond, drop)
    x, t = torch.randn(3, 4, 8, 8), torch.linspace(0.1, 0.9, 3)
    together = network(x, t, whole)
    for row in range(3):
        rows = slice(row, row + 1)
        own = {k: v if k == "size" else v[rows] for k, v in cond.items()}
        alone = network(x[rows], t[rows], network.context(own, drop[rows]))
        torch.testing.assert_close(alone, together[rows], rtol=1e-4, atol=1e-5)


def test_without_padding_or_dropout_there_is_no_mask():
    network = network_of()
    cond = features()
    del cond["text_mask"]
    assert network.context(cond).mask is None
    assert network.context(cond, drop_of()).mask.all()


def test_time_of_the_cls_token_acts_on_that_token_alone():
    plain, timed = network_of(), network_of(dataclasses.replace(TINY, cls_token_time=True))
    timed.load_state_dict(plain.state_dict())
    cond = features()
    context = timed.context(cond)
    t = torch.randn(3, 32)
    moved = timed.backbone._add_to_cls_token(context.tokens, t, 16)
    difference = moved - context.tokens
    torch.testing.assert_close(difference[:, 5], t, rtol=1e-4, atol=1e-5)
    difference[:, 5] = 0
    assert not difference.any()
    assert not torch.allclose(run(plain, cond), run(timed, cond))


def test_a_bias_of_minus_infinity_hides_patches_and_of_zero_changes_nothing():
    network = network_of()
    cond = features()
    reference = run(network, cond)
    zero = run(network, {**cond, "patch_bias": torch.zeros(3)})
    torch.testing.assert_close(zero, reference)
    hidden = {**cond, "patch_bias": torch.full([3], -torch.inf)}
    other = {**hidden, "patches": features(seed=5)["patches"]}
    torch.testing.assert_close(run(network, hidden), run(network, other))
    assert not torch.allclose(run(network, hidden), reference)


def test_zero_patches_dilute_attention_unless_they_are_biased():
    """Many tokens without content take attention away from a text (spec, warm start)."""
    config = dataclasses.replace(TINY, patch_pos=False, visual_patch_size=4)
    network = network_of(config)
    torch.nn.init.zeros_(network.conditioner.dino_patch_proj.weight)
    baseline = network_of(dataclasses.replace(config, use_dino_patches=False))
    baseline.load_state_dict(network.state_dict(), strict=False)
    cond = features(config)
    num = cond["patches"].shape[1]
    expected = run(baseline, cond)
    diluted = (run(network, cond) - expected).abs().mean()
    bias = -torch.tensor(float(num)).log() - 4
    biased = {**cond, "patch_bias": bias.expand(3)}
    held_back = (run(network, biased) - expected).abs().mean()
    assert held_back < 0.1 * diluted


def test_times_are_embedded_as_a_thousand_steps():
    """Cosines, then sines of 1000 t / 10000^(i / 128)."""
    seen = []
    network = network_of()
    network.backbone.noise_mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    run(network, features())
    t = torch.linspace(0.2, 0.8, 3, dtype=torch.float64)
    angles = 1000 * t[:, None] * 10_000 ** (-torch.arange(128, dtype=torch.float64) / 128)
    expected = torch.cat([angles.cos(), angles.sin()], dim=1)
    torch.testing.assert_close(seen[0].double(), expected, rtol=0, atol=1e-3)


def test_checkpointing_changes_no_gradient():
    cond = features()
    grads = []
    for checkpointing in (False, True):
        network = network_of(dataclasses.replace(TINY, checkpointing=checkpointing)).train()
        run(network, cond, drop_of(text=True)).square().sum().backward()
        grads.append([p.grad for p in network.parameters()])
    for first, second in zip(*grads, strict=True):
        torch.testing.assert_close(first, second)


def test_what_does_not_fit_is_refused_in_one_sentence():
    network = network_of()
    cond = features()
    x, t = torch.zeros(3, 4, 8, 8), torch.zeros(3)
    with pytest.raises(ValueError, match="multiples of 2, not 4x7x8"):
        network(torch.zeros(3, 4, 7, 8), t, network.context(cond))
    with pytest.raises(ValueError, match="does not fit 3 latents of 8x4"):
        network(torch.zeros(3, 4, 8, 4), t, network.context(features(size=(64, 32), num=2)))
    with pytest.raises(ValueError, match="4x4 patches of 16 pixels, but 9 are given"):
        network.context({**cond, "patches": cond["patches"][:, :9]})
    with pytest.raises(ValueError, match="text features of 12 numbers, not 7"):
        network.check({"text": torch.zeros(1, 2, 7)})
    with pytest.raises(ValueError, match="none are given"):
        network.check({"size": cond["size"]})
    with pytest.raises(ValueError, match="--num-heads: got 5"):
        dataclasses.replace(TINY, num_heads=5)
    with pytest.raises(ValueError, match="--hidden-dim: got 30"):
        dataclasses.replace(TINY, hidden_dim=30)
    assert network(x, t, network.context(cond)).isfinite().all()


def test_nulls_spare_weight_decay():
    nulls = [p for n, p in network_of().named_parameters() if "null" in n]
    assert len(nulls) == 3
    assert all(p.spares_decay for p in nulls)
    assert all(0.005 < p.std() < 0.05 for p in nulls)
