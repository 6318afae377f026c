"""Latent DiffiT: published sizes, the function its weights define, and their import."""

import dataclasses
import math

import pytest
import torch
from helpers import fail, succeed
from latent_files import tiny_autoencoder
from safetensors.torch import save_file

import generate
import import_weights
from configs import get_diffit_config, get_preset
from models import build_network
from models.architectures.latent_diffit import LatentDiffiTConfig
from models.context import Context
from models.layers import position_embedding
from models.published.latent_diffit import LAYOUT
from models.published.layout import network_of_published, published_shapes
from torch_utils.misc import count_flops, count_parameters
from torch_utils.pictures import read_image
from training.checkpoint import load_snapshot

TINY = LatentDiffiTConfig(
    resolution=64,
    num_classes=5,
    learned_variance=True,
    latent_scale=0.18215,
    num_blocks=3,
    hidden_dim=24,
    num_heads=2,
    base_dim=6,
)


def on_meta(config):
    with torch.device("meta"):
        return build_network(config)


def published_weights(config, seed=0, with_indices=True):
    """Random weights under the published names, with the constants that they come with."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in published_shapes(LAYOUT, config).items():
        tensors[name] = torch.randn(shape, generator=generator) * 0.3
    # By hand, from the description alone: columns first, sine then cosine.
    grid, quarter = config.grid, config.hidden_dim // 4
    rows = []
    for y in range(grid):
        for x in range(grid):
            row = []
            for position in (x, y):
                angles = [position / 10_000 ** (i / quarter) for i in range(quarter)]
                row += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            rows.append(row)
    tensors["pos_embed"] = torch.tensor([rows])
    for name in list(tensors):
        if name.endswith("relative_position_index"):
            if not with_indices:
                del tensors[name]
                continue
            index = torch.empty(grid**2, grid**2, dtype=torch.int64)
            for query in range(grid**2):
                for key in range(grid**2):
                    dy = query // grid - key // grid + grid - 1
                    dx = query % grid - key % grid + grid - 1
                    index[query, key] = dy * (2 * grid - 1) + dx
            tensors[name] = index
    return tensors


def plain_forward(tensors, config, x, timestep, label):
    """The network from its published tensors, with the plainest operations, an image at a time."""
    grid, heads, patch = config.grid, config.num_heads, config.patch_size

    def linear(name, value):
        return value @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    def norm(value):
        centred = value - value.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def gelu(v):
        return 0.5 * v * (1 + torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))

    outputs = []
    for image, t, y in zip(x, timestep.tolist(), label.tolist(), strict=True):
        half = config.base_dim
        angles = [t / 10_000 ** (i / half) for i in range(half)]
        sinusoids = torch.tensor([*map(math.cos, angles), *map(math.sin, angles)])
        hidden = linear("t_embedder.mlp.0", sinusoids)
        c = linear("t_embedder.mlp.2", hidden * hidden.sigmoid())
        c = c + tensors["y_embedder.embedding_table.weight"][y]

        kernel = tensors["x_embedder.proj.weight"].flatten(1)
        tokens = []
        for row in range(grid):
            for column in range(grid):
                top, left = row * patch, column * patch
                cut = image[:, top : top + patch, left : left + patch].flatten()
                tokens.append(kernel @ cut + tensors["x_embedder.proj.bias"])
        tokens = torch.stack(tokens) + tensors["pos_embed"][0]

        for block in range(config.num_blocks):
            name = f"blocks.{block}"
            qkv = linear(f"{name}.attn.qkv", norm(tokens)) + linear(f"{name}.attn.qkv_temb", c)
            merged = []
            table = tensors[f"{name}.attn.relative_position_bias_table"]
            index = torch.arange(grid**2)
            dy = index[:, None] // grid - index // grid + grid - 1
            dx = index[:, None] % grid - index % grid + grid - 1
            width = config.hidden_dim // heads
            for head in range(heads):
                q, k, v = (
                    qkv[:, part * config.hidden_dim + head * width :][:, :width]
                    for part in range(3)
                )
                scores = q @ k.T / math.sqrt(width) + table[dy * (2 * grid - 1) + dx, head]
                merged.append(scores.softmax(-1) @ v)
            tokens = tokens + linear(f"{name}.attn.proj", torch.cat(merged, 1))
            tokens = tokens + linear(
                f"{name}.mlp.fc2", gelu(linear(f"{name}.mlp.fc1", norm(tokens)))
            )

        last = norm(tokens)
        last = linear("final_layer.linear", last * last.sigmoid())
        output = torch.empty(config.out_channels, grid * patch, grid * patch)
        for place, values in enumerate(last):
            top, left = place // grid * patch, place % grid * patch
            square = values.reshape(patch, patch, config.out_channels)
            output[:, top : top + patch, left : left + patch] = square.permute(2, 0, 1)
        outputs.append(output)
    return torch.stack(outputs)


def assert_same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


@pytest.mark.parametrize(
    ("name", "with_positions", "trainable"),
    [
        ("imagenet256", 561_330_144, 561_035_232),
        ("imagenet512", 563_562_464, 562_382_816),
        ("imagenet256-d30", 601_201_664, 600_906_752),
        ("imagenet512-d30", 603_530_240, 602_350_592),
    ],
)
def test_presets_have_the_published_sizes(name, with_positions, trainable):
    network = on_meta(get_diffit_config(name))
    assert count_parameters(network) == trainable
    assert trainable + network.backbone.position_embedding.numel() == with_positions


def test_the_published_layout_has_346_tensors_at_depth_28():
    config = get_diffit_config("imagenet256")
    shapes = published_shapes(LAYOUT, config)
    assert len(shapes) == 346
    indices = [name for name in shapes if name.endswith("relative_position_index")]
    assert len(indices) == 28
    total = sum(math.prod(shape) for name, shape in shapes.items() if name not in indices)
    assert total == 561_330_144
    assert shapes["pos_embed"] == (1, 256, 1152)
    assert shapes["blocks.27.attn.relative_position_bias_table"] == (961, 16)
    assert shapes["blocks.0.attn.qkv_temb.weight"] == (3456, 1152)
    assert shapes["y_embedder.embedding_table.weight"] == (1001, 1152)
    assert shapes["x_embedder.proj.weight"] == (1152, 4, 2, 2)
    assert shapes["t_embedder.mlp.0.weight"] == (1152, 256)
    assert shapes["blocks.3.mlp.fc1.bias"] == (4608,)
    assert shapes["final_layer.linear.weight"] == (32, 1152)
    large = published_shapes(LAYOUT, get_diffit_config("imagenet512"))
    assert large["blocks.0.attn.relative_position_bias_table"] == (3969, 16)


def test_a_forward_pass_costs_what_the_paper_counts():
    config = get_diffit_config("imagenet256")
    network = on_meta(config)
    x = torch.empty(1, *config.input_shape, device="meta")
    t, label = torch.zeros(1, device="meta"), torch.zeros(1, dtype=torch.int64, device="meta")
    flops = count_flops(lambda: network(x, t, network.context({"label": label})))
    attention = 28 * 2 * 256**2 * 1152  # Scores and weighted sums; the paper leaves them out.
    assert round(flops / 2e9, 1) == 118.5
    assert round((flops / 2 - attention) / 1e9, 2) == 114.28


@pytest.mark.parametrize(
    ("name", "depth", "width", "heads"),
    [
        ("imagenet256-s", 12, 384, 6),
        ("imagenet256-b", 12, 768, 12),
        ("imagenet256-l", 24, 1024, 16),
        ("imagenet256", 28, 1152, 16),
    ],
)
def test_smaller_relatives_have_dit_s_widths(name, depth, width, heads):
    config = get_diffit_config(name)
    assert (config.num_blocks, config.hidden_dim, config.num_heads) == (depth, width, heads)
    assert (config.patch_size, config.grid) == (2, 16)


@pytest.mark.parametrize("with_indices", [True, False])
def test_published_weights_compute_the_described_function(with_indices):
    tensors = published_weights(TINY, with_indices=with_indices)
    network = network_of_published(LAYOUT, tensors, TINY).eval()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 4, 8, 8, generator=generator)
    timestep, label = torch.tensor([0.0, 17.0, 999.0]), torch.tensor([0, 4, 2])
    with torch.no_grad():
        own = network(x, timestep, network.context({"label": label}))
        dropped = network(x, timestep, network.context({"label": label}, torch.ones(3).bool()))
    assert_same(own, plain_forward(tensors, TINY, x, timestep, label))
    null = torch.full([3], 5)
    assert_same(dropped, plain_forward(tensors, TINY, x, timestep, null))


def test_the_first_estimate_is_nothing_and_the_first_gradient_reaches_the_head():
    network = build_network(TINY)
    out = network(
        torch.randn(2, 4, 8, 8), torch.ones(2), network.context({"label": torch.ones(2).long()})
    )
    assert out.shape == (2, 8, 8, 8)
    assert out.abs().max() == 0
    out.sum().backward()
    assert network.backbone.head.weight.grad.abs().max() > 0


def test_checkpointing_computes_blocks_again_and_changes_no_gradient():
    calls = []

    def gradients(checkpointing):
        torch.manual_seed(0)
        network = build_network(dataclasses.replace(TINY, checkpointing=checkpointing)).train()
        torch.nn.init.normal_(network.backbone.head.weight, std=0.1)
        for block in network.backbone.blocks:
            block.register_forward_pre_hook(lambda *_: calls.append(checkpointing))
        label = torch.tensor([1, 3])
        out = network(torch.ones(2, 4, 8, 8), torch.ones(2), network.context({"label": label}))
        out.square().sum().backward()
        return [parameter.grad for parameter in network.parameters()]

    torch.testing.assert_close(gradients(False), gradients(True), rtol=0, atol=0)
    assert (calls.count(False), calls.count(True)) == (3, 6)


def test_an_unconditional_model_runs_without_labels():
    network = build_network(dataclasses.replace(TINY, num_classes=0, learned_variance=False))
    assert network.context({}, num=2) == Context()
    assert network(torch.randn(2, 4, 8, 8), torch.ones(2), network.context({})).shape[1] == 4


def test_position_sinusoids_tell_the_column_first():
    embedding = position_embedding(8, 3)
    assert torch.equal(embedding[0, 2, :4], embedding[1, 2, :4])
    assert torch.equal(embedding[2, 0, 4:], embedding[2, 1, 4:])
    assert torch.equal(embedding[1, 2, :4], embedding[2, 1, 4:])
    assert embedding[0, 2, 0].item() == pytest.approx(math.sin(2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(resolution=60), r"--resolution: got 60, .* multiple of --latent-downsampling 8"),
        (dict(patch_size=3), r"--patch-size: got 3, .* 8x8 latents of 64x64 images"),
        (dict(hidden_dim=26), r"--hidden-dim: got 26; accepted: a multiple of 4"),
        (dict(num_heads=5), r"--num-heads: got 5, which does not divide --hidden-dim 24"),
    ],
)
def test_impossible_sizes_get_a_sentence(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


def test_latents_of_another_size_get_a_sentence():
    network = build_network(TINY)
    with pytest.raises(ValueError, match=r"denoises latents of 4x8x8, not 4x16x16"):
        network(torch.zeros(1, 4, 16, 16), torch.ones(1), Context())


@pytest.fixture
def tiny_preset(monkeypatch):
    """The 256 preset with a model small enough to write."""
    preset = get_preset("imagenet256")
    run = dataclasses.replace(preset.run, model=TINY)
    tiny = dataclasses.replace(preset, run=run, num_classes=TINY.num_classes)
    monkeypatch.setitem(import_weights.PRESETS, "imagenet256", tiny)


def test_import_writes_a_snapshot_with_the_published_protocol(tmp_path, tiny_preset):
    tensors = published_weights(TINY)
    save_file(tensors, tmp_path / "diffit_256.safetensors")
    out = tmp_path / "network.pkl"
    arguments = [tmp_path / "diffit_256.safetensors", "--preset=imagenet256", f"--out={out}"]
    succeed(import_weights, *arguments)
    snapshot = load_snapshot(out)
    network = snapshot.build()
    x, t, label = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 500.0]), torch.tensor([1, 2])
    with torch.no_grad():
        own = network(x, t, network.context({"label": label}))
    assert_same(own, plain_forward(tensors, TINY, x, t, label))
    guidance, sampling = snapshot.config.guidance, snapshot.config.sampling
    assert (guidance.cfg_scale, guidance.cfg_schedule) == (4.4, "power-cosine")
    assert (guidance.cfg_power, guidance.cfg_channels) == (4.0, 3)
    assert (sampling.sampler, sampling.grid, sampling.steps) == ("ddpm", "timesteps", 250)
    assert snapshot.config.model.vae == "stabilityai/sd-vae-ft-ema"
    assert snapshot.config.model.latent_scale == 0.18215
    # And samples, decoded by the autoencoder that is named.
    vae = tiny_autoencoder(tmp_path / "vae", num_stages=4, scaling_factor=0.18215)
    outdir = tmp_path / "out"
    options = (f"--vae={vae}", "--seeds=0", "--class=3", "--steps=2")
    succeed(generate, f"--network={out}", f"--outdir={outdir}", *options)
    assert read_image(outdir / "000000.png").shape == (3, 64, 64)
    other = tiny_autoencoder(tmp_path / "other", num_stages=4, scaling_factor=0.5)
    options = (f"--vae={other}", f"--outdir={tmp_path / 'other-out'}")
    message = fail(generate, f"--network={out}", *options)
    assert "has scale 0.5, but the model has 0.18215" in message


def test_a_wrong_file_gets_every_name(tmp_path, tiny_preset):
    tensors = published_weights(TINY)
    del tensors["blocks.1.mlp.fc1.bias"]
    tensors["ema_decay"] = torch.ones(1)
    tensors["pos_embed"] = tensors["pos_embed"][:, 1:].contiguous()
    path = tmp_path / "wrong.safetensors"
    save_file(tensors, path)
    message = fail(
        import_weights, path, "--preset=imagenet256", f"--out={tmp_path / 'network.pkl'}"
    )
    assert "1 missing: blocks.1.mlp.fc1.bias" in message
    assert "1 unexpected: ema_decay" in message
    assert "pos_embed [1, 15, 24] instead of [1, 16, 24]" in message
    assert not (tmp_path / "network.pkl").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pos_embed", "other values than the sinusoids"),
        ("blocks.2.attn.relative_position_index", "another order of relative positions"),
    ],
)
def test_constants_that_differ_are_refused(name, message):
    tensors = published_weights(TINY)
    tensors[name] = tensors[name].flip(1).contiguous()
    with pytest.raises(ValueError, match=message):
        network_of_published(LAYOUT, tensors, TINY)


def test_a_file_that_is_no_safetensors_gets_a_sentence(tmp_path, tiny_preset):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"not tensors")
    arguments = ["--preset=imagenet256", f"--out={tmp_path / 'network.pkl'}"]
    assert "damaged, or not a safetensors file" in fail(import_weights, path, *arguments)
    assert "no such file" in fail(import_weights, tmp_path / "none.safetensors", *arguments)
