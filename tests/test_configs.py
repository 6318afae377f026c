import pytest
import torch

from configs import get_diffit_config, get_preset
from configs.diffit import MODELS
from models import build_network


@pytest.mark.parametrize("name", list(MODELS))
def test_every_diffit_preset_builds_a_network_that_runs(name):
    config = get_diffit_config(name)
    with torch.device("meta"):
        network = build_network(config)
        cond = {"label": torch.zeros(2, dtype=torch.int64)}
        shape = (2, *config.input_shape)
        out = network(torch.zeros(shape), torch.zeros(2), network.context(cond, num=2))
    assert out.shape == (2, config.out_channels, *shape[2:])


@pytest.mark.parametrize(
    ("name", "count"),
    [("cifar10", 15_870_251), ("cifar10-l4", 28_682_451), ("ffhq64", 44_792_051)],
)
def test_presets_have_the_published_sizes(name, count):
    with torch.device("meta"):
        network = build_network(get_diffit_config(name))
    assert sum(p.numel() for p in network.parameters()) == count


def test_the_paper_s_table_is_what_the_presets_say():
    cifar10, ffhq64 = get_diffit_config("cifar10"), get_diffit_config("ffhq64")
    assert (cifar10.resolution, cifar10.widths) == (32, (128, 256, 256))
    assert cifar10.blocks_per_stage == (2, 2, 2)
    assert get_diffit_config("cifar10-l4").blocks_per_stage == (4, 4, 4)
    assert (ffhq64.resolution, ffhq64.widths) == (64, (128, 256, 256, 256))
    assert ffhq64.blocks_per_stage == (4, 4, 4, 4)
    assert (cifar10.window, ffhq64.window) == (4, 8)
    assert (cifar10.num_heads, ffhq64.num_heads) == (4, 4)
    assert (cifar10.dropout, ffhq64.dropout) == (0.13, 0.05)
    assert (cifar10.time_dim, ffhq64.time_dim) == (512, 512)


@pytest.mark.parametrize(
    ("name", "batch", "lr", "guidance"),
    [
        ("imagenet256", 256, 3e-4, (4.4, "power-cosine", 4.0, 3)),
        ("imagenet512", 512, 1e-4, (1.49, "constant", 4.0, 3)),
    ],
)
def test_latent_presets_carry_the_published_protocol(name, batch, lr, guidance):
    run = get_preset(name).run
    training, sampling, given = run.training, run.sampling, run.guidance
    assert (training.batch, training.lr, training.lr_rampup) == (batch, lr, 0)
    assert 0.5 ** (batch / (training.ema_kimg * 1000)) == pytest.approx(0.9999, abs=1e-9)
    assert training.ema_rampup is None
    assert (given.cfg_scale, given.cfg_schedule, given.cfg_power, given.cfg_channels) == guidance
    assert (sampling.sampler, sampling.grid, sampling.steps) == ("ddpm", "timesteps", 250)
    assert (run.precond.precond, run.precond.learned_variance) == ("ddpm", True)
    assert (run.data.cond, run.data.hflip) == (True, True)
    assert (training.precision, training.compile) == ("auto", None)


def test_digits_are_small_grey_classed_and_not_augmented():
    digits = get_diffit_config("digits")
    assert (digits.resolution, digits.img_channels, digits.num_classes) == (8, 1, 10)
    assert digits.augment_dim == 0
    with torch.device("meta"):
        count = sum(p.numel() for p in build_network(digits).parameters())
    assert 350_000 < count < 550_000


def test_a_misspelled_preset_gets_the_nearest_name():
    with pytest.raises(ValueError, match=r"'cifar-10'; accepted: cifar10, .* mean 'cifar10'"):
        get_diffit_config("cifar-10")
