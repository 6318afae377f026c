"""LPIPS: its layout, its value against a plain reimplementation, and the loading of its weights."""

import pickle
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from metrics import lpips
from metrics.lpips import LAYOUTS, LPIPS, LpipsNetwork, read_weights

NETS = ("alex", "vgg")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return {net: helpers.random_lpips(tmp_path_factory.getbasetemp(), net) for net in NETS}


@pytest.fixture(scope="module")
def distances(files):
    return {net: LPIPS.load(net, files[net]) for net in NETS}


def random_images(num, height, width, seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (num, 3, height, width), dtype=np.uint8))


def windows(x, size, stride, padding, fill):
    """Return all windows [C, H', W', size, size] of an array [C, H, W]."""
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding)), constant_values=fill)
    found = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(1, 2))
    return found[:, ::stride, ::stride]


def convolve(x, state, index, stride=1, padding=1):
    weight, bias = (
        state[f"features.{index}.{kind}"].double().numpy() for kind in ("weight", "bias")
    )
    view = windows(x, weight.shape[2], stride, padding, 0)
    return np.maximum(np.tensordot(weight, view, ((1, 2, 3), (0, 3, 4))) + bias[:, None, None], 0)


def pool(x, size):
    return windows(x, size, 2, 0, -np.inf).max((3, 4))


def alex_features(x, state):
    yield (x := convolve(x, state, 0, stride=4, padding=2))
    yield (x := convolve(pool(x, 3), state, 3, padding=2))
    yield (x := convolve(pool(x, 3), state, 6))
    yield (x := convolve(x, state, 8))
    yield convolve(x, state, 10)


def vgg_features(x, state):
    for stage in ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)):
        x = x if stage[0] == 0 else pool(x, 2)
        for index in stage:
            x = convolve(x, state, index)
        yield x


def reference(net, state, a, b):
    """The distance of two uint8 images [3, H, W], in NumPy with float64."""
    shift, scale = np.array([-0.030, -0.088, -0.188]), np.array([0.458, 0.448, 0.450])
    both = []
    for image in (a, b):
        x = image.double().numpy() / 255 * 2 - 1
        x = (x - shift[:, None, None]) / scale[:, None, None]
        both.append(dict(alex=alex_features, vgg=vgg_features)[net](x, state))
    total = 0.0
    for index, (first, second) in enumerate(zip(*both, strict=True)):
        units = [f / np.sqrt((f**2).sum(0)).clip(1e-10) for f in (first, second)]
        weight = state[f"lin{index}.model.1.weight"].double().numpy()[0, :, 0, 0]
        total += np.einsum("chw,c->hw", (units[0] - units[1]) ** 2, weight).mean()
    assert index == 4
    return total


@pytest.mark.parametrize(("net", "number"), [("alex", 2_469_696), ("vgg", 14_714_688)])
def test_backbones_have_the_published_numbers_of_parameters(net, number):
    with torch.device("meta"):
        network = LpipsNetwork(net)
    assert sum(parameter.numel() for parameter in network.features.parameters()) == number
    channels = dict(alex=(64, 192, 384, 256, 256), vgg=(64, 128, 256, 512, 512))[net]
    state = network.state_dict()
    for index, dim in enumerate(channels):
        assert state.pop(f"lin{index}.model.1.weight").shape == (1, dim, 1, 1)
    assert all(name.startswith("features.") for name in state)


@pytest.mark.parametrize(
    ("net", "name", "shape"),
    [
        ("alex", "features.0.weight", (64, 3, 11, 11)),
        ("alex", "features.3.weight", (192, 64, 5, 5)),
        ("alex", "features.10.weight", (256, 256, 3, 3)),
        ("vgg", "features.2.weight", (64, 64, 3, 3)),
        ("vgg", "features.28.bias", (512,)),
    ],
)
def test_names_and_shapes_are_those_of_the_published_files(net, name, shape):
    with torch.device("meta"):
        assert LpipsNetwork(net).state_dict()[name].shape == shape


@pytest.mark.parametrize(
    ("net", "size"), [("alex", (35, 48)), ("alex", (64, 40)), ("vgg", (17, 25)), ("vgg", (32, 18))]
)
def test_a_distance_is_that_of_a_plain_reimplementation(net, size, files, distances):
    a, b = random_images(2, *size), random_images(2, *size, seed=1)
    b[1] = (a[1].float() * 0.7 + 20).to(torch.uint8)
    found = distances[net].distance(a, b)
    assert found.dtype == torch.float32
    state = read_weights(net, files[net])
    expected = [reference(net, state, *pair) for pair in zip(a, b, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert min(expected) > 0.01


@pytest.mark.parametrize("net", NETS)
def test_equal_images_have_distance_0_and_order_does_not_matter(net, distances):
    a, b = random_images(2, 33, 33), random_images(2, 33, 33, seed=1)
    assert distances[net].distance(a, a).tolist() == [0, 0]
    torch.testing.assert_close(distances[net].distance(a, b), distances[net].distance(b, a))
    black = torch.zeros(1, 3, 33, 33, dtype=torch.uint8)
    assert torch.isfinite(distances[net].distance(black, a[:1])).all()


def test_a_pair_does_not_depend_on_others(distances, monkeypatch):
    a, b = random_images(3, 40, 40), random_images(3, 40, 40, seed=1)
    whole = distances["alex"].distance(a, b)
    assert len(set(whole.tolist())) == 3
    monkeypatch.setattr(lpips, "_MAX_PIXELS", 2 * 40 * 40)
    torch.testing.assert_close(distances["alex"].distance(a, b), whole)
    for row in range(3):
        alone = distances["alex"].distance(a[row : row + 1], b[row : row + 1])
        torch.testing.assert_close(alone[0], whole[row])
    assert distances["alex"].distance(a[:0], b[:0]).shape == (0,)


def test_computes_in_float32_whatever_the_caller_allows(distances):
    a, b = random_images(1, 40, 40), random_images(1, 40, 40, seed=1)
    expected = distances["alex"].distance(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(distances["alex"].distance(a, b), expected)


def test_takes_uint8_and_floats_from_minus_1_to_1(distances):
    a, b = random_images(1, 40, 40), random_images(1, 40, 40, seed=1)
    expected = distances["alex"].distance(a, b)
    found = distances["alex"].distance(a / 127.5 - 1, b.double() / 127.5 - 1)
    torch.testing.assert_close(found, expected)
    with pytest.raises(AssertionError, match=r"in \[-1, 1\]"):
        distances["alex"].distance(a.float(), b.float())


@pytest.mark.parametrize("net", NETS)
def test_the_smallest_image_leaves_one_value_and_smaller_ones_are_refused(net, distances):
    size = LAYOUTS[net].min_size
    a, b = random_images(1, size, size), random_images(1, size, size, seed=1)
    assert distances[net].distance(a, b) > 0
    with pytest.raises(ValueError, match=rf"sides of at least {size} pixels"):
        distances[net].distance(a[..., 1:], b[..., 1:])
    with pytest.raises(ValueError, match=r"expected two equal \[N, 3, H, W\]"):
        distances[net].distance(a, b[:, :1])


def test_the_hash_follows_weights_and_backbone(files, distances, tmp_path):
    assert LPIPS.load("alex", files["alex"]).hash == distances["alex"].hash
    assert distances["vgg"].hash != distances["alex"].hash
    linear = torch.load(files["alex"][1], weights_only=True)
    linear["lin4.model.1.weight"][0, 0] += 1
    torch.save(linear, tmp_path / "other.pth")
    other = LPIPS.load("alex", (files["alex"][0], str(tmp_path / "other.pth")))
    assert other.hash != distances["alex"].hash


def test_loading_leaves_the_random_numbers_of_the_caller_alone(files):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    LPIPS.load("alex", files["alex"])
    assert torch.equal(torch.rand(3), expected)


class TestWeights:
    @pytest.mark.parametrize("suffix", ["safetensors", "pth"])
    def test_may_come_in_one_file(self, suffix, files, tmp_path):
        state = read_weights("alex", files["alex"])
        path = tmp_path / f"both.{suffix}"
        (save_file if suffix == "safetensors" else torch.save)(state, path)
        found = read_weights("alex", [str(path)])
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], state[name]) for name in state)

    def test_in_one_file_must_be_all_of_them(self, files):
        with pytest.raises(ValueError, match=r"backbone\.pth: 5 weights missing: lin0.*names of b"):
            read_weights("alex", files["alex"][:1])

    def test_of_another_net_or_in_another_order_are_named(self, files):
        with pytest.raises(ValueError, match=r"weights missing.*published vgg16-397923af\.pth"):
            read_weights("vgg", files["alex"])
        swapped = (files["vgg"][0], files["alex"][1])
        with pytest.raises(ValueError, match=r"lin1\.model\.1\.weight has shape \[1, 192, 1, 1\]"):
            read_weights("vgg", swapped)
        with pytest.raises(ValueError, match=r"lpips-alex\.pth: 10 weights missing: features"):
            read_weights("alex", files["alex"][::-1])

    def test_are_one_file_or_two_of_a_known_net(self, files):
        with pytest.raises(ValueError, match=r"got 3 .* or two, the backbone"):
            read_weights("alex", ("a", "b", "c"))
        with pytest.raises(ValueError, match=r"backbone 'alexnet'.* alex, vgg.*mean 'alex'"):
            read_weights("alexnet", files["alex"])

    def test_that_would_execute_code_are_refused_unexecuted(self, files, tmp_path):
        path, mark = tmp_path / "malicious.pth", tmp_path / "executed"
        torch.save({"features.0.weight": Executes(mark)}, path)
        with pytest.raises(ValueError, match=r"malicious\.pth: refused, .* execute code"):
            read_weights("alex", (str(path), files["alex"][1]))
        assert not mark.exists()
        pickle.loads(pickle.dumps(Executes(mark)))
        assert mark.exists()

    def test_in_damaged_or_missing_files_are_refused(self, files, tmp_path):
        with pytest.raises(
            ValueError, match=r"none\.pth: no such file.*\$SETDIFFIT_LPIPS, as FILE"
        ):
            read_weights("alex", (str(tmp_path / "none.pth"), files["alex"][1]))
        for name in ("cut.pth", "cut.safetensors"):
            (tmp_path / name).write_bytes(Path(files["alex"][0]).read_bytes()[:1000])
            with pytest.raises(ValueError, match=rf"{name}: damaged, or no"):
                read_weights("alex", [str(tmp_path / name)])

    def test_come_from_the_environment_or_the_published_addresses(self, files, monkeypatch):
        asked = []

        def fetch(location, sha256=None, **bounds):
            asked.append((location, sha256))
            return Path(files["vgg"]["lpips/weights" in location or "linear" in location])

        monkeypatch.setattr("metrics.weights.fetch", fetch)
        monkeypatch.delenv(lpips.WEIGHTS_VARIABLE, raising=False)
        LPIPS.load("vgg")
        assert asked == [LAYOUTS["vgg"].backbone, LAYOUTS["vgg"].linear]
        for layout in LAYOUTS.values():
            url, sha256 = layout.backbone
            assert url.endswith(f"-{sha256[:8]}.pth")  # As torchvision names its files.
            assert len(layout.linear[1]) == len(sha256) == 64
        monkeypatch.setenv(lpips.WEIGHTS_VARIABLE, "/some/backbone.pth,/some/linear.pth")
        LPIPS.load("vgg")
        assert asked[2:] == [("/some/backbone.pth", None), ("/some/linear.pth", None)]

    def test_that_cannot_be_downloaded_say_what_to_do(self, monkeypatch):
        def fetch(location, sha256=None, **bounds):
            raise ValueError(f"Could not download {location}.")

        monkeypatch.setattr("metrics.weights.fetch", fetch)
        with pytest.raises(ValueError, match=r"download .*alexnet-owt.*\$SETDIFFIT_LPIPS"):
            read_weights("alex")


class Executes:
    """An object whose unpickling creates a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))
