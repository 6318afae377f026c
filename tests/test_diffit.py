import dataclasses

import pytest
import torch
from torch.nn import functional

from dnnlib.config import from_dict, to_dict
from models import ModelConfig, attention_backend, build_network
from models.architectures.diffit import DiffiTConfig
from models.architectures.set_dit import SetDiTConfig
from models.context import Context
from models.layers import TMSA

TINY = DiffiTConfig(
    resolution=8,
    num_classes=3,
    augment_dim=9,
    num_stages=2,
    num_blocks=(1,),
    base_dim=8,
    hidden_dim=12,
    num_heads=2,
    window=2,
    time_dim=16,
)


def make(config=TINY, **changes):
    """A network whose every weight has an effect: none is close to zero."""
    torch.manual_seed(1)
    network = build_network(dataclasses.replace(config, **changes))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network


def make_inputs(network, num=4, seed=2):
    torch.manual_seed(seed)
    config = network.config
    x = torch.randn(num, config.img_channels, config.resolution, config.resolution)
    cond = {"label": torch.randint(3, [num]), "augment": torch.randn(num, 9)}
    return x, torch.randn(num), cond


def run(network, drop=None, num=4):
    x, c_noise, cond = make_inputs(network, num)
    return network(x, c_noise, network.context(cond, drop))


def count(**kwargs):
    with torch.device("meta"):
        return sum(p.numel() for p in build_network(DiffiTConfig(**kwargs)).parameters())


CIFAR10 = dict(resolution=32, num_stages=3, window=4)
FFHQ64 = dict(resolution=64, num_stages=4, window=8)


@pytest.mark.parametrize(
    ("kwargs", "exact", "millions"),
    [
        (CIFAR10 | dict(num_blocks=(2,)), 15_870_251, 15.9),
        (CIFAR10 | dict(num_blocks=(4,)), 28_682_451, 28.7),
        (FFHQ64 | dict(num_blocks=(4,)), 44_792_051, 44.8),
        (FFHQ64 | dict(num_blocks=(1, 2, 2, 2)), 23_788_979, 23.8),
        (CIFAR10 | dict(num_blocks=(2,), augment_dim=9), 15_870_251 + 9 * 128, 15.9),
        (CIFAR10 | dict(num_blocks=(2,), num_classes=10), 15_870_251 + 11 * 128, 15.9),
    ],
)
def test_parameter_counts_are_those_of_the_spec(kwargs, exact, millions):
    assert count(**kwargs) == exact
    assert round(exact / 1e6, 1) == millions


def plain_forward(state, config, x, c_noise, vector):
    """The network from its weights by name, with the plainest operations (arXiv 2312.02139)."""

    def linear(name, value):
        return functional.linear(value, state[f"{name}.weight"], state[f"{name}.bias"])

    def conv(name, value, **kwargs):
        return functional.conv2d(value, state[f"{name}.weight"], state[f"{name}.bias"], **kwargs)

    def swish_norm(name, value):
        groups = max(1, min(32, value.shape[1] // 4))
        value = functional.group_norm(
            value, groups, state[f"{name}.weight"], state[f"{name}.bias"], 1e-6
        )
        return value * value.sigmoid()

    def layer_norm(value):
        mean, var = value.mean(-1, keepdim=True), value.var(-1, keepdim=True, correction=0)
        return (value - mean) / (var + 1e-6).sqrt()

    def attention(name, tokens, t, w):  # Tokens [B, H, W, C]; Eq. 3-6.
        out = torch.zeros_like(tokens)
        heads, index = config.num_heads, torch.arange(w * w)
        dy = index[:, None] // w - index // w + w - 1
        dx = index[:, None] % w - index % w + w - 1
        table = state[f"{name}.relative_position_bias_table"]
        bias = table[dy * (2 * w - 1) + dx].permute(2, 0, 1)
        for top in range(0, tokens.shape[1], w):
            for left in range(0, tokens.shape[2], w):
                window = tokens[:, top : top + w, left : left + w].flatten(1, 2)
                qkv = linear(f"{name}.qkv", window) + linear(f"{name}.qkv_temb", t)[:, None]
                q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
                scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + bias
                merged = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
                merged = linear(f"{name}.proj", merged).unflatten(1, (w, w))
                out[:, top : top + w, left : left + w] = merged
        return out

    def res_block(name, value, t, w):  # Eq. 7-10.
        y = conv(f"{name}.conv", swish_norm(f"{name}.norm", value), padding=1).permute(0, 2, 3, 1)
        y = y + attention(f"{name}.block.attn", layer_norm(y), t, w)
        hidden = linear(f"{name}.block.mlp.fc1", layer_norm(y))
        y = y + linear(f"{name}.block.mlp.fc2", functional.gelu(hidden, approximate="tanh"))
        if f"{name}.shortcut.weight" in state:
            value = conv(f"{name}.shortcut", value)
        return value + y.permute(0, 3, 1, 2)

    angles = c_noise[:, None] * 1e-4 ** (torch.arange(64) / 63).to(c_noise)
    t = torch.cat([angles.sin(), angles.cos()], dim=1) + vector
    for layer in ("time_token.0", "time_token.2"):
        t = functional.silu(linear(layer, t))
    x = conv("tokenizer", x, padding=1)
    skips = []
    for stage, depth in enumerate(config.blocks_per_stage):
        if stage > 0:
            x = conv(f"downsamplers.{stage - 1}", x, stride=2, padding=1)
        for i in range(depth):
            x = res_block(f"encoder.{stage}.{i}", x, t, config.windows[stage])
            if config.skip == "block" or i == depth - 1:
                skips.append((stage, x))
    while skips[-1][0] == config.num_stages - 1:
        skips.pop()
    for up, stage in enumerate(reversed(range(config.num_stages - 1))):
        x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        x = conv(f"upsamplers.{up}", x, padding=1)
        for i in range(config.blocks_per_stage[stage]):
            if config.skip == "block" or i == 0:
                x = torch.cat([x, skips.pop()[1]], dim=1)
            x = res_block(f"decoder.{up}.{i}", x, t, config.windows[stage])
    return conv("head", swish_norm("head_norm", x), padding=1)


@pytest.mark.parametrize("skip", ["stage", "block"])
def test_the_network_computes_what_the_paper_s_equations_say(skip):
    network = make(num_stages=3, num_blocks=(2, 1, 2), window=4, skip=skip).double()
    x, c_noise, cond = make_inputs(network)
    x, c_noise = x.double(), c_noise.double()
    context = network.context(cond | {"augment": cond["augment"].double()})
    expected = plain_forward(
        network.backbone.state_dict(), network.config, x, c_noise, context.vector
    )
    torch.testing.assert_close(
        network(x, c_noise, context), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item()
    )


def test_with_patches_all_pixels_of_a_patch_are_channels_of_one_position():
    network = make(patch_size=2, learned_variance=True)
    x, c_noise, cond = make_inputs(network, num=2)
    context = network.context(cond)
    # Channels 4 c + 2 row + column of a position, as the plain network sees them and returns them.
    pixels = [x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]
    patches = torch.stack(pixels, dim=2).flatten(1, 2)
    state = network.backbone.state_dict()
    expected = plain_forward(state, network.config, patches, c_noise, context.vector)
    expected = expected.unflatten(1, (6, 2, 2)).permute(0, 1, 4, 2, 5, 3).flatten(4).flatten(2, 3)
    out = network(x, c_noise, context)
    assert out.shape == (2, 6, 8, 8)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    with pytest.raises(ValueError, match="divisible by 4, not 6x8"):
        network(x[:, :, :6], c_noise, context)


@pytest.mark.parametrize("skip", ["stage", "block"])
@pytest.mark.parametrize("num_blocks", [(1,), (2,), (4,), (1, 2, 3)])
def test_every_depth_and_skip_gives_an_output_of_the_input_size(num_blocks, skip):
    network = make(num_stages=3, num_blocks=num_blocks, skip=skip)
    out = run(network, num=2)
    assert out.shape == (2, 3, 8, 8)
    assert out.isfinite().all()


@pytest.mark.parametrize(
    ("skip", "widths"),
    [("stage", [12 + 8, 8, 8]), ("block", [12 + 8, 8 + 8, 8 + 8])],
)
def test_skips_join_the_decoder_where_they_should(skip, widths):
    network = make(num_blocks=(3,), skip=skip).backbone
    decoder = network.decoder[0]
    assert [block.norm.num_channels for block in decoder] == widths
    # The outputs of the encoder arrive in reverse order.
    outputs, joined = [], []
    for block in network.encoder[0]:
        block.register_forward_hook(lambda module, args, out: outputs.append(out))
    for block in decoder:
        block.register_forward_pre_hook(lambda module, args: joined.append(args[0]))
    network(torch.randn(1, 3, 8, 8), torch.zeros(1), Context())
    expected = [outputs[-1]] if skip == "stage" else outputs[::-1]
    for block_input, output in zip(joined, expected, strict=False):
        assert torch.equal(block_input[:, -8:], output)


def test_windows_are_cut_to_the_grids_of_small_stages():
    network = make(num_stages=3, window=4)
    assert network.config.grids == (8, 4, 2)
    windows = {m.window for m in network.backbone.encoder[2].modules() if isinstance(m, TMSA)}
    assert windows == {2}
    assert run(network).shape == (4, 3, 8, 8)


def test_a_non_square_image_works_and_an_indivisible_one_is_refused():
    network = make()
    context = network.context({"label": torch.zeros(1, dtype=torch.int64)})
    assert network(torch.randn(1, 3, 4, 12), torch.zeros(1), context).shape == (1, 3, 4, 12)
    with pytest.raises(ValueError, match="divisible by 2, not 8x7"):
        network(torch.randn(1, 3, 8, 7), torch.zeros(1), context)
    with pytest.raises(ValueError, match="3x4 tokens"):
        network(torch.randn(1, 3, 6, 8), torch.zeros(1), context)


def test_images_of_a_batch_do_not_mix():
    network = make().eval()
    x, c_noise, cond = make_inputs(network)
    out = network(x, c_noise, network.context(cond))
    for row in range(4):
        context = network.context(cond).index(slice(row, row + 1))
        alone = network(x[row : row + 1], c_noise[row : row + 1], context)
        torch.testing.assert_close(alone, out[row : row + 1])


def test_the_noise_level_the_label_and_the_augmentation_change_the_output():
    network = make()
    x, c_noise, cond = make_inputs(network)
    out = network(x, c_noise, network.context(cond))
    other_label = cond | {"label": (cond["label"] + 1) % 3}
    for changed_noise, changed_cond in (
        (c_noise + 1, cond),
        (c_noise, other_label),
        (c_noise, cond | {"augment": cond["augment"] + 1}),
    ):
        moved = network(x, changed_noise, network.context(changed_cond))
        assert not torch.isclose(moved, out).flatten(1).all(dim=1).any()


def test_a_new_network_starts_near_zero_output_and_identity_blocks():
    torch.manual_seed(0)
    network = build_network(TINY)
    assert run(network).abs().max() < 1e-3
    block = network.backbone.encoder[0][0].block
    x = torch.randn(2, 4, 4, 8)
    torch.testing.assert_close(block(x, torch.randn(2, 16)), x, rtol=0, atol=1e-3)
    # Glorot: the variance of a uniform on +-sqrt(6 / (fan_in + fan_out)).
    weight = network.backbone.encoder[1][0].conv.weight
    assert weight.std().item() == pytest.approx((2 / (9 * (8 + 12))) ** 0.5, rel=0.1)
    assert 0.01 < block.attn.relative_position_bias_table.std() < 0.03


def test_checkpointing_changes_neither_the_loss_nor_the_gradients():
    results = []
    for checkpointing in (False, True):
        network = make(checkpointing=checkpointing, dropout=0.3).train()
        calls = []
        block = network.backbone.decoder[0][0].block
        block.register_forward_hook(lambda *args, calls=calls: calls.append(1))
        torch.manual_seed(3)
        loss = run(network).square().mean()
        loss.backward()
        assert len(calls) == (2 if checkpointing else 1)  # Once more in the backward pass.
        results.append([loss, *(p.grad for p in network.parameters())])
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=0, atol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_compiled_network_is_one_graph_and_computes_the_same(checkpointing):
    network = make(checkpointing=checkpointing)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    x, c_noise, cond = make_inputs(network)
    grads = []
    for function in (network, compiled):
        network.zero_grad()
        loss = function(x, c_noise, network.context(cond)).square().mean()
        loss.backward()
        grads.append([loss.detach(), *(p.grad for p in network.parameters())])
    for eager, traced in zip(*grads, strict=True):
        torch.testing.assert_close(eager, traced)


def test_bf16_autocast_stays_near_fp32():
    network = make(num_blocks=(2,))
    with torch.autocast("cpu", torch.bfloat16):
        out = run(network).float()
    expected = run(network)
    assert (out - expected).square().mean() < 1e-3 * expected.square().mean()
    out.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_forward_reads_no_values_and_opens_no_files(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network opened a file")

    with torch.device("meta"):
        network = build_network(TINY)  # Meta tensors have no values to read.
        cond = {"label": torch.zeros(2, dtype=torch.int64), "augment": torch.zeros(2, 9)}
        monkeypatch.setattr("builtins.open", refuse)
        context = network.context(cond, torch.zeros(2, dtype=torch.bool))
        out = network(torch.zeros(2, 3, 8, 8), torch.zeros(2), context)
        out.sum().backward()
    assert out.shape == (2, 3, 8, 8)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_model_computes_the_same_with_flex_attention():
    network, flex = make().eval(), make(attention="flex").eval()
    with torch.no_grad():
        torch.testing.assert_close(run(flex), run(network))


def test_the_attention_that_auto_chose_can_be_asked_for():
    assert attention_backend(TINY, "cpu") == "explicit"
    assert attention_backend(TINY, torch.device("cuda", 1)) in ("sdpa", "flex")
    assert "by type and number of tokens" in attention_backend(SetDiTConfig(), "cpu")
    assert attention_backend(SetDiTConfig(), "cuda") == "sdpa"
    flex = dataclasses.replace(TINY, attention="flex")
    assert attention_backend(flex, "cuda") == "flex"
    with pytest.raises(ValueError, match="cannot be trained on a CPU"):
        attention_backend(flex, "cpu")


@pytest.mark.parametrize("drop", [None, False, True])
@pytest.mark.parametrize("augment", [True, False])
def test_every_parameter_has_a_gradient_whatever_is_dropped(drop, augment):
    network = make(num_blocks=(2,))
    x, c_noise, cond = make_inputs(network)
    if not augment:
        del cond["augment"]
    mask = None if drop is None else torch.full([4], drop)
    network(x, c_noise, network.context(cond, mask)).sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []
    assert (network.conditioner.null.grad != 0).any() == (drop is True)
    assert (network.conditioner.label_weight.grad != 0).any() == (drop is not True)


def test_labels_enter_as_a_linear_map_of_scaled_one_hot_vectors():
    conditioner = make().conditioner
    label, augment = torch.tensor([2, 0]), torch.randn(2, 9)
    onehot = torch.nn.functional.one_hot(label, 3).float()
    expected = (3**0.5 * onehot) @ conditioner.label_weight + augment @ conditioner.augment.weight.T
    vector = conditioner({"label": label, "augment": augment}).vector
    torch.testing.assert_close(vector, expected)


def test_a_dropped_label_leaves_the_null_vector_and_the_augmentation():
    conditioner = make().conditioner
    cond = {"label": torch.tensor([2, 0]), "augment": torch.randn(2, 9)}
    vector = conditioner(cond, torch.tensor([True, False])).vector
    torch.testing.assert_close(
        vector[0], conditioner.null + conditioner.augment(cond["augment"])[0]
    )
    torch.testing.assert_close(vector[1], conditioner(cond).vector[1])


def test_an_unconditional_network_has_no_context_vector():
    network = make(num_classes=0, augment_dim=0)
    context = network.context({}, num=2)
    assert context == Context()
    assert context.concat(context) == Context()
    assert network(torch.randn(2, 3, 8, 8), torch.zeros(2), context).shape == (2, 3, 8, 8)


def test_sampling_without_augmentation_labels_means_zeros():
    network = make(num_classes=0)
    assert torch.equal(network.context({}, num=2).vector, torch.zeros(2, 128))
    with pytest.raises(ValueError, match="number of images"):
        network.context({})


@pytest.mark.parametrize("label", [3, -1])
def test_a_label_out_of_range_is_never_accepted(label):
    network = make()
    cond = {"label": torch.tensor([0, label])}
    with pytest.raises(ValueError, match=f"index {label} is out of range; .* classes 0 to 2"):
        network.check(cond)
    with pytest.raises(IndexError):
        network.context(cond)


def test_a_missing_label_is_an_error_that_names_the_condition():
    network = make()
    network.check({"label": torch.tensor([0, 2])})
    for call in (network.check, network.context):
        with pytest.raises(ValueError, match="3 classes, but no labels"):
            call({})
    make(num_classes=0).check({})


def test_contexts_join_select_and_repeat_along_the_batch():
    a = Context(vector=torch.tensor([[1.0], [2.0]]), mask=torch.tensor([[True], [False]]))
    b = Context(vector=torch.tensor([[3.0]]), mask=torch.tensor([[True]]))
    joined = a.concat(b)
    assert joined.vector.flatten().tolist() == [1, 2, 3]
    assert joined.mask.flatten().tolist() == [True, False, True]
    assert joined.tokens is None
    assert joined.index(torch.tensor([2, 0])).vector.flatten().tolist() == [3, 1]
    assert a.repeat(2).vector.flatten().tolist() == [1, 1, 2, 2]
    with pytest.raises(ValueError, match="with and without 'mask'"):
        a.concat(Context(vector=torch.zeros(1, 1)))


def test_a_state_dict_holds_parameters_alone_under_stable_names():
    network = make()
    names = list(network.state_dict())
    assert names == [name for name, _ in network.named_parameters()]
    for name in (
        "backbone.time_token.0.weight",
        "backbone.tokenizer.weight",
        "backbone.encoder.1.0.conv.weight",
        "backbone.encoder.1.0.block.attn.qkv.weight",
        "backbone.encoder.1.0.block.attn.qkv_temb.bias",
        "backbone.encoder.1.0.block.attn.relative_position_bias_table",
        "backbone.encoder.1.0.block.mlp.fc2.weight",
        "backbone.downsamplers.0.weight",
        "backbone.upsamplers.0.weight",
        "backbone.decoder.0.0.shortcut.weight",
        "backbone.head.weight",
        "conditioner.label_weight",
        "conditioner.null",
        "conditioner.augment.weight",
    ):
        assert name in names


def test_a_model_is_restored_from_plain_containers():
    values = to_dict(TINY)
    assert values["family"] == "diffit"
    assert from_dict(ModelConfig, values) == TINY


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(num_stages=3, resolution=30),
            "--resolution: got 30, which 3 stages .* multiple of 4",
        ),
        (dict(num_stages=5), "--resolution: got 8, which 5 stages"),
        (dict(patch_size=3), "--patch-size: got 3, which does not divide images of 8x8"),
        (dict(patch_size=8), "--resolution: got 8, which 2 stages .* 8x8; .* multiple of 16"),
        (dict(resolution=12, window=4), r"--window: got 4, which does not divide the 6x6 .*12, 6"),
        (dict(num_heads=3), "--num-heads: got 3, which does not divide --base-dim 8"),
        (dict(base_dim=15, num_heads=5), "--num-heads: got 5, .* --hidden-dim 12"),
        (dict(num_blocks=(1, 2, 3)), "--num-blocks: got 1,2,3, but there are 2 stages"),
        (dict(num_blocks=()), "--num-blocks: got , but"),
        (dict(num_blocks=(0,)), "--num-blocks: got 0; accepted: integers"),
        (dict(skip="blok"), "--skip: .*stage, block.*mean 'block'"),
        (
            dict(attention="flash"),
            "--attention: got 'flash'; accepted: one of auto, sdpa, flex, explicit",
        ),
    ],
)
def test_an_impossible_architecture_is_refused_in_one_sentence(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        dataclasses.replace(TINY, **changes)
    assert "\n" not in str(error.value)
