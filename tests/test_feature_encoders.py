"""Visual and text encoders: which tokens they give, sizes, masks, identities and refusals."""

import contextlib
import shutil
import sys

import numpy as np
import pytest
import torch
from feature_files import photographs, tiny_text, tiny_visual
from safetensors.torch import load_file, save_file

from data.features.buckets import Bucket, fit_image
from encoders.text import MAX_TOKENS, load_text_encoder
from encoders.visual import load_visual_encoder
from torch_utils import distributed


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders")
    tiny_visual(folder / "visual")
    tiny_visual(folder / "visual-14", patch_size=14)
    tiny_text(folder / "text")
    return folder


def images(bucket, num=2):
    pictures = [fit_image(image, bucket)[0] for image in photographs()[:num]]
    return torch.stack([torch.as_tensor(np.array(p)).permute(2, 0, 1) for p in pictures])


@pytest.mark.parametrize(("rank", "local_rank", "turn"), [(0, 0, 1), (1, 1, 3), (8, 0, 2)])
def test_one_rank_of_every_node_reads_before_the_others(rank, local_rank, turn, monkeypatch):
    begun = []

    @contextlib.contextmanager
    def together():
        begun.append(True)
        yield

    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(distributed, "together", together)
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    assert distributed.in_turn(lambda: len(begun)) == turn
    assert len(begun) == 3


def test_cls_and_patches_are_those_of_the_network_without_registers(base):
    import transformers

    encoder = load_visual_encoder(base / "visual", "cpu")
    assert (encoder.patch_size, encoder.num_registers, encoder.dim) == (16, 4, 32)
    x = images(Bucket(160, 96))
    cls, patches = encoder.encode(x)
    network = transformers.DINOv3ViTModel.from_pretrained(base / "visual").eval()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        out = network((x / 255 - mean[:, None, None]) / std[:, None, None])
    torch.testing.assert_close(cls, out.pooler_output)
    assert patches.shape == (2, 60, 32)
    torch.testing.assert_close(patches, out.last_hidden_state[:, 5:])


@pytest.mark.parametrize("name", ["visual", "visual-14"])
def test_a_corner_of_an_image_changes_the_patch_in_that_corner_most(base, name):
    encoder = load_visual_encoder(base / name, "cpu")
    x = images(Bucket(160, 96))
    rows, columns = Bucket(160, 96).grid(encoder.patch_size)
    for row, column in ((0, 0), (0, columns - 1), (rows - 1, 0)):
        other = x.clone()
        top, left = row * 96 // rows, column * 160 // columns
        other[:, :, top + 2 : top + 8, left + 2 : left + 8] ^= 255
        change = (encoder.encode(other)[1] - encoder.encode(x)[1]).square().sum(2)
        order = change.argsort(dim=1, descending=True)
        assert (order[:, 0] == row * columns + column).all()
        assert (change[0, order[0, 0]] > 5 * change[0, order[0, 1]]).all()


def test_a_patch_size_that_does_not_divide_the_image_has_it_resized_not_cropped(base):
    encoder = load_visual_encoder(base / "visual-14", "cpu")
    x = images(Bucket(160, 96))
    patches = encoder.encode(x)[1]
    assert patches.shape == (2, 7 * 11, 32)
    # The last pixels count, which a network left alone would cut off.
    other = x.clone()
    other[:, :, -2:] = 0
    assert (encoder.encode(other)[1] - patches).abs()[:, -11:].amax() > 0.05


def test_what_an_image_or_caption_gives_does_not_depend_on_its_batch(base, monkeypatch):
    visual, text = (
        load_visual_encoder(base / "visual", "cpu"),
        load_text_encoder(base / "text", "cpu"),
    )
    x = images(Bucket(128, 128))
    captions = ["the old temple", "a red flower in the wide sky of pink petals"]
    cls, patches = visual.encode(x)
    hidden, mask, _ = text.encode(captions)
    monkeypatch.setattr("encoders.visual._MAX_PIXELS", 1)
    monkeypatch.setattr("encoders.text._MAX_BATCH_TOKENS", 1)
    for found, expected in zip(visual.encode(x), (cls, patches), strict=True):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(text.encode(captions)[0], hidden)
    alone = text.encode(captions[:1])[0][0]
    torch.testing.assert_close(alone, hidden[0, : len(alone)])
    assert mask.sum(1).tolist() == [4, 11]
    assert not hidden[0, 4:].any()


def test_bfloat16_products_are_close_and_results_float32(base):
    encoder = load_visual_encoder(base / "visual", "cpu")
    x = images(Bucket(128, 128))
    expected = encoder.encode(x)
    half = load_visual_encoder(base / "visual", "cpu", precision="bf16")
    found = half.encode(x)
    assert found[1].dtype == torch.float32
    assert 1e-4 < (found[1] - expected[1]).abs().max() < 0.2
    text, half = (load_text_encoder(base / "text", "cpu", precision=p) for p in ("fp32", "bf16"))
    found, expected = (e.encode(["the old temple"])[0] for e in (half, text))
    assert 1e-5 < (found - expected).abs().max() < 0.1


def test_long_captions_are_cut_to_the_most_tokens_with_the_end_kept(base):
    encoder = load_text_encoder(base / "text", "cpu")
    fits, long = ("red " * (MAX_TOKENS - 1)).strip(), "red " * 600
    hidden, mask, num_truncated = encoder.encode([fits, long, "the sky"])
    assert hidden.shape == (3, MAX_TOKENS, 32)
    assert mask.sum(1).tolist() == [MAX_TOKENS, MAX_TOKENS, 3]
    assert num_truncated == 1
    rows, truncated = encoder.tokenize([fits, long])
    assert rows[0] == rows[1]  # Both end with the end of sequence.
    assert rows[0][-1] == 1
    assert truncated == [False, True]
    assert encoder.encode([])[0].shape == (0, 0, 32)


def test_hashes_tell_encoders_apart_and_survive_a_copy(base, tmp_path):
    visual, text = (
        load_visual_encoder(base / "visual", "cpu"),
        load_text_encoder(base / "text", "cpu"),
    )
    shutil.copytree(base / "visual", tmp_path / "copy")
    assert load_visual_encoder(tmp_path / "copy", "cpu").sha256 == visual.sha256
    load_visual_encoder(tmp_path / "copy", "cpu", expected_hash=visual.sha256, precision="bf16")
    others = [
        load_visual_encoder(tiny_visual(tmp_path / "a", seed=1), "cpu").sha256,
        load_visual_encoder(base / "visual-14", "cpu").sha256,
        load_text_encoder(tiny_text(tmp_path / "b", seed=1), "cpu").sha256,
        text.sha256,
        visual.sha256,
    ]
    words = "the a of in red pink old temple flower roof petals sky wide tall square detail x"
    tokens = tiny_text(tmp_path / "c", words=words)
    others.append(load_text_encoder(tokens, "cpu").sha256)
    assert len(set(others)) == len(others)
    with pytest.raises(ValueError, match=r"--text: .* is another encoder"):
        load_text_encoder(tokens, "cpu", expected_hash=text.sha256)


def test_what_is_no_encoder_is_one_sentence(base, tmp_path, monkeypatch):
    for location, part in [
        ("nothing", "is neither a folder nor a Hugging Face id. Give --visual=FOLDER"),
        (str(tmp_path), "holds no encoder (no config.json)"),
        (str(base / "text"), "it holds a model of type 't5', not dinov3_vit"),
    ]:
        with pytest.raises(ValueError) as error:
            load_visual_encoder(location, "cpu")
        assert part in str(error.value)
        assert "\n" not in str(error.value)
    broken = shutil.copytree(base / "text", tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    del weights["encoder.final_layer_norm.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 weights are missing: encoder\.final_layer_norm"):
        load_text_encoder(broken, "cpu")
    pickled = shutil.copytree(base / "visual", tmp_path / "pickled")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"--visual: .* cannot be used"):
        load_visual_encoder(pickled, "cpu")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"pip install transformers"):
        load_text_encoder(base / "text", "cpu")
