"""Whatever computes on a GPU puts all tensors there, shown on a device that needs none."""

import numpy as np
import pytest
import torch
from helpers import TINY, TINY_FEATURES, TINY_LATENT, TINY_SETS, succeed, toy_data, train_tiny
from latent_files import tiny_latents
from PIL import Image
from second_device import second_device

import generate
import train
from training.checkpoint import find_snapshots, load_snapshot

pytestmark = pytest.mark.usefixtures("one_cpu_thread")

KINDS = {
    "image": (toy_data, [*TINY, "--cond", "--augment=0.2", "--ema-stds=0.1"], ["--cfg-scale=2"]),
    "latent": (tiny_latents, [*TINY_LATENT, "--clip-grad=1"], ["--cfg-scale=2"]),
    "sets": (toy_data, [*TINY_SETS, "--context-drop=0.2"], ["--episodes=1"]),
    "features": (None, TINY_FEATURES, ["--prompt=a red square"]),
}


def images_of(network, outdir, *options):
    succeed(generate, f"--network={network}", f"--outdir={outdir}", "--steps=2", *options)
    paths = sorted(outdir.rglob("*.png"))
    assert paths
    return np.stack([np.asarray(Image.open(path)) for path in paths]).astype(int)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_model_trains_and_samples_as_on_the_cpu(kind, feature_base, tmp_path):
    make, tiny, asked = KINDS[kind]
    data = feature_base / "features" if kind == "features" else make(tmp_path)
    with second_device():
        run_dir = train_tiny(tmp_path / "runs", data, "--batch=4", "--iters=1", tiny=tiny).run_dir
        network = find_snapshots(run_dir)[0]
        images = images_of(network, tmp_path / "there", "--seeds=0,1", *asked)
    same = images_of(network, tmp_path / "here", "--seeds=0,1", *asked)
    assert abs(images - same).max() <= 1


def test_a_run_resumes_exactly(tmp_path):
    options = ("--batch=4", "--tick=0")
    with second_device():
        data, snapshots = toy_data(tmp_path), []
        for name, iters in (("a", 1), ("b", 2)):
            run_dir = train_tiny(tmp_path / name, data, *options, f"--iters={iters}").run_dir
            if iters == 1:
                succeed(train, f"--resume={run_dir}", "--iters=2")
            snapshots.append(load_snapshot(find_snapshots(run_dir)[0]).build().state_dict())
    torch.testing.assert_close(*snapshots, rtol=0, atol=0)


def test_tensors_of_two_devices_do_not_meet():
    with second_device() as device:
        x = torch.ones(3, device=device)
        with pytest.raises(RuntimeError, match="of the CPU among the second device's"):
            x + torch.ones(3)
        assert (x + torch.tensor(1.0)).tolist() == [2.0, 2.0, 2.0]
