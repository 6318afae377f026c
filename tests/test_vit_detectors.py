"""DINOv2 and CLIP as detectors: real loading code on tiny random networks in the real layout."""

import json
import logging
import math
import sys
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from PIL import Image

from encoders.loading import Pretrained
from metrics.detectors import get_detector
from metrics.vit import resize_positions

transformers = pytest.importorskip("transformers")
load_file = pytest.importorskip("safetensors.torch").load_file


@pytest.fixture(scope="module")
def dinov2_folder(tmp_path_factory):
    return helpers.tiny_dinov2(tmp_path_factory.mktemp("dinov2"))


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return helpers.tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def dinov2(dinov2_folder):
    return get_detector("dinov2", "cpu", location=str(dinov2_folder))


@pytest.fixture(scope="module")
def clip(clip_folder):
    return get_detector("clip", "cpu", location=str(clip_folder))


def random_images(num, channels=3, size=32, seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (num, channels, size, size), dtype=np.uint8))


def resized(image, size):
    """Antialiased bicubic resize of one channel by Pillow, which uses the same kernel."""
    picture = Image.fromarray(image.numpy().astype(np.float32), mode="F")
    return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC))


class TestPreprocessing:
    @pytest.mark.parametrize("size", [32, 224, 300])
    def test_of_dinov2_is_antialiased_bicubic_and_the_statistics_of_imagenet(self, dinov2, size):
        images = random_images(1, size=size)
        found = dinov2._preprocess(images)
        assert found.shape == (1, 3, 224, 224)
        for channel, (mean, std) in enumerate([(0.485, 0.229), (0.456, 0.224), (0.406, 0.225)]):
            expected = (resized(images[0, channel], 224) / 255 - mean) / std
            np.testing.assert_allclose(found[0, channel], expected, atol=1e-3)

    def test_of_clip_is_at_its_own_size_with_its_own_statistics(self, clip):
        images = random_images(1, size=64)
        found = clip._preprocess(images)
        expected = (resized(images[0, 2], 42) / 255 - 0.40821073) / 0.27577711
        np.testing.assert_allclose(found[0, 2], expected, atol=1e-3)
        assert "42" in clip.preprocessing


class TestDinoV2:
    def test_feature_is_the_normalised_class_token(self, dinov2, dinov2_folder):
        images = random_images(2)
        found = dinov2(images)["features"]
        assert dinov2.outputs == {"features": 24}
        network = transformers.Dinov2Model.from_pretrained(dinov2_folder).eval()
        positions = network.embeddings.position_embeddings
        positions.data = resize_positions(positions.data, 16)
        with torch.inference_mode():
            expected = network(pixel_values=dinov2._preprocess(images)).pooler_output
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        # A layer norm comes last.
        torch.testing.assert_close(found.mean(1), torch.zeros(2), atol=1e-5, rtol=0)

    def test_positions_are_resized_by_the_published_scale_and_kept_at_their_own_grid(self):
        """Bicubic (a = -0.75) at source positions (i + 0.5) / scale - 0.5, scale = 16.1 / 37."""
        positions = torch.randn(1, 1 + 37 * 37, 2, generator=torch.Generator().manual_seed(0))
        found = resize_positions(positions, 16)
        assert found.shape == (1, 1 + 16 * 16, 2)
        torch.testing.assert_close(found[:, 0], positions[:, 0])
        grid = positions[0, 1:, 0].reshape(37, 37).double().numpy()

        def weights(i):
            source = (i + 0.5) * 37 / 16.1 - 0.5
            low = math.floor(source)
            result = np.zeros(37)
            for j in range(low - 1, low + 3):
                d = abs(source - j)
                if d <= 1:
                    value = 1.25 * d**3 - 2.25 * d**2 + 1
                else:
                    value = -0.75 * (d**3 - 5 * d**2 + 8 * d - 4)
                result[min(max(j, 0), 36)] += value
            return result

        matrix = np.stack([weights(i) for i in range(16)])
        expected = matrix @ grid @ matrix.T
        np.testing.assert_allclose(found[0, 1:, 0].reshape(16, 16), expected, atol=1e-4)
        torch.testing.assert_close(resize_positions(found, 16), found)

    def test_resizes_no_positions_while_it_runs(self, dinov2, monkeypatch):
        def refuse(*args, **kwargs):
            raise AssertionError("positions were resized")

        inputs = dinov2._preprocess(random_images(1))
        monkeypatch.setattr(torch.nn.functional, "interpolate", refuse)
        dinov2._extract(inputs, ("features",))

    def test_of_the_published_size_has_1024_features_of_304_million_weights(self):
        with torch.device("meta"):
            network = transformers.Dinov2Model(
                transformers.Dinov2Config(
                    hidden_size=1024,
                    num_hidden_layers=24,
                    num_attention_heads=16,
                    image_size=518,
                    patch_size=14,
                )
            )
        assert sum(p.numel() for p in network.parameters()) == 304_368_640


class TestClip:
    def test_feature_is_the_image_embedding_at_unit_length(self, clip, clip_folder):
        images = random_images(3)
        found = clip(images)["features"]
        assert clip.outputs == {"features": 10}
        torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
        network = transformers.CLIPVisionModelWithProjection.from_pretrained(clip_folder).eval()
        with torch.inference_mode():
            embeds = network(pixel_values=clip._preprocess(images)).image_embeds
        expected = embeds / embeds.norm(dim=1, keepdim=True)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    def test_of_the_published_size_has_768_features_at_336_pixels(self):
        with torch.device("meta"):
            network = transformers.CLIPVisionModelWithProjection(
                transformers.CLIPVisionConfig(
                    hidden_size=1024,
                    intermediate_size=4096,
                    num_hidden_layers=24,
                    num_attention_heads=16,
                    image_size=336,
                    patch_size=14,
                    projection_dim=768,
                )
            )
        assert network.visual_projection.weight.shape == (768, 1024)
        assert network.vision_model.embeddings.position_embedding.weight.shape == (577, 1024)

    def test_loads_from_the_layout_of_a_whole_clip(self, tmp_path):
        """The published folder holds the text half as well."""
        vision = dict(
            hidden_size=24,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
            projection_dim=8,
        )
        text = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
        config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=8)
        whole = transformers.CLIPModel(config).eval()
        whole.save_pretrained(tmp_path)
        detector = get_detector("clip", "cpu", location=str(tmp_path))
        images = random_images(1)
        with torch.inference_mode():
            pixel_values = detector._preprocess(images)
            pooled = whole.vision_model(pixel_values=pixel_values).pooler_output
            expected = torch.nn.functional.normalize(whole.visual_projection(pooled), dim=1)
        torch.testing.assert_close(detector(images)["features"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["dinov2", "clip"])
class TestBoth:
    @pytest.fixture
    def folder(self, name, dinov2_folder, clip_folder):
        return {"dinov2": dinov2_folder, "clip": clip_folder}[name]

    @pytest.fixture
    def detector(self, name, dinov2, clip):
        return {"dinov2": dinov2, "clip": clip}[name]

    def test_features_do_not_depend_on_the_other_images(self, detector, name, monkeypatch):
        images = random_images(5)
        whole = detector(images)["features"]
        assert whole.std(dim=0).max() > 1e-3
        monkeypatch.setattr(type(detector), "_max_batch", 2)
        torch.testing.assert_close(detector(images)["features"], whole, rtol=1e-4, atol=1e-5)

    def test_gray_counts_as_three_equal_channels_and_others_are_refused(self, detector, name):
        gray = random_images(1, channels=1)
        rgb = gray.expand(-1, 3, -1, -1)
        torch.testing.assert_close(detector(gray)["features"], detector(rgb)["features"])
        with pytest.raises(ValueError, match=rf"The {name} detector got .*\[1, 4, 32, 32\]"):
            detector(random_images(1, channels=4))

    def test_hash_follows_weights_and_arithmetic(self, detector, folder, name, tmp_path):
        same = get_detector(name, "cpu", location=str(folder))
        assert same.hash == detector.hash
        lower = get_detector(name, "cpu", location=str(folder), precision="bfloat16")
        assert lower.hash != detector.hash
        assert lower.precision == "bfloat16"
        images = random_images(2)
        found, expected = lower(images)["features"], detector(images)["features"]
        assert found.dtype == torch.float32
        assert 1e-5 < (found - expected).norm() / expected.norm() < 0.1
        network = type(detector._network).from_pretrained(folder)
        with torch.no_grad():
            next(network.parameters()).add_(0.1)
        network.save_pretrained(tmp_path)
        assert get_detector(name, "cpu", location=str(tmp_path)).hash != detector.hash

    @pytest.mark.parametrize(
        ("setting", "value"),
        [("hidden_act", "relu"), ("layer_norm_eps", 0.01), ("num_attention_heads", 1)],
    )
    def test_hash_follows_settings_that_weights_do_not_show(
        self, detector, folder, name, setting, value, tmp_path
    ):
        config = json.loads((folder / "config.json").read_text())
        assert config[setting] != value
        (tmp_path / "config.json").write_text(json.dumps({**config, setting: value}))
        (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
        other = get_detector(name, "cpu", location=str(tmp_path))
        images = random_images(2)
        assert not torch.equal(other(images)["features"], detector(images)["features"])
        assert other.hash != detector.hash

    def test_what_cannot_be_loaded_is_named_with_the_way_to_go_on(
        self, folder, name, tmp_path, dinov2_folder, clip_folder
    ):
        other = {"dinov2": clip_folder, "clip": dinov2_folder}[name]
        with pytest.raises(ValueError, match=rf"--{name}: .* model of type .*--{name}=FOLDER"):
            get_detector(name, "cpu", location=str(other))
        for absent in ("absent", "/absent", "~/absent", "./absent"):
            with pytest.raises(ValueError, match=rf"--{name}: {absent} is neither a folder nor a"):
                get_detector(name, "cpu", location=absent)
        with pytest.raises(ValueError, match=rf"--{name}: {tmp_path} holds no detector .no config"):
            get_detector(name, "cpu", location=str(tmp_path))
        config = json.loads((folder / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=rf"--{name}: {tmp_path} cannot be used"):
            get_detector(name, "cpu", location=str(tmp_path))
        weights = (folder / "model.safetensors").read_bytes()
        (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
        with pytest.raises(ValueError, match=rf"--{name}: {tmp_path} cannot be used"):
            get_detector(name, "cpu", location=str(tmp_path))
        # Other widths than the weights have.
        (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": 48}))
        (tmp_path / "model.safetensors").write_bytes(weights)
        with pytest.raises(ValueError, match=r"\d+ weights have other shapes .*: \w+\."):
            get_detector(name, "cpu", location=str(tmp_path))
        # More blocks than the weights have: they must not be left at random.
        config["num_hidden_layers"] = 3
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"\d+ weights are missing: "):
            get_detector(name, "cpu", location=str(tmp_path))

    def test_only_tensors_are_read_from_weights_in_a_pickle(self, detector, folder, name, tmp_path):
        """CLIP's published weights are such a file."""
        (tmp_path / "config.json").write_text((folder / "config.json").read_text())
        path, mark = tmp_path / "pytorch_model.bin", tmp_path / "executed"
        weights = load_file(folder / "model.safetensors")
        torch.save(weights, path)
        assert get_detector(name, "cpu", location=str(tmp_path)).hash == detector.hash
        torch.save({**weights, "extra": Executes(mark)}, path)
        with pytest.raises(ValueError, match=rf"--{name}: {tmp_path} cannot be used"):
            get_detector(name, "cpu", location=str(tmp_path))
        assert not mark.exists()
        torch.load(path, weights_only=False)  # The file is one that would.
        assert mark.exists()

    def test_a_missing_connection_is_said_in_one_message_alone(self, name, monkeypatch):
        loggers = [logging.getLogger(library) for library in ("transformers", "huggingface_hub")]
        before = [logger.level for logger in loggers]
        during = []

        def get_config_dict(location):
            during.extend(logger.getEffectiveLevel() for logger in loggers)
            raise OSError("We could not connect.\nMore lines.")

        monkeypatch.setattr(transformers.PretrainedConfig, "get_config_dict", get_config_dict)
        expected = (
            r"some/where is not a folder, and cannot be fetched from Hugging Face "
            rf"\(We could not connect\)\. Give --{name}=FOLDER with [\w. ]+\.$"
        )
        with pytest.raises(ValueError, match=expected):
            get_detector(name, "cpu", location="some/where")
        # Warnings of retries stay away, and come back for others.
        assert min(during) >= logging.ERROR
        assert [logger.level for logger in loggers] == before
        assert max(before) < logging.ERROR

    def test_a_missing_package_is_named(self, folder, name, monkeypatch):
        monkeypatch.setitem(sys.modules, "transformers", None)
        with pytest.raises(ValueError, match=r"needs the package transformers.*pip install"):
            get_detector(name, "cpu", location=str(folder))

    def test_loading_prints_nothing(self, folder, name, capfd):
        get_detector(name, "cpu", location=str(folder))
        captured = capfd.readouterr()
        assert captured.out + captured.err == ""


class Executes:
    """An object whose unpickling creates a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


TWO_PROCESSES = """
import sys
import torch
from metrics.detectors import get_detector
from torch_utils import distributed

device = distributed.init()
torch.manual_seed(0)
# Only the first process finds the folder.
for name, location in zip(("dinov2", "clip"), sys.argv[1:3]):
    location = location if distributed.rank() == 0 else "not-here"
    detector = get_detector(name, device, location=location)
    images = torch.arange(3 * 20 * 20, dtype=torch.uint8).reshape(1, 3, 20, 20)
    total = detector(images)["features"].double().sum().item()
    drawn = torch.rand(()).item()
    print(f"{name} {detector.hash} {total!r} {drawn}\\n", end="", flush=True)
distributed.shutdown()
"""


def test_every_rank_gets_the_weights_that_rank_0_reads(dinov2_folder, clip_folder, tmp_path):
    (tmp_path / "script.py").write_text(TWO_PROCESSES)
    output = helpers.on_ranks(2, tmp_path / "script.py", dinov2_folder, clip_folder)
    lines = output.splitlines()
    assert len(lines) == 4
    assert len(set(lines)) == 2


def test_published_places_are_the_defaults(monkeypatch):
    asked = []

    def load(self, location):
        asked.append(location)
        raise ValueError("no network here")

    monkeypatch.setattr(Pretrained, "load", load)
    for name in ("dinov2", "clip"):
        with pytest.raises(ValueError, match="no network here"):
            get_detector(name, "cpu")
    assert asked == ["facebook/dinov2-large", "openai/clip-vit-large-patch14-336"]
