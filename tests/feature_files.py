"""Tiny random encoders, photographs with captions and feature folders for tests."""

import functools
import hashlib
import json
import re
from unittest import mock

import numpy as np
import torch
from helpers import succeed
from latent_files import tiny_autoencoder
from PIL import Image
from sharing import place_copy

import dataset_tool
from data.features.config import SPLITS
from data.features.manifests import Manifest, read_manifest
from data.features.record import KEYS
from data.features.shards import Tally, from_npy, write_shard

BUCKETS = "128x128,160x96,96x160"
NUM_PICTURES = 17
# Words that captions of the photographs are of; the tokenizer knows no others.
_WORDS = "a the of in red pink old temple flower roof petals sky wide tall square detail photograph"


def tiny_visual(folder, *, seed=0, patch_size=16, num_registers=4, dim=32):
    """Write a random DINOv3 of two blocks; return its folder."""
    import transformers

    config = transformers.DINOv3ViTConfig(
        patch_size=patch_size,
        num_register_tokens=num_registers,
        hidden_size=dim,
        intermediate_size=2 * dim,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=128,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = transformers.DINOv3ViTModel(config)
        for name, value in network.named_parameters():
            # Initial values are so small that patches would hardly differ.
            if value.ndim > 1:
                torch.nn.init.normal_(value, std=0.02 if "token" in name else 0.1)
    network.save_pretrained(folder)
    return folder


def tiny_text(folder, *, seed=0, dim=32, words=_WORDS):
    """Write a random T5 of two blocks, and a tokenizer of words; return their folder."""
    import tokenizers
    import transformers

    vocabulary = ["<pad>", "</s>", "<unk>", *words.split()]
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    config = transformers.T5Config(
        vocab_size=len(vocabulary),
        d_model=dim,
        d_kv=8,
        d_ff=2 * dim,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = transformers.T5EncoderModel(config)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_encoders(base):
    """Write an autoencoder, a visual and a text encoder to ``base``; return the options of them."""
    vae, visual, text = base / "vae", base / "visual", base / "text"
    if not vae.is_dir():
        tiny_autoencoder(
            vae,
            latent_channels=16,
            num_stages=4,
            width=4,
            scaling_factor=0.3611,
            shift_factor=0.1159,
        )
    if not visual.is_dir():
        tiny_visual(visual)
    if not text.is_dir():
        tiny_text(text)
    return (f"--vae={vae}", f"--visual={visual}", f"--text={text}")


@functools.cache
def photographs():
    """Return two photographs of 640x427, a temple and a flower."""
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(pixels) for pixels in load_sample_images().images]


# Name, number of the photograph, left, top, width, height and caption. Every bucket has some, and
# not as many as the others: eight square ones, five wide and four tall.
_PICTURES = [
    ("square/temple.png", 0, 100, 20, 400, 400, "the old temple in the sky"),
    ("square/flower.jpg", 1, 120, 10, 390, 410, "a red flower"),
    ("square/roof.png", 0, 60, 30, 150, 150, "detail of the temple roof"),
    ("square/petals.jpg", 1, 200, 100, 200, 190, "petals of the pink flower in detail"),
    ("square/wall.png", 0, 300, 200, 140, 150, "the old temple in red"),
    ("square/leaf.png", 1, 0, 200, 130, 130, "a tall square detail in a photograph"),
    ("square/sky.jpg", 0, 0, 0, 128, 128, "sky"),
    ("square/middle.png", 1, 250, 150, 128, 128, "the pink of the petals"),
    ("wide/temple.png", 0, 0, 0, 640, 400, "wide photograph of a temple"),
    ("wide/flower.jpg", 1, 0, 40, 600, 350, "the flower"),
    ("wide/sky.png", 0, 0, 0, 320, 180, "a wide sky"),
    ("wide/roof.png", 0, 200, 100, 300, 180, "the roof of the old temple in a wide photograph"),
    ("wide/petals.jpg", 1, 100, 100, 330, 200, "wide petals"),
    ("tall/temple.jpg", 0, 250, 0, 250, 420, "tall temple photograph in red and gold"),
    ("tall/flower.png", 1, 180, 0, 240, 400, "tall pink flower"),
    ("tall/roof.png", 0, 50, 50, 170, 300, "a tall roof in the sky"),
    ("tall/petals.jpg", 1, 300, 100, 150, 260, "old petals of the flower"),
]


def write_pictures(folder, *, with_captions=True):
    """Write 17 photographs of three shapes, and captions beside them; return the folder."""
    for name, number, left, top, width, height, caption in _PICTURES:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = photographs()[number].crop((left, top, left + width, top + height))
        picture.save(path, **(dict(quality=95) if path.suffix == ".jpg" else {}))
        if with_captions:
            path.with_suffix(".txt").write_text(caption + "\n")
    return folder


def prepare(source, dest, encoders, *options):
    """Run ``dataset_tool.py features`` in this process, with success; return what it printed.

    ``encoders`` are the options of :func:`tiny_encoders`.
    """
    command = ("features", f"--source={source}", f"--dest={dest}", f"--buckets={BUCKETS}")
    return succeed(dataset_tool, *command, "--workers=2", *encoders, *options).output


def tiny_features(base, *options, name="features"):
    """Return a feature folder of :func:`write_pictures`, made once per folder and name.

    The photographs are in ``base``/pictures, the encoders in ``base``/vae, visual and text. It has
    two samples a shard, and validation samples of every bucket.
    """
    dest = base / name
    if dest.is_dir():
        return dest
    if not options and name == "features" and not (base / "vae").exists():
        place_copy(base, "tiny-features", _prepare_features)
        return dest
    pictures = base / "pictures"
    if not pictures.is_dir():
        write_pictures(pictures)
    prepare(pictures, dest, tiny_encoders(base), "--shard-size=2", *options)
    return dest


def _prepare_features(folder):
    write_pictures(folder / "pictures")
    encoders = tiny_encoders(folder)
    prepare(folder / "pictures", folder / "features", encoders, "--shard-size=2")


def sample_arrays(folder, manifest, row):
    """Return the arrays of a sample by key, read at the places that its manifest names."""
    arrays = {}
    with open(manifest.files[manifest.shard[row]], "rb") as file:
        for key in manifest.offset:
            if key != "json":
                file.seek(manifest.offset[key][row])
                arrays[key] = np.array(from_npy(file.read(int(manifest.size[key][row]))))
    return arrays


def rewrite_shards(folder, change):
    """Write all shards anew after ``change(description, members)``, and manifests to match.

    The moments in the manifests stay, as does the record.
    """
    for file in sorted(folder.glob("*/bucket_*/manifest.json")):
        split, bucket = file.parent.parent.name, file.parent.name.removeprefix("bucket_")
        manifest = read_manifest(folder, split, bucket)
        shards = []
        for number, path in enumerate(manifest.files):
            data, samples = path.read_bytes(), []
            for row in np.flatnonzero(manifest.shard == number):
                members = {}
                for key in KEYS:
                    start = manifest.offset[key][row]
                    members[key] = data[start : start + manifest.size[key][row]]
                description = json.loads(members.pop("json"))
                change(description, members)
                samples.append((manifest.ids[row], description, members))
            with mock.patch.object(Tally, "add"):  # Changed values may have no moments.
                index = write_shard(path, split, bucket, samples)
            index.shards[0]["moments"] = manifest.shards[number]["moments"]
            shards.append(index)
        new = Manifest.join(file.parent, split, bucket, shards)
        file.write_text(json.dumps(new.to_dict()))


def made(output):
    """Return how many features of each kind, and shards, a run made."""
    if "complete already" in output:
        return 0, 0, 0, 0
    found = re.search(r"Made: (\d+) vae, (\d+) visual, (\d+) text .*\nWrote (\d+) shard", output)
    return tuple(map(int, found.groups()))


def read_manifests(folder):
    for split in SPLITS:
        for name in BUCKETS.split(","):
            yield read_manifest(folder, split, name)


def read_samples(folder):
    """Return description and arrays of every sample by file name."""
    result = {}
    for manifest in read_manifests(folder):
        for row in range(len(manifest)):
            data = manifest.files[manifest.shard[row]].read_bytes()
            start = manifest.offset["json"][row]
            description = json.loads(data[start : start + manifest.size["json"][row]])
            result[description["file"]] = description, sample_arrays(folder, manifest, row)
    return result


def content(folder):
    """Return the bytes of every file that is not about a place or a time, by name."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (".lock", "images.jsonl", "preparing.json")
    }


def place_of(folder, file, key):
    """Return shard, offset and size of a member, given the image's file name."""
    for manifest in read_manifests(folder):
        name = hashlib.sha256(file.encode()).hexdigest()[:16]
        if name in manifest.ids:
            row = manifest.ids.index(name)
            shard = manifest.files[manifest.shard[row]]
            return shard, int(manifest.offset[key][row]), int(manifest.size[key][row])
    raise AssertionError(file)


def flip_byte(folder, file, key, position=-5):
    path, offset, size = place_of(folder, file, key)
    data = bytearray(path.read_bytes())
    data[offset + position % size] ^= 64
    path.write_bytes(data)
