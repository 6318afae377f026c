"""Weights of NanoDiT as its own code names them, against that code's maths."""

import dataclasses
import math
import random

import numpy as np
import pytest
import torch
from feature_files import tiny_features
from helpers import fail, succeed
from safetensors.torch import save_file

import generate
import import_weights
from data.features.dataset import FeatureDataset
from models.architectures.feature_dit import FeatureDiTConfig
from models.published.feature_dit import LAYOUT
from models.published.layout import network_of_published
from torch_utils.pictures import read_image
from training.checkpoint import load_snapshot

C, HEADS, PATCH = 24, 2, 2
TINY = FeatureDiTConfig(
    **dict(resolution=64, latent_channels=4, visual_patch_size=16, hidden_dim=C, num_heads=HEADS),
    **dict(num_blocks=2, mlp_ratio=2.0, text_dim=10, visual_dim=12),
)


def nanodit_shapes(latent_channels, text_dim, visual_dim):
    """Return the shapes of all tensors of the tiny model by their published names."""
    shapes = dict(
        null_dino=(1, visual_dim),
        null_dino_patch_token=(1, 1, visual_dim),
        null_text=(1, 1, text_dim),
    )

    def layer(name, *shape, bias=True):
        shapes[f"{name}.weight"] = shape
        if bias:
            shapes[f"{name}.bias"] = shape[:1]

    layer("x_embedder.proj", C, latent_channels, PATCH, PATCH)
    layer("t_embedder.mlp.0", C, 256)
    layer("t_embedder.mlp.2", C, C)
    layer("dino_proj", C, visual_dim)
    layer("dino_patch_proj", C, visual_dim)
    layer("text_proj", C, text_dim)
    for i in range(2):
        layer(f"blocks.{i}.attn.qkv", 3 * C, C, bias=False)
        layer(f"blocks.{i}.attn.proj", C, C, bias=False)
        layer(f"blocks.{i}.cross_attn.q", C, C, bias=False)
        layer(f"blocks.{i}.cross_attn.kv", 2 * C, C, bias=False)
        layer(f"blocks.{i}.cross_attn.proj", C, C, bias=False)
        layer(f"blocks.{i}.mlp.fc1", 2 * C, C, bias=False)
        layer(f"blocks.{i}.mlp.fc2", C, 2 * C, bias=False)
        layer(f"blocks.{i}.adaLN_modulation.1", 6 * C, C)
    layer("final_proj", PATCH**2 * latent_channels, C)
    layer("output_conv", latent_channels, latent_channels, 3, 3)
    return shapes


def nanodit_weights(latent_channels=4, text_dim=10, visual_dim=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = nanodit_shapes(latent_channels, text_dim, visual_dim)
    return {name: 0.15 * torch.randn(s, generator=generator) for name, s in shapes.items()}


class Plain:
    """The published computation, one image at a time, from the published tensors."""

    def __init__(self, tensors):
        self.w = {name: tensor.double() for name, tensor in tensors.items()}

    def linear(self, name, value):
        product = value @ self.w[f"{name}.weight"].T
        return product + self.w[f"{name}.bias"] if f"{name}.bias" in self.w else product

    @staticmethod
    def norm(value):
        centred = value - value.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    @staticmethod
    def gelu(v):
        return 0.5 * v * (1 + torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))

    @staticmethod
    def attend(q, k, v):
        merged, width = [], C // HEADS
        for head in range(HEADS):
            part = slice(head * width, (head + 1) * width)
            weights = (q[:, part] @ k[:, part].T / math.sqrt(width)).softmax(-1)
            merged.append(weights @ v[:, part])
        return torch.cat(merged, dim=1)

    def __call__(self, latents, t, text, cls, patches):
        """Return the velocity [c, h, w] of one image; ``text`` [L, T] holds valid tokens alone."""
        channels, height, width = latents.shape
        rows, columns = height // PATCH, width // PATCH
        angles = [1000 * t / 10_000 ** (i / 128) for i in range(128)]
        sinusoids = [*map(math.cos, angles), *map(math.sin, angles)]
        hidden = self.linear("t_embedder.mlp.0", torch.tensor(sinusoids, dtype=torch.float64))
        time = self.linear("t_embedder.mlp.2", hidden * hidden.sigmoid())
        c = self.linear("dino_proj", cls) + time  # Also a token, with the time in it.
        context = [self.linear("text_proj", text), c[None], self.linear("dino_patch_proj", patches)]
        context = torch.cat(context)

        tokens, quarter = [], C // 4
        for place in range(rows * columns):
            row, column = place // columns, place % columns
            cut = latents[:, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
            position = []
            for coordinate in (row, column):
                angles = [coordinate / 10_000 ** (i / quarter) for i in range(quarter)]
                position += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            token = self.w["x_embedder.proj.weight"].flatten(1) @ cut.flatten()
            position = torch.tensor(position, dtype=torch.float64)
            tokens.append(token + self.w["x_embedder.proj.bias"] + position)
        x = torch.stack(tokens)
        for i in range(2):
            block = f"blocks.{i}"
            parts = self.linear(f"{block}.adaLN_modulation.1", c * c.sigmoid()).chunk(6)
            shift, scale, shift_cross, scale_cross, shift_mlp, scale_mlp = parts
            q, k, v = self.linear(f"{block}.attn.qkv", self.norm(x) * (1 + scale) + shift).chunk(
                3, 1
            )
            x = x + self.linear(f"{block}.attn.proj", self.attend(q, k, v))
            y = self.norm(x) * (1 + scale_cross) + shift_cross
            q, (k, v) = (
                self.linear(f"{block}.cross_attn.q", y),
                self.linear(f"{block}.cross_attn.kv", context).chunk(2, 1),
            )
            x = x + self.linear(f"{block}.cross_attn.proj", self.attend(q, k, v))
            y = self.linear(f"{block}.mlp.fc1", self.norm(x) * (1 + scale_mlp) + shift_mlp)
            x = x + self.linear(f"{block}.mlp.fc2", self.gelu(y))
        x = self.linear("final_proj", self.norm(x))
        out = torch.empty(channels, height, width, dtype=torch.float64)
        for place, values in enumerate(x):
            top, left = place // columns * PATCH, place % columns * PATCH
            square = values.reshape(PATCH, PATCH, channels).permute(2, 0, 1)
            out[:, top : top + PATCH, left : left + PATCH] = square
        kernel, bias = self.w["output_conv.weight"], self.w["output_conv.bias"]
        return out + torch.nn.functional.conv2d(out[None], kernel, bias, padding=1)[0]


def conditions(rows, columns, text_dim=10, visual_dim=12):
    generator = torch.Generator().manual_seed(3)
    text = torch.randn(2, 5, text_dim, generator=generator)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    cls = torch.randn(2, visual_dim, generator=generator)
    patches = torch.randn(2, rows * columns, visual_dim, generator=generator)
    return dict(text=text, text_mask=mask, cls=cls, patches=patches)


def difference(network, plain, latents, t, cond):
    """Return by how much two computations differ, relative to the largest value."""
    with torch.no_grad():
        own = network(latents, t, network.context(cond)).double()
    expected = []
    for row in range(len(latents)):
        text = cond["text"][row][cond["text_mask"][row]]
        given = (text, cond["cls"][row], cond["patches"][row])
        expected.append(plain(latents[row].double(), t[row].item(), *(g.double() for g in given)))
    expected = torch.stack(expected)
    return (own - expected).abs().max() / expected.abs().max()


def test_published_weights_compute_the_published_function():
    tensors = nanodit_weights()
    config = dataclasses.replace(TINY, **LAYOUT.settings({}))
    network = network_of_published(LAYOUT, tensors, config).eval()
    latents = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0.125, 0.75])
    cond = dict(conditions(3, 4), size=torch.tensor([64, 48]))
    assert difference(network, Plain(tensors), latents, t, cond) < 1e-5


# From a file to images.

OPTIONS = ("--preset=nanodit", f"--hidden-dim={C}", "--num-blocks=2", f"--num-heads={HEADS}")
OPTIONS = (*OPTIONS, "--mlp-ratio=2")


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    return tiny_features(tmp_path_factory.mktemp("import-features"))


def weights_for(features):
    record = FeatureDataset(features).record
    dims = (record.vae["channels"], record.text["dim"], record.visual["dim"])
    return nanodit_weights(*dims)


def test_an_imported_snapshot_samples_with_nanodit_s_normalisation(features, tmp_path):
    tensors = weights_for(features)
    averages = {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}
    state = dict(
        model={name: tensor + 1 for name, tensor in tensors.items()},
        ema=dict(ema_params=averages, decay=0.9999),
        optimizer=dict(state={0: dict(exp_avg=torch.ones(3))}),
        step=7000,
        loss=np.float64(0.5),
        # As its code writes it, so that a run can go on.
        rng_state=dict(
            python=random.getstate(),
            numpy=np.random.RandomState(0).get_state(),
            torch=torch.get_rng_state(),
        ),
    )
    torch.save(state, tmp_path / "checkpoint.pt")
    out = tmp_path / "network.pkl"
    words = (*OPTIONS, f"--data={features}", f"--out={out}")
    succeed(import_weights, tmp_path / "checkpoint.pt", *words)

    snapshot, data = load_snapshot(out), FeatureDataset(features)
    model = snapshot.config.model
    assert (model.cls_token_time, model.patch_pos, model.gates) == (True, False, False)
    assert model.buckets == tuple(bucket.name for bucket in data.buckets)
    stored = data.summary()["statistics"]["vae"]
    values = torch.cat([data.latents(i).flatten(1) for i in range(len(data))], dim=1).double()
    known = {n: (s["mean"], s["std"]) for n, s in snapshot.data.features["statistics"].items()}
    mean, std = values.mean().item(), values.std(unbiased=False).item()
    num = len(stored["mean"])
    assert known["vae"] == ([pytest.approx(mean)] * num, [pytest.approx(std)] * num)
    assert len(set(stored["mean"])) == len(set(stored["std"])) == num
    assert known["cls"] == known["patches"] == ([0.0] * model.visual_dim, [1.0] * model.visual_dim)
    assert (model.vae_hash, model.text_hash) == (data.record.vae["hash"], data.record.text["hash"])
    bucket = data.buckets[0]
    _, height, width = model.latent_shape(*bucket.size)
    shape = (2, data.record.vae["channels"], height, width)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    grid = model.patch_grid(*bucket.size)
    cond = dict(conditions(*grid, model.text_dim, model.visual_dim), size=torch.tensor(bucket.size))
    network, t = snapshot.build().eval(), torch.tensor([0.5, 0.875])
    assert difference(network, Plain(tensors), latents, t, cond) < 1e-5

    words = (f"--network={out}", f"--outdir={tmp_path / 'out'}", "--num=1", "--steps=2")
    succeed(generate, *words, f"--features={features}", f"--id={data.ids[0]}")
    (made,) = (tmp_path / "out").rglob("*.png")
    assert read_image(made).shape[0] == 3


@pytest.mark.parametrize(
    ("change", "options", "sentences"),
    [
        (lambda t: t.pop("dino_patch_proj.bias"), "", ["1 missing: dino_patch_proj.bias."]),
        (
            lambda t: t.update({f"adapter.pose_{i}": torch.ones(1) for i in range(6)}),
            "",
            ["6 unexpected: adapter.pose_0,", "adapter.pose_4 and 1 more"],
        ),
        (lambda t: None, "--num-blocks=3", ["9 missing: blocks.2.attn.qkv.weight, "]),
        (
            lambda t: None,
            "--gates",
            ["--gates: got True, but the weights are of a model with False"],
        ),
        (lambda t: None, "--patch-pos", ["--patch-pos: got True"]),
    ],
)
def test_weights_of_another_model_get_a_sentence(features, tmp_path, change, options, sentences):
    tensors = weights_for(features)
    change(tensors)
    save_file(tensors, tmp_path / "nanodit.safetensors")
    words = (*OPTIONS, f"--data={features}", f"--out={tmp_path / 'network.pkl'}", *options.split())
    message = fail(import_weights, tmp_path / "nanodit.safetensors", *words)
    assert all(sentence in message for sentence in sentences), message
    assert not (tmp_path / "network.pkl").exists()


def test_a_file_with_anything_but_plain_data_is_refused(features, tmp_path):
    words = (*OPTIONS, f"--data={features}", f"--out={tmp_path / 'network.pkl'}")
    torch.save(dict(model=weights_for(features), config=TINY), tmp_path / "code.pt")
    message = fail(import_weights, tmp_path / "code.pt", *words)
    assert "refused, because reading it would execute code" in message
    torch.save(dict(step=3), tmp_path / "empty.pt")
    assert "holds no names with tensors" in fail(import_weights, tmp_path / "empty.pt", *words)


def test_sizes_and_statistics_are_needed(features, tmp_path):
    save_file(weights_for(features), tmp_path / "nanodit.safetensors")
    out = f"--out={tmp_path / 'network.pkl'}"
    message = fail(import_weights, tmp_path / "nanodit.safetensors", *OPTIONS, out)
    assert "--data is missing: weights of NanoDiT contain neither sizes nor statistics" in message
