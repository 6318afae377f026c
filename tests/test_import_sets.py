"""Weights of few-shot diffusion models as their JAX code names them, against that code's maths."""

import dataclasses
import math

import pytest
import torch
from helpers import fail, succeed
from PIL import Image
from safetensors.torch import save_file

import generate
import import_weights
import train
from configs import get_preset
from models.architectures.set_dit import SetDiTConfig
from models.published.layout import network_of_published
from models.published.set_dit import LAYOUT
from torch_utils.pictures import read_image
from training.checkpoint import load_snapshot

H, HEADS, C, E_HEADS, E_HEAD, N = 24, 2, 16, 3, 5, 4  # Widths, heads, and images in a set.
SIZE, PATCH = 8, 2
GRID = SIZE // PATCH
TINY = SetDiTConfig(
    **dict(resolution=SIZE, patch_size=PATCH, sample_size=N, hidden_dim=H, num_heads=HEADS),
    **dict(num_blocks=2, mlp_ratio=2.0, hdim=C, encoder_depth=2, encoder_heads=E_HEADS),
    **dict(encoder_dim_head=E_HEAD, encoder_mlp_ratio=1.5),
)


def flax_shapes(kind="film", *, tokenizer="stack", context_scale=True, variational=False):
    """Return the shapes of all tensors of the tiny model by their names in the JAX code."""
    shapes = {}

    def dense(name, inner, outer, bias=True):
        shapes[f"{name}.kernel"] = (inner, outer)
        if bias:
            shapes[f"{name}.bias"] = (outer,)

    def norm(name, dim):
        shapes[f"{name}.scale"] = shapes[f"{name}.bias"] = (dim,)

    def attention(name):
        for part in ("query", "key", "value"):
            shapes[f"{name}.{part}.kernel"] = (H, HEADS, H // HEADS)
            shapes[f"{name}.{part}.bias"] = (HEADS, H // HEADS)
        shapes[f"{name}.out.kernel"], shapes[f"{name}.out.bias"] = (HEADS, H // HEADS, H), (H,)

    encoder, patch_dim = "encoder.params", PATCH**2 * 3 * (N if tokenizer == "stack" else 1)
    shapes[f"{encoder}.cls_token"] = (1, 1, C)
    shapes[f"{encoder}.pos_embedding"] = (1, GRID**2 + 2, C)
    norm(f"{encoder}.to_patch_embedding.norm", patch_dim)
    dense(f"{encoder}.to_patch_embedding.proj", patch_dim, C)
    dense(f"{encoder}.to_time_embedding", C, C)
    for i in range(2):
        layer = f"{encoder}.transformer.layer_{i}"
        norm(f"{layer}.LayerNorm_0", C)
        norm(f"{layer}.LayerNorm_1", C)
        dense(f"{layer}.LSA_0.Dense_0", C, 3 * E_HEADS * E_HEAD, bias=False)
        dense(f"{layer}.LSA_0.Dense_1", E_HEADS * E_HEAD, C)
        shapes[f"{layer}.LSA_0.temperature"] = ()
        dense(f"{layer}.FeedForward_0.Dense_0", C, 24)
        dense(f"{layer}.FeedForward_0.Dense_1", 24, C)
    norm(f"{encoder}.mlp_norm", C)
    dense(f"{encoder}.mlp_dense", C, C)
    dense("time_embed.params.Dense_0", C // 4, C)
    dense("time_embed.params.Dense_1", C, C)
    if variational:
        dense("posterior.params.Dense_0", C, C)
        dense("posterior.params.Dense_1", C, 2 * C)

    dit = "dit.params"
    shapes[f"{dit}.pos_embed"] = (1, GRID**2, H)
    shapes[f"{dit}.PatchEmbed_0.Conv_0.kernel"] = (PATCH, PATCH, 3, H)
    shapes[f"{dit}.PatchEmbed_0.Conv_0.bias"] = (H,)
    dense(f"{dit}.TimestepEmbedder_0.Dense_0", 256, H)
    dense(f"{dit}.TimestepEmbedder_0.Dense_1", H, H)
    if kind == "film":
        dense(f"{dit}.Dense_0", C, H)
    for i in range(2):
        block = f"{dit}.DiTBlock_{i}"
        if kind == "film" and context_scale:
            shapes[f"{block}.context_scale"] = (H,)
        dense(f"{block}.Dense_0", H, 6 * H)
        attention(f"{block}.MultiHeadDotProductAttention_0")
        if kind == "lag":
            dense(f"{block}.Dense_1", C, H)
            attention(f"{block}.MultiHeadDotProductAttention_1")
        dense(f"{block}.MlpBlock_0.Dense_0", H, 2 * H)
        dense(f"{block}.MlpBlock_0.Dense_1", 2 * H, H)
    dense(f"{dit}.FinalLayer_0.Dense_0", H, 2 * H)
    dense(f"{dit}.FinalLayer_0.Dense_1", H, PATCH**2 * 3)
    return shapes


def flax_weights(*args, seed=0, **settings):
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in flax_shapes(*args, **settings).items():
        tensors[name] = torch.randn(shape, generator=generator) * 0.2
    # Columns first, sine then cosine, by hand.
    rows, quarter = [], H // 4
    for place in range(GRID**2):
        row = []
        for position in (place % GRID, place // GRID):
            angles = [position / 10_000 ** (i / quarter) for i in range(quarter)]
            row += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        rows.append(row)
    tensors["dit.params.pos_embed"] = torch.tensor([rows])
    return tensors


class Plain:
    """The published computation, one image at a time, from the published tensors."""

    def __init__(self, tensors, kind, tokenizer, pool):
        self.w = {name.replace(".params.", "."): t.double() for name, t in tensors.items()}
        self.kind, self.tokenizer, self.pool = kind, tokenizer, pool

    def dense(self, name, value):
        product = value @ self.w[f"{name}.kernel"]
        return product + self.w[f"{name}.bias"] if f"{name}.bias" in self.w else product

    def norm(self, value, name=None):
        centred = value - value.mean(-1, keepdim=True)
        value = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        if name is None:
            return value
        return value * self.w[f"{name}.scale"] + self.w[f"{name}.bias"]

    def sinusoids(self, t, dim):
        angles = [t / 10_000 ** (i / (dim // 2)) for i in range(dim // 2)]
        return torch.tensor([*map(math.cos, angles), *map(math.sin, angles)], dtype=torch.float64)

    @staticmethod
    def gelu(v):
        return 0.5 * v * (1 + torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))

    @staticmethod
    def silu(v):
        return v * v.sigmoid()

    def encode(self, images, t):
        """Return the vector [C] and the tokens [P, C] of a set of images [k, 3, S, S]."""
        blank = torch.zeros(N - len(images), *images.shape[1:], dtype=torch.float64)
        images, embedding = torch.cat([images, blank]), "encoder.to_patch_embedding"
        patches = []
        for place in range(GRID**2):
            top, left = place // GRID * PATCH, place % GRID * PATCH
            patches.append(images[:, :, top : top + PATCH, left : left + PATCH])
        patches = torch.stack(patches)  # [P, k, c, p, q]
        if self.tokenizer == "stack":
            patches = patches.permute(0, 3, 4, 2, 1).flatten(1)
        else:
            patches = patches.permute(1, 0, 3, 4, 2).flatten(2)
        tokens = self.dense(f"{embedding}.proj", self.norm(patches, f"{embedding}.norm"))
        if self.tokenizer != "stack":
            tokens = tokens.mean(0)
        hidden = self.silu(self.dense("time_embed.Dense_0", self.sinusoids(t, C // 4)))
        time = self.dense("time_embed.Dense_1", hidden)
        time = self.dense("encoder.to_time_embedding", time)
        x = torch.cat([self.w["encoder.cls_token"][0], time[None], tokens])
        x = x + self.w["encoder.pos_embedding"][0]
        for i in range(2):
            layer = f"encoder.transformer.layer_{i}"
            qkv = self.dense(f"{layer}.LSA_0.Dense_0", self.norm(x, f"{layer}.LayerNorm_0"))
            merged = []
            for head in range(E_HEADS):
                q, k, v = (
                    part[:, head * E_HEAD : (head + 1) * E_HEAD] for part in qkv.chunk(3, dim=1)
                )
                scores = q @ k.T * self.w[f"{layer}.LSA_0.temperature"].exp()
                scores.fill_diagonal_(-torch.inf)
                merged.append(scores.softmax(-1) @ v)
            x = x + self.dense(f"{layer}.LSA_0.Dense_1", torch.cat(merged, dim=1))
            inner = self.dense(
                f"{layer}.FeedForward_0.Dense_0", self.norm(x, f"{layer}.LayerNorm_1")
            )
            x = x + self.dense(f"{layer}.FeedForward_0.Dense_1", self.gelu(inner))
        vector = {"cls": x[0], "mean": x.mean(0)}[self.pool]
        vector = self.dense("encoder.mlp_dense", self.norm(vector, "encoder.mlp_norm"))
        if "posterior.Dense_0.kernel" in self.w:
            vector = self.dense(
                "posterior.Dense_1", self.silu(self.dense("posterior.Dense_0", vector))
            )
            vector = vector[:C]
        return vector, x[2:]

    def attend(self, name, x, context):
        merged = torch.zeros(len(x), H, dtype=torch.float64) + self.w[f"{name}.out.bias"]
        for head in range(HEADS):
            q, k, v = (
                value @ self.w[f"{name}.{part}.kernel"][:, head]
                + self.w[f"{name}.{part}.bias"][head]
                for part, value in (("query", x), ("key", context), ("value", context))
            )
            weights = (q @ k.T / math.sqrt(H // HEADS)).softmax(-1)
            merged = merged + weights @ v @ self.w[f"{name}.out.kernel"][head]
        return merged

    def __call__(self, x, t, images):
        """Return F [N, 3, S, S] of noisy images, timesteps and sets, all in float64."""
        return torch.stack([self.one(*row) for row in zip(x, t.tolist(), images, strict=True)])

    def one(self, image, t, images):
        vector, context = self.encode(images, t)
        e = self.silu(self.dense("dit.TimestepEmbedder_0.Dense_0", self.sinusoids(t, 256)))
        u = self.dense("dit.TimestepEmbedder_0.Dense_1", e)
        if self.kind == "film":
            u = u + self.dense("dit.Dense_0", vector)
        tokens = []
        for place in range(GRID**2):
            top, left = place // GRID * PATCH, place % GRID * PATCH
            cut = image[:, top : top + PATCH, left : left + PATCH].permute(1, 2, 0)
            kernel = self.w["dit.PatchEmbed_0.Conv_0.kernel"]
            tokens.append((cut[..., None] * kernel).sum((0, 1, 2)))
        x = (
            torch.stack(tokens)
            + self.w["dit.PatchEmbed_0.Conv_0.bias"]
            + self.w["dit.pos_embed"][0]
        )
        for i in range(2):
            block = f"dit.DiTBlock_{i}"
            c = u
            if f"{block}.context_scale" in self.w:
                c = self.norm(u) * self.w[f"{block}.context_scale"]
            parts = self.dense(f"{block}.Dense_0", self.silu(c)).chunk(6)
            shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = parts
            y = self.norm(x) * (1 + scale) + shift
            x = x + gate * self.attend(f"{block}.MultiHeadDotProductAttention_0", y, y)
            if self.kind == "lag":
                y = self.dense(f"{block}.Dense_1", context)
                x = x + self.attend(f"{block}.MultiHeadDotProductAttention_1", self.norm(x), y)
            y = self.dense(
                f"{block}.MlpBlock_0.Dense_0", self.norm(x) * (1 + scale_mlp) + shift_mlp
            )
            x = x + gate_mlp * self.dense(f"{block}.MlpBlock_0.Dense_1", self.gelu(y))
        shift, scale = self.dense("dit.FinalLayer_0.Dense_0", self.silu(u)).chunk(2)
        x = self.dense("dit.FinalLayer_0.Dense_1", self.norm(x) * (1 + scale) + shift)
        output = torch.empty(3, SIZE, SIZE, dtype=torch.float64)
        for place, values in enumerate(x):
            top, left = place // GRID * PATCH, place % GRID * PATCH
            square = values.reshape(PATCH, PATCH, 3).permute(2, 0, 1)
            output[:, top : top + PATCH, left : left + PATCH] = square
        return output


FORMS = {
    "film": dict(),
    "film without norms": dict(context_scale=False),
    "film, mean of all": dict(tokenizer="per_sample_mean", pool="mean"),
    "film, drawn": dict(variational=True),
    "lag": dict(kind="lag", pool="mean"),
    "lag, per sample mean": dict(kind="lag", tokenizer="per_sample_mean", variational=True),
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
OUR_POOL = {"cls": "cls", "mean": "mean-all"}


def imported(kind="film", tokenizer="stack", pool="cls", **settings):
    """Return the network of random published weights, and their plain computation."""
    tensors = flax_weights(kind, tokenizer=tokenizer, **settings)
    renamed = {LAYOUT.rename(name): tensor for name, tensor in tensors.items()}
    found = LAYOUT.settings({name: tuple(tensor.shape) for name, tensor in renamed.items()})
    assert found["mode_conditioning"] == kind
    own = dict(encoder_tokenizer=tokenizer, encoder_pool=OUR_POOL[pool])
    config = dataclasses.replace(TINY, **own, **found)
    return network_of_published(LAYOUT, renamed, config).eval(), Plain(
        tensors, kind, tokenizer, pool
    )


def randn(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@every_form
def test_published_weights_compute_the_published_function(form):
    network, plain = imported(**form)
    x, t = randn(2, 3, SIZE, SIZE), torch.tensor([3.0, 217.0])
    for num in (N, 2):  # What is missing of a set is grey, as in training.
        support = randn(2, num, 3, SIZE, SIZE, seed=num)
        with torch.no_grad():
            own = network(x, t, network.context({"support": support}))
        expected = plain(x.double(), t, support.double())
        difference = (own.double() - expected).abs().max() / expected.abs().max()
        assert difference < 1e-5


@every_form
def test_the_image_left_out_in_training_leaves_a_grey_one(form):
    network, plain = imported(**form)
    sets, t = randn(1, N, 3, SIZE, SIZE), torch.tensor([40.0])
    with torch.no_grad():
        context = network.context({"set": sets, "c_noise": t})
        value = context.tokens if context.vector is None else context.vector
    for left_out in range(N):
        others = torch.cat([sets[0, :left_out], sets[0, left_out + 1 :]]).double()
        vector, tokens = plain.encode(others, 40.0)
        expected = (tokens if context.vector is None else vector).float()
        torch.testing.assert_close(value[left_out], expected, rtol=1e-4, atol=1e-4)


def test_sets_that_are_not_full_are_the_same_when_masked():
    network, _ = imported()
    support, t = randn(1, N, 3, SIZE, SIZE), torch.tensor([40.0])
    mask = torch.tensor([[True, True, False, False]])
    with torch.no_grad():
        masked = network.context({"support": support, "mask": mask, "c_noise": t})
        short = network.context({"support": support[:, :2], "c_noise": t})
        full = network.context({"support": support, "c_noise": t})
    torch.testing.assert_close(masked.vector, short.vector)
    assert (full.vector - short.vector).abs().max() > 1e-3


# From a file to images.

OPTIONS = (
    *("--preset=fsdm-depth6", f"--sample-size={N}", f"--hidden-dim={H}", f"--num-heads={HEADS}"),
    *("--num-blocks=2", "--mlp-ratio=2", f"--hdim={C}", "--encoder-depth=2", "--resolution=8"),
    *(f"--encoder-heads={E_HEADS}", f"--encoder-dim-head={E_HEAD}", "--encoder-mlp-ratio=1.5"),
)


def test_an_imported_snapshot_samples_from_a_support_as_the_preset_does(tmp_path):
    tensors = flax_weights()
    # Slashes and the name of the averages, as a flattened tree of a training state has them.
    names = {f"ema_params/{name.replace('.', '/')}": t for name, t in tensors.items()}
    names |= {f"params/{name.replace('.', '/')}": t + 1 for name, t in tensors.items()}
    names = {name.replace("/", ".", 1): t.contiguous() for name, t in names.items()}
    save_file(names, tmp_path / "fsdm.safetensors")
    out = tmp_path / "network.pkl"
    result = succeed(import_weights, tmp_path / "fsdm.safetensors", *OPTIONS, f"--out={out}")
    assert result.output.endswith("fsdm-depth6 with the weights of fsdm.safetensors.\n")
    snapshot = load_snapshot(out)
    model, sampling = snapshot.config.model, snapshot.config.sampling
    assert (model.like, model.encoder_time, model.use_context_layernorm) == ("fsdm-jax", True, True)
    assert (sampling.sampler, sampling.steps, sampling.variance) == ("ddpm", 250, "large")
    network, plain = snapshot.build().eval(), Plain(tensors, "film", "stack", "cls")
    x, t, support = randn(1, 3, SIZE, SIZE), torch.tensor([100.0]), randn(1, 3, 3, SIZE, SIZE)
    with torch.no_grad():
        own = network(x, t, network.context({"support": support}))
    expected = plain(x.double(), t, support.double()).float()
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)

    for index in range(N):
        pixels = (randn(SIZE, SIZE, 3, seed=index) * 60 + 128).clamp(0, 255).to(torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{index}.png")
    supports = [f"--support={tmp_path / f'{index}.png'}" for index in range(N)]
    words = (f"--network={out}", f"--outdir={tmp_path / 'out'}", "--num=2", "--respacing=ddim5")
    succeed(generate, *words, "--sampler=ddim", *supports)
    assert read_image(tmp_path / "out" / "000001.png").shape == (3, 8, 8)
    too_many = [*supports, supports[0]]
    assert "stacks at most 4" in fail(generate, *words, "--sampler=ddim", *too_many)


@pytest.mark.parametrize(
    ("change", "options", "sentences"),
    [
        (
            lambda t: t.pop("dit.params.DiTBlock_1.MlpBlock_0.Dense_0.bias"),
            "",
            ["1 missing: dit.DiTBlock_1.MlpBlock_0.Dense_0.bias."],
        ),
        (
            lambda t: t.update({f"dit.params.extra_{i}": torch.ones(1) for i in range(7)}),
            "",
            ["7 unexpected: dit.extra_0, dit.extra_1, dit.extra_2, dit.extra_3, dit.extra_4 and 2"],
        ),
        (
            lambda t: None,
            "--mlp-ratio=3",
            ["6 of another shape", "MlpBlock_0.Dense_0.kernel [24, 48] instead of [24, 72]"],
        ),
        (lambda t: None, "--use-context-layernorm=False", ["--use-context-layernorm: got False"]),
        (lambda t: None, "--mode-conditioning=lag", ["--mode-conditioning: got lag", "with film"]),
        (lambda t: None, "--data=images.zip", ["--data: got images.zip", "leave it out"]),
        (
            lambda t: t.update({"dit.params.DiTBlock_0.Dense_0.kernel": torch.ones(C, H)}),
            "",
            ["the later form of lag", "neither self-attention nor the noise level"],
        ),
        (
            lambda t: t["dit.params.pos_embed"].mul_(0.5),
            "",
            ["dit.pos_embed holds other values than the sinusoids"],
        ),
    ],
)
def test_weights_of_another_model_get_a_sentence(tmp_path, change, options, sentences):
    tensors = flax_weights()
    change(tensors)
    save_file(tensors, tmp_path / "fsdm.safetensors")
    words = (*OPTIONS, f"--out={tmp_path / 'network.pkl'}", *options.split())
    message = fail(import_weights, tmp_path / "fsdm.safetensors", *words)
    assert all(sentence in message for sentence in sentences), message
    assert not (tmp_path / "network.pkl").exists()


def test_weights_of_other_code_are_told_by_their_names(tmp_path):
    save_file(flax_weights(), tmp_path / "fsdm.safetensors")
    out = f"--out={tmp_path / 'network.pkl'}"
    message = fail(import_weights, tmp_path / "fsdm.safetensors", "--preset=imagenet256", out)
    assert "the names are those of few-shot diffusion models (JAX)" in message
    assert "fsdm-depth6" in message
    torch.save({"generative_model.input_blocks.0.0.weight": torch.ones(1)}, tmp_path / "unet.pt")
    message = fail(import_weights, tmp_path / "unet.pt", *OPTIONS, out)
    assert "few-shot diffusion models in PyTorch, whose generative model is a U-Net" in message


def test_presets_are_of_models_whose_weights_are_read():
    families = {get_preset(name).run.model.family for name in import_weights.PUBLISHED}
    assert families == {"latent-diffit", "set-dit", "feature-dit"}


def test_an_encoder_of_another_kind_cannot_compute_so():
    with pytest.raises(ValueError, match=r"--like: got fsdm-jax with --encoder-mode=vit; give"):
        dataclasses.replace(TINY, like="fsdm-jax", encoder_mode="vit")
    for pool in ("sum", "mean"):
        config = dataclasses.replace(TINY, like="fsdm-jax", encoder_pool=pool)
        with pytest.raises(ValueError, match=f"--like: got fsdm-jax with --encoder-pool={pool}; "):
            LAYOUT.sources(config)
        options = ("--preset=fsdm-digits", "--dry-run", "--like=fsdm-jax", f"--encoder-pool={pool}")
        assert f"--encoder-pool={pool}; give --encoder-pool=mean-all" in fail(train, *options)
        dataclasses.replace(config, mode_conditioning="lag", gate="none").check_like()
