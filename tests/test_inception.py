"""The Inception detector: its layout, its preprocessing and the loading of its weights."""

import pickle
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch

from metrics import inception
from metrics.detectors import get_detector
from metrics.inception import (
    Inception,
    InceptionDetector,
    preprocess_pytorch_fid,
    preprocess_tensorflow,
    read_weights,
    resize_tensorflow,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return helpers.random_inception(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def detector(checkpoint):
    return get_detector("inception", "cpu", location=str(checkpoint))


def random_images(num, channels, height, width):
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.integers(0, 256, (num, channels, height, width), dtype=np.uint8))


class TestResize:
    def reference(self, image, size):
        """Bilinear resize of one channel [H, W] by a loop over output pixels."""
        height, width = image.shape
        result = np.zeros((size, size))
        for i in range(size):
            for j in range(size):
                y, x = i * height / size, j * width / size
                y0, x0 = int(y), int(x)
                y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
                top = image[y0, x0] * (1 - (x - x0)) + image[y0, x1] * (x - x0)
                bottom = image[y1, x0] * (1 - (x - x0)) + image[y1, x1] * (x - x0)
                result[i, j] = top * (1 - (y - y0)) + bottom * (y - y0)
        return result

    @pytest.mark.parametrize("shape", [(8, 8), (5, 13), (40, 30), (29, 7)])
    def test_is_that_of_tensorflow_1_up_and_down(self, shape):
        images = random_images(1, 2, *shape)
        found = resize_tensorflow(images, 29)
        for channel in range(2):
            expected = self.reference(images[0, channel].double().numpy(), 29)
            np.testing.assert_allclose(found[0, channel], expected, atol=1e-4)

    def test_equals_the_grid_sampling_of_the_published_network(self):
        images = random_images(2, 3, 32, 48).float()
        theta = torch.tensor([[1.0, 0, 1 / 48 - 1 / 299], [0, 1, 1 / 32 - 1 / 299]]).expand(2, 2, 3)
        grid = torch.nn.functional.affine_grid(theta, [2, 3, 299, 299], align_corners=False)
        expected = torch.nn.functional.grid_sample(
            images, grid, mode="bilinear", padding_mode="border", align_corners=False
        )
        torch.testing.assert_close(resize_tensorflow(images, 299), expected, atol=0.02, rtol=0)

    @pytest.mark.parametrize("shape", [(8, 8), (40, 30), (300, 310)])
    def test_of_pytorch_fid_aligns_pixel_centres(self, shape):
        images = random_images(1, 1, *shape)
        found = preprocess_pytorch_fid(images)[0, 0]
        pixels = images[0, 0].double().numpy() / 255
        height, width = shape
        for i, j in [(0, 0), (1, 298), (17, 140), (150, 3), (298, 298)]:
            y = np.clip((i + 0.5) * height / 299 - 0.5, 0, height - 1)
            x = np.clip((j + 0.5) * width / 299 - 0.5, 0, width - 1)
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
            top = pixels[y0, x0] * (1 - (x - x0)) + pixels[y0, x1] * (x - x0)
            bottom = pixels[y1, x0] * (1 - (x - x0)) + pixels[y1, x1] * (x - x0)
            expected = 2 * (top * (1 - (y - y0)) + bottom * (y - y0)) - 1
            assert found[i, j].item() == pytest.approx(expected, abs=1e-5)

    def test_leaves_images_of_the_right_size_alone_and_scales_to_minus_1_to_1(self):
        images = random_images(1, 3, 299, 299)
        images[0, 0, 0, :2] = torch.tensor([0, 255])
        found = preprocess_tensorflow(images)
        torch.testing.assert_close(found, (images.float() - 128) / 128, rtol=0, atol=0)
        assert found[0, 0, 0, :2].tolist() == [-1, 127 / 128]


class TestLayout:
    def test_has_the_published_number_of_parameters_and_tensors(self):
        with torch.device("meta"):
            network = Inception()
        # 23,834,568 parameters with 1000 classes and no auxiliary head; here there are 1008.
        expected = 23_834_568 + 8 * 2049
        assert sum(parameter.numel() for parameter in network.parameters()) == expected
        names = list(network.state_dict())
        assert len(names) == 94 * 5 + 2
        assert sum(name.endswith("conv.weight") for name in names) == 94

    @pytest.mark.parametrize(
        ("name", "shape"),
        [
            ("Conv2d_1a_3x3.conv.weight", [32, 3, 3, 3]),
            ("Conv2d_4a_3x3.bn.running_var", [192]),
            ("Mixed_5b.branch5x5_2.conv.weight", [64, 48, 5, 5]),
            ("Mixed_5b.branch_pool.conv.weight", [32, 192, 1, 1]),
            ("Mixed_5d.branch3x3dbl_3.conv.weight", [96, 96, 3, 3]),
            ("Mixed_6a.branch3x3.conv.weight", [384, 288, 3, 3]),
            ("Mixed_6b.branch7x7_2.conv.weight", [128, 128, 1, 7]),
            ("Mixed_6b.branch7x7_3.conv.weight", [192, 128, 7, 1]),
            ("Mixed_6d.branch7x7dbl_2.conv.weight", [160, 160, 7, 1]),
            ("Mixed_6e.branch7x7dbl_5.conv.weight", [192, 192, 1, 7]),
            ("Mixed_7a.branch7x7x3_4.conv.weight", [192, 192, 3, 3]),
            ("Mixed_7a.branch3x3_2.bn.bias", [320]),
            ("Mixed_7b.branch3x3_2a.conv.weight", [384, 384, 1, 3]),
            ("Mixed_7c.branch3x3dbl_3b.conv.weight", [384, 384, 3, 1]),
            ("Mixed_7c.branch3x3dbl_1.conv.weight", [448, 2048, 1, 1]),
            ("fc.weight", [1008, 2048]),
            ("fc.bias", [1008]),
        ],
    )
    def test_names_and_shapes_are_those_of_the_published_checkpoint(self, name, shape):
        with torch.device("meta"):
            assert list(Inception().state_dict()[name].shape) == shape

    def test_pools_as_the_tensorflow_graph_does(self):
        with torch.device("meta"):
            network = Inception()
        pools = network.Mixed_7b.pool, network.Mixed_7c.pool
        assert pools == (inception._average_pool, inception._max_pool)
        ones = torch.ones(1, 1, 4, 4)
        assert torch.equal(inception._average_pool(ones), ones)
        assert all(m.eps == 1e-3 for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d))

    def test_takes_images_from_75_pixels_on(self, detector):
        with torch.inference_mode():
            assert detector._network(torch.zeros(1, 3, 75, 75))["features"].shape == (1, 2048)


class TestDetector:
    def test_gives_2048_features_of_images_of_any_size(self, detector):
        features = detector(random_images(2, 3, 32, 32))["features"]
        assert features.shape == (2, 2048)
        assert features.dtype == torch.float32
        assert torch.isfinite(features).all()
        assert features.std(dim=0).mean() > 1e-3
        assert detector(random_images(0, 3, 32, 32))["features"].shape == (0, 2048)

    def test_features_do_not_depend_on_the_other_images(self, detector, monkeypatch):
        images = random_images(3, 3, 32, 32)
        whole = detector(images)["features"]
        monkeypatch.setattr(InceptionDetector, "_max_batch", 2)
        torch.testing.assert_close(detector(images)["features"], whole, rtol=1e-4, atol=1e-5)

    def test_repeats_a_gray_channel(self, detector):
        gray = random_images(1, 1, 16, 16)
        rgb = gray.expand(-1, 3, -1, -1)
        torch.testing.assert_close(detector(gray)["features"], detector(rgb)["features"])

    def test_computes_in_float32_whatever_the_caller_allows(self, detector):
        images = random_images(1, 3, 16, 16)
        expected = detector(images)["features"]
        with torch.autocast("cpu", torch.bfloat16):
            found = detector(images)["features"]
        assert torch.equal(found, expected)

    def test_refuses_other_types_and_channel_counts(self, detector):
        with pytest.raises(ValueError, match=r"torch\.float32 .* expected uint8"):
            detector(torch.zeros(1, 3, 8, 8))
        with pytest.raises(ValueError, match=r"\[1, 4, 8, 8\]; expected .* 1 or 3 channels"):
            detector(torch.zeros(1, 4, 8, 8, dtype=torch.uint8))

    def test_hash_follows_weights_and_not_the_file_format(self, detector, checkpoint, tmp_path):
        state = torch.load(checkpoint, weights_only=True)
        path = tmp_path / "other.pth"
        torch.save(state, path)
        assert InceptionDetector.load(str(path), "cpu").hash == detector.hash
        state["fc.bias"][0] += 1
        torch.save(state, path)
        assert InceptionDetector.load(str(path), "cpu").hash != detector.hash

    def test_gives_any_outputs_in_one_pass(self, detector):
        images = random_images(2, 3, 32, 32)
        captured = {}
        branch = detector._network.Mixed_6d.branch1x1
        hook = branch.register_forward_hook(lambda module, args, out: captured.update(out=out))
        together = detector(images, ("features", "spatial", "logits"))
        hook.remove()
        assert {name: values.shape[1] for name, values in together.items()} == detector.outputs
        for name, values in together.items():
            torch.testing.assert_close(detector(images, (name,))[name], values)
        # 17x17 positions of 7 channels, channels last.
        expected = captured["out"][:, :7].permute(0, 2, 3, 1).reshape(2, 2023)
        torch.testing.assert_close(together["spatial"], expected)
        assert expected.std() > 0
        # The Inception Score takes no bias.
        logits = together["features"] @ detector._network.fc.weight.T
        torch.testing.assert_close(together["logits"], logits)
        assert detector._network.fc.bias.abs().max() > 0.01

    def test_computes_no_more_than_the_spatial_features_if_they_are_all(self, detector):
        def refuse(*args):
            raise AssertionError("a later layer was computed")

        hook = detector._network.Mixed_7a.register_forward_hook(refuse)
        try:
            assert detector(random_images(1, 3, 32, 32), ("spatial",))["spatial"].shape == (1, 2023)
            with pytest.raises(AssertionError, match="later layer"):
                detector(random_images(1, 3, 32, 32))
        finally:
            hook.remove()

    def test_has_two_input_conventions_with_hashes_of_their_own(self, detector, checkpoint):
        other = get_detector("inception", "cpu", location=str(checkpoint), convention="pytorch-fid")
        assert other.hash != detector.hash
        assert "TensorFlow-style" in detector.preprocessing
        assert "half-pixel" in other.preprocessing
        images = random_images(2, 3, 32, 32)
        found = other(images)["features"]
        assert (found - detector(images)["features"]).abs().max() > 1e-3
        expected = other._network(preprocess_pytorch_fid(images))["features"]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match=r"'pytorchfid'; .* mean 'pytorch-fid'"):
            get_detector("inception", "cpu", location=str(checkpoint), convention="pytorchfid")

    def test_computes_in_bfloat16_where_asked_and_says_so(self, detector, checkpoint):
        lower = get_detector("inception", "cpu", location=str(checkpoint), precision="bfloat16")
        assert (detector.precision, lower.precision) == ("float32", "bfloat16")
        assert lower.hash != detector.hash
        images = random_images(2, 3, 32, 32)
        found, expected = lower(images)["features"], detector(images)["features"]
        assert found.dtype == torch.float32
        difference = (found - expected).norm() / expected.norm()
        assert 1e-4 < difference < 0.1
        with pytest.raises(ValueError, match="'half' of a detector; accepted: float32, bfloat16"):
            get_detector("inception", "cpu", location=str(checkpoint), precision="half")


class TestWeights:
    def altered(self, checkpoint, tmp_path, change):
        state = torch.load(checkpoint, weights_only=True)
        change(state)
        path = tmp_path / "altered.pth"
        torch.save(state, path)
        return str(path)

    def test_load_exactly_with_or_without_batch_counters(self, checkpoint, detector, tmp_path):
        def add_counters(state):
            for name in [name for name in state if name.endswith("running_var")]:
                counter = name.replace("running_var", "num_batches_tracked")
                state[counter] = torch.tensor(7)

        path = self.altered(checkpoint, tmp_path, add_counters)
        expected = torch.load(checkpoint, weights_only=True)
        for found in (read_weights(path), read_weights(str(checkpoint))):
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in expected)
        loaded = detector._network.state_dict()
        assert all(torch.equal(loaded[name], expected[name]) for name in expected)

    def test_that_are_missing_or_unknown_or_of_another_shape_are_named(self, checkpoint, tmp_path):
        def lose(state):
            del state["Mixed_7c.branch1x1.conv.weight"]

        def gain(state):
            state["AuxLogits.fc.weight"] = torch.zeros(1)

        def torchvision(state):
            state["fc.weight"] = torch.zeros(1000, 2048)

        with pytest.raises(ValueError, match=r"1 weights missing: Mixed_7c\.branch1x1"):
            read_weights(self.altered(checkpoint, tmp_path, lose))
        with pytest.raises(ValueError, match=r"1 weights unknown: AuxLogits"):
            read_weights(self.altered(checkpoint, tmp_path, gain))
        with pytest.raises(ValueError, match=r"fc\.weight has .* \[1000, 2048\], expected \[1008"):
            read_weights(self.altered(checkpoint, tmp_path, torchvision))

    @pytest.mark.filterwarnings("ignore:Detected pickle protocol")
    @pytest.mark.parametrize("protocol", [2, 4])
    def test_that_would_execute_code_are_refused_unexecuted(self, protocol, tmp_path):
        path, mark = tmp_path / "malicious.pth", tmp_path / "executed"
        path.write_bytes(pickle.dumps({"fc.weight": Executes(mark)}, protocol=protocol))
        pickle.loads(path.read_bytes())
        assert mark.exists()
        mark.unlink()
        with pytest.raises(ValueError, match=r"malicious\.pth: refused, .* execute code"):
            read_weights(str(path))
        torch.save({"fc.weight": Executes(mark)}, path)
        with pytest.raises(ValueError, match=r"malicious\.pth: refused, .* execute code"):
            read_weights(str(path))
        assert not mark.exists()

    def test_in_files_of_another_kind_are_refused(self, checkpoint, tmp_path):
        path = tmp_path / "file.pth"
        with pytest.raises(ValueError, match=r"file\.pth: no such file"):
            read_weights(str(path))
        path.write_bytes(checkpoint.read_bytes()[:1000])
        with pytest.raises(ValueError, match=r"file\.pth: damaged"):
            read_weights(str(path))
        path.write_text("<html>not found</html>")
        with pytest.raises(ValueError, match=r"file\.pth: damaged"):
            read_weights(str(path))
        torch.save([torch.zeros(1)], path)
        with pytest.raises(ValueError, match="holds no names with tensors"):
            read_weights(str(path))

    def test_come_from_the_environment_or_the_published_address(self, checkpoint, monkeypatch):
        asked = []

        def fetch(location, sha256=None, **bounds):
            asked.append((location, sha256))
            return checkpoint

        monkeypatch.setattr("metrics.weights.fetch", fetch)
        monkeypatch.delenv(inception.WEIGHTS_VARIABLE, raising=False)
        read_weights()
        assert asked == [(inception.WEIGHTS_URL, inception.WEIGHTS_SHA256)]
        # The published name ends with the first digits of the checksum.
        assert inception.WEIGHTS_URL.endswith(f"-{inception.WEIGHTS_SHA256[:8]}.pth")
        monkeypatch.setenv(inception.WEIGHTS_VARIABLE, "/some/where.pth")
        InceptionDetector.load(None, "cpu")
        assert asked[-1] == ("/some/where.pth", None)

    def test_that_cannot_be_downloaded_say_what_to_do(self, monkeypatch):
        def fetch(location, sha256=None, **bounds):
            raise ValueError(f"Could not download {location}.")

        monkeypatch.setattr("metrics.weights.fetch", fetch)
        with pytest.raises(ValueError, match=r"Could not download .*\$SETDIFFIT_INCEPTION"):
            read_weights()


class Executes:
    """An object whose unpickling creates a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))
