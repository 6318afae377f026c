import functools
import itertools

import pytest
import torch
from torch.nn import functional

from models import attention as attention_module
from models.attention import ATTENTION, attend, choose_attention
from models.layers import (
    TMSA,
    PositionalEmbedding,
    UpsampleConv,
    group_norm,
    relative_position_index,
    window_partition,
    window_unpartition,
)

CPU = torch.device("cpu")


def make_tmsa(dim=8, time_dim=6, num_heads=2, window=2, attention="auto"):
    torch.manual_seed(1)
    layer = TMSA(dim, time_dim, num_heads, window, attention).double()
    torch.nn.init.normal_(layer.relative_position_bias_table)
    return layer


def naive_tmsa(layer, x, t, num_heads):
    """One image, one window, one head, one query at a time; one linear on (token, time)."""
    B, H, W, C = x.shape
    w, d = layer.window, C // num_heads
    weight = torch.cat([layer.qkv.weight, layer.qkv_temb.weight], dim=1)
    shift = layer.qkv.bias + layer.qkv_temb.bias
    rows = []
    for b in range(B):
        grid = {}
        for top, left in itertools.product(range(0, H, w), range(0, W, w)):
            places = [(top + y, left + x_) for y in range(w) for x_ in range(w)]
            qkv = {p: weight @ torch.cat([x[b][p], t[b]]) + shift for p in places}
            for query in places:
                heads = []
                for h in range(num_heads):
                    q, k, v = (
                        {p: qkv[p][i * C + h * d : i * C + (h + 1) * d] for p in places}
                        for i in range(3)
                    )
                    scores = []
                    for key in places:
                        dy, dx = query[0] - key[0], query[1] - key[1]
                        row = (dy + w - 1) * (2 * w - 1) + dx + w - 1
                        bias = layer.relative_position_bias_table[row, h]
                        scores.append(q[query] @ k[key] / d**0.5 + bias)
                    weights = torch.stack(scores).softmax(0)
                    heads.append(sum(a * v[p] for a, p in zip(weights, places, strict=True)))
                grid[query] = layer.proj(torch.cat(heads))
        rows.append(torch.stack([grid[y, x_] for y in range(H) for x_ in range(W)]))
    return torch.stack(rows).view(B, H, W, C)


def test_unpartition_restores_a_non_square_grid():
    x = torch.randn(3, 8, 12, 5, 7)
    windows = window_partition(x, 4)
    assert windows.shape == (3 * 2 * 3, 5, 16, 7)
    assert torch.equal(window_unpartition(windows, 4, 8, 12), x)


def test_a_window_holds_the_tokens_of_its_square_row_by_row():
    image, row, column = torch.meshgrid(
        torch.arange(3), torch.arange(4), torch.arange(6), indexing="ij"
    )
    x = torch.stack([image, row, column], dim=-1).unsqueeze(3)  # One head, d = 3.
    windows = window_partition(x, 2)[:, 0]
    assert windows[3 + 2 + 5].tolist() == [[1, 2, 2], [1, 2, 3], [1, 3, 2], [1, 3, 3]]


@pytest.mark.parametrize("size", [(6, 8), (8, 6), (3, 3)])
def test_a_grid_that_windows_do_not_divide_is_refused(size):
    with pytest.raises(ValueError, match=f"{size[0]}x{size[1]} tokens .* multiples of 4"):
        window_partition(torch.zeros(1, *size, 1, 1), 4)


@pytest.mark.parametrize("window", [1, 2, 4])
def test_the_relative_position_index_follows_its_formula(window):
    index = relative_position_index(window)
    places = list(itertools.product(range(window), repeat=2))
    for i, (y, x) in enumerate(places):
        for j, (v, u) in enumerate(places):
            row = (y - v + window - 1) * (2 * window - 1) + (x - u + window - 1)
            assert index[i, j] == row
    assert index.unique().numel() == (2 * window - 1) ** 2


@pytest.mark.parametrize(
    ("size", "window"), [((4, 4), 2), ((2, 6), 2), ((3, 3), 3)], ids=["windows", "wide", "global"]
)
def test_attention_equals_a_naive_one_in_forward_and_gradients(size, window):
    layer = make_tmsa(window=window)
    x = torch.randn(2, *size, 8, dtype=torch.float64, requires_grad=True)
    t = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    inputs = [x, t, *layer.parameters()]
    out, expected = layer(x, t), naive_tmsa(layer, x, t, num_heads=2)
    torch.testing.assert_close(out, expected)
    cotangent = torch.randn_like(out)
    grads = torch.autograd.grad(out, inputs, cotangent)
    expected_grads = torch.autograd.grad(expected, inputs, cotangent)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad)


def test_the_time_token_of_an_image_reaches_that_image_only():
    layer = make_tmsa()
    x, t = torch.randn(3, 4, 4, 8).double(), torch.randn(3, 6).double()
    moved = t.clone()
    moved[1] += 1
    out, out_moved = layer(x, t), layer(x, moved)
    assert torch.equal(out[[0, 2]], out_moved[[0, 2]])
    assert not torch.isclose(out[1], out_moved[1]).all(dim=-1).any()  # Every token of image 1.


def test_windows_do_not_see_one_another():
    layer = make_tmsa()
    x, t = torch.randn(2, 4, 4, 8).double(), torch.randn(2, 6).double()
    moved = x.clone()
    moved[:, 2:, :2] += 1
    changed = (layer(x, t) != layer(moved, t)).any(dim=-1)
    assert changed[:, 2:, :2].all()
    assert not changed[:, :2].any()
    assert not changed[:, 2:, 2:].any()


def test_the_position_bias_matters_but_for_a_constant_per_query():
    layer = make_tmsa(window=4)
    x, t = torch.randn(2, 4, 4, 8).double(), torch.randn(2, 6).double()
    layer(x, t).square().sum().backward()
    assert (layer.relative_position_bias_table.grad.abs() > 1e-6).all()

    q, k, v = torch.randn(3, 5, 2, 16, 4).double()
    bias = layer.bias()
    out = attend(q, k, v, bias)
    per_query = torch.randn(2, 16, 1).double()
    torch.testing.assert_close(attend(q, k, v, bias + per_query), out)
    assert not torch.allclose(attend(q, k, v, bias + per_query.transpose(1, 2)), out)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_equals_sdpa():
    layer, flex = make_tmsa(window=4), make_tmsa(window=4, attention="flex")
    x, t = torch.randn(2, 4, 8, 8).double(), torch.randn(2, 6).double()
    with torch.no_grad():
        torch.testing.assert_close(flex(x, t), layer(x, t))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_gives_the_bias_the_same_gradient():
    q, k, v = torch.randn(3, 5, 2, 16, 4).double()
    bias = torch.randn(2, 16, 16, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn_like(q)
    grads = [
        torch.autograd.grad(attend(q, k, v, bias, kind), bias, cotangent)[0]
        for kind in ("sdpa", "flex", "explicit")
    ]
    torch.testing.assert_close(grads[1], grads[0])
    torch.testing.assert_close(grads[2], grads[0])


def test_explicit_attention_has_the_gradients_of_its_values():
    inputs = [torch.randn(3, 2, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    bias = torch.randn(2, 5, 5, dtype=torch.float64, requires_grad=True)
    explicit = functools.partial(attend, attention="explicit")
    assert torch.autograd.gradcheck(explicit, (*inputs, bias))
    torch.testing.assert_close(explicit(*inputs, bias), attend(*inputs, bias, "sdpa"))


@pytest.mark.parametrize("length", [16, 64])
def test_explicit_attention_in_bf16_is_as_exact_as_bf16_allows(length):
    """Its error beside float64 is that of sdpa, whose CPU kernels compute in fp32, but for 2x."""
    q, k, v = torch.randn(3, 8, 2, length, 16)
    bias, cotangent = torch.randn(2, length, length), torch.randn(8, 2, length, 16)

    def run(kind, dtype):
        leaves = [value.to(dtype).requires_grad_() for value in (q, k, v)]
        own = bias.double() if dtype == torch.float64 else bias.clone()
        leaves.append(own.requires_grad_())
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = attend(*leaves, kind)
        assert out.dtype == dtype
        return [out, *torch.autograd.grad(out, leaves, cotangent.to(dtype))]

    true = run("sdpa", torch.float64)
    for expected, fused, own in zip(
        true, run("sdpa", torch.bfloat16), run("explicit", torch.bfloat16), strict=True
    ):
        errors = [(found - expected).abs().mean() for found in (fused, own)]
        assert errors[1] < 2 * errors[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("kind", ["sdpa", "flex", "explicit"])
def test_attention_on_a_gpu_equals_the_cpu_in_forward_and_gradients(kind):
    q, k, v = torch.randn(3, 6, 4, 64, 32)
    inputs = [q, k, v, torch.randn(4, 64, 64)]
    cotangent = torch.randn_like(q)
    results = []
    for device, attention in (("cpu", "sdpa"), ("cuda", kind)):
        leaves = [value.detach().to(device).requires_grad_() for value in inputs]
        out = attend(*leaves, attention)
        results.append([out, *torch.autograd.grad(out, leaves, cotangent.to(device))])
    for expected, value in zip(*results, strict=True):
        torch.testing.assert_close(value.cpu(), expected, rtol=1e-3, atol=1e-3)


def test_auto_names_a_backend_on_every_device_and_flex_cannot_train_on_a_cpu():
    for device in ("cpu", "cuda", "meta"):
        assert choose_attention("auto", torch.device(device), True) in ATTENTION[1:]
    assert choose_attention("flex", CPU, needs_grad=False) == "flex"
    with pytest.raises(ValueError, match="--attention=explicit"):
        choose_attention("flex", CPU, needs_grad=True)
    with pytest.raises(ValueError, match="--attention=explicit"):
        make_tmsa(attention="flex")(torch.zeros(1, 2, 2, 8).double(), torch.zeros(1, 6).double())


def test_attention_under_bf16_autocast_stays_near_fp32():
    layer = make_tmsa(window=4).float()
    x, t = torch.randn(2, 8, 8, 8), torch.randn(2, 6)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x, t)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), layer(x, t), rtol=0.1, atol=0.05)
    out.float().sum().backward()
    assert layer.relative_position_bias_table.grad.dtype == torch.float32


@pytest.mark.parametrize("size", [(1, 1), (3, 5)])
def test_upsampling_and_convolution_at_once_equal_the_two_in_turn(size):
    torch.manual_seed(2)
    layer = UpsampleConv(4).double()
    x = torch.randn(2, 4, *size, dtype=torch.float64, requires_grad=True)
    big = functional.interpolate(x, scale_factor=2, mode="nearest")
    expected = functional.conv2d(big, layer.weight, layer.bias, padding=1)
    out = layer(x)
    torch.testing.assert_close(out, expected)
    cotangent = torch.randn_like(out)
    inputs = [x, layer.weight, layer.bias]
    pairs = zip(
        torch.autograd.grad(out, inputs, cotangent),
        torch.autograd.grad(expected, inputs, cotangent),
        strict=True,
    )
    for grad, expected_grad in pairs:
        torch.testing.assert_close(grad, expected_grad)


def test_the_positional_embedding_has_sines_first_and_both_end_frequencies():
    noise = torch.tensor([0.0, 0.3, 999.0])
    out = PositionalEmbedding(128)(noise)
    assert out.shape == (3, 128)
    for index, frequency in ((0, 1.0), (63, 1e-4), (21, 1e4 ** (-21 / 63))):
        torch.testing.assert_close(out[:, index], (noise * frequency).sin(), rtol=0, atol=2e-4)
        torch.testing.assert_close(out[:, 64 + index], (noise * frequency).cos(), rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    ("channels", "groups"), [(256, 32), (128, 32), (64, 16), (384, 32), (48, 12), (150, 30), (2, 1)]
)
def test_group_norm_takes_the_most_groups_that_divide(channels, groups):
    assert group_norm(channels).num_groups == groups


@pytest.mark.parametrize("kind", ["none", "keys", "scores"])
def test_explicit_attention_takes_masks_and_any_number_of_keys(kind):
    q = torch.randn(3, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(3, 2, 7, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    inputs, bias = [q, k, v], None
    if kind == "keys":
        bias = torch.rand(3, 1, 1, 7) > 0.3
        bias[..., 0] = True
    elif kind == "scores":
        bias = torch.randn(3, 1, 1, 7, dtype=torch.float64, requires_grad=True)
        inputs.append(bias)
    results = []
    for attention in ("explicit", "sdpa"):
        own = bias if kind == "none" else bias.expand(-1, -1, 5, -1)
        out = attend(q, k, v, own, attention, scale=0.7)
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    torch.testing.assert_close(*results)


def test_gradients_in_bf16_and_products_by_onednn_are_made_explicitly(monkeypatch):
    made = []
    monkeypatch.setattr(attention_module._Explicit, "apply", lambda *args: made.append(args))
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: None)

    def is_explicit(length, dtype, grad, backend="mkl"):
        monkeypatch.setattr(attention_module.cpu_matmul, "in_use", lambda: backend)
        made.clear()
        q = torch.zeros(1, 1, length, 4, dtype=dtype, requires_grad=grad)
        attend(q, q, q)
        return bool(made)

    half, full = torch.bfloat16, torch.float32
    assert is_explicit(64, half, grad=True)
    assert not is_explicit(64, half, grad=False)
    assert not is_explicit(1024, half, grad=True)
    assert not is_explicit(64, full, grad=True)
    assert is_explicit(64, full, grad=True, backend="onednn")
    assert not is_explicit(1024, full, grad=True, backend="onednn")
