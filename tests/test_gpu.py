"""What only a GPU, or a compiler, can show. Skipped without; run with ``pytest -m "gpu"``."""

import copy
import dataclasses

import pytest
import torch

import families
from configs import get_preset
from data.features.codec import FeatureCodec, FeatureStatistics
from data.images.augment import make_augment_pipe
from data.images.codec import PixelCodec
from data.latents.codec import LatentCodec
from diffusion.precond import make_precond
from models import build_network
from torch_utils import rng
from torch_utils.parameters import Parameters
from torch_utils.stats import StatsCollector
from training.ema import EMA, ema_beta
from training.feature_objective import FeatureObjective
from training.objective import Objective
from training.optimizer import GuardedAdam

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def make_step(device, dtype, preset="cifar10"):
    """Return a training step on random data, as the loop makes it, and its network."""
    if preset == "nanodit-tiny":
        return make_feature_step(device, dtype)
    run = get_preset(preset).run
    config = families.of(run).fit(run, None, num_classes=10)
    shape = config.model.input_shape
    if preset == "cifar10":
        codec = PixelCodec(make_augment_pipe(config.training.augment))
        data = torch.randint(0, 256, (8, *shape), dtype=torch.uint8).pin_memory()
    else:
        codec = LatentCodec(config.model, None)
        data = torch.rand(8, 2 * shape[0], *shape[1:]).to(torch.float16).pin_memory()
    torch.manual_seed(0)
    network = build_network(config.model).train().to(device, memory_format=torch.channels_last)
    objective = Objective(
        network,
        make_precond(config.precond),
        codec=codec,
        label_drop=0.1,
        autocast_dtype=dtype,
    )
    optimizer = GuardedAdam(Parameters(network), dynamic_scale=dtype == torch.float16)
    ema, stats = EMA(Parameters(network)), StatsCollector()
    labels = torch.randint(0, 10, (8,)).pin_memory()

    def step(cur_nimg, factor=1.0):
        optimizer.zero_grad()
        draws = objective.draw(rng.Step(0, cur_nimg, 8, shape, device))
        x, cond = objective.prepare(data, {"label": labels}, draws, device)
        loss = objective(x, cond, draws)
        total = loss.sum() * (factor / 8)
        if optimizer.loss_scale is not None:
            total = total * optimizer.loss_scale
        total.backward()
        stats.report("Loss/grad_norm", optimizer.step(1e-4))
        ema.update(ema_beta(cur_nimg, 8, 500, 0.05), optimizer.skipped)
        stats.report("Loss/loss", loss)

    return step, network, optimizer


def make_feature_step(device, dtype):
    """The same of a model of features, on latents of two sizes."""
    config = get_preset("nanodit-tiny").run
    model = dataclasses.replace(config.model, text_dim=32, visual_dim=32)
    statistics = FeatureStatistics(*(torch.full([n], 0.5) for n in (16, 16, 32, 32, 32, 32)))
    statistics = FeatureStatistics(
        **{f.name: getattr(statistics, f.name).to(device) for f in dataclasses.fields(statistics)}
    )
    torch.manual_seed(0)
    network = build_network(model).train().to(device, memory_format=torch.channels_last)
    objective = FeatureObjective(
        network,
        make_precond(config.precond),
        codec=FeatureCodec(statistics, None),
        autocast_dtype=dtype,
        config=dataclasses.replace(config.features, patch_bias_kimg=1.0),
    )
    optimizer = GuardedAdam(Parameters(network), dynamic_scale=dtype == torch.float16)
    ema, stats = EMA(Parameters(network)), StatsCollector()

    def step(cur_nimg, factor=1.0):
        width, height = ((128, 128), (160, 96))[cur_nimg // 8 % 2]
        shape = model.latent_shape(width, height)
        rows, columns = model.patch_grid(width, height)
        half = {
            "text": torch.randn(8, 16, 32),
            "cls": torch.randn(8, 32),
            "patches": torch.randn(8, rows * columns, 32),
        }
        cond = {name: value.half().pin_memory() for name, value in half.items()}
        cond["text_mask"] = torch.ones(8, 16, dtype=torch.bool).pin_memory()
        cond["size"] = torch.tensor([width, height])
        data = torch.randn(8, *shape).half().pin_memory()
        optimizer.zero_grad()
        draws = objective.draw(rng.Step(0, cur_nimg, 8, shape, device))
        x, cond = objective.prepare(data, cond, draws, device)
        loss = objective(x, cond, draws)
        total = loss.sum() * (factor / 8)
        if optimizer.loss_scale is not None:
            total = total * optimizer.loss_scale
        total.backward()
        stats.report("Loss/grad_norm", optimizer.step(1e-4))
        ema.update(ema_beta(cur_nimg, 8, 500, 0.05), optimizer.skipped)
        objective.report(stats, loss, draws)

    return step, network, optimizer


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("preset", ["cifar10", "imagenet256-s", "nanodit-tiny"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_a_step_never_waits_for_the_device(dtype, preset):
    step, _, _ = make_step(torch.device("cuda"), dtype, preset)
    for cur_nimg in (0, 8, 16):
        step(cur_nimg)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(24)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@needs_gpu
def test_a_bad_gradient_on_a_gpu_changes_no_weight():
    step, network, optimizer = make_step(torch.device("cuda"), None)
    step(0)
    before = copy.deepcopy(network.state_dict())
    step(8, factor=float("nan"))
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
    assert optimizer.read_counters() == (1, 1)


@pytest.mark.compiled
@pytest.mark.parametrize("preset", ["digits", "digits-latent"])
def test_a_compiled_network_computes_the_same(preset):
    config = get_preset(preset).run.model
    network = build_network(config).eval()
    context = network.context({"label": torch.tensor([1, 2])})
    x, c_noise = torch.randn(2, *config.input_shape), torch.zeros(2)
    expected = network(x, c_noise, context)
    network.backbone.compile()
    torch.testing.assert_close(network(x, c_noise, context), expected, rtol=1e-4, atol=1e-5)
