"""What benchmark.py compares, how it measures, and memory that does not grow."""

import copy
import dataclasses
import gc
import io
import re
import subprocess
import sys
import tracemalloc
import zipfile
from types import SimpleNamespace

import psutil
import pytest
import torch
from helpers import call, fail, succeed
from PIL import Image

import benchmark as script
import families
from benchmarks import kinds, measure, options, steps
from benchmarks import train as train_benchmark
from benchmarks.distances import benchmark_distances
from benchmarks.kinds import make_pictures
from benchmarks.measure import Clock, interleave, median_ratio, peak_growth
from benchmarks.plain import PlainTMSA, build_plain_network, plain_attention
from benchmarks.steps import PARTS, PlainTrainingSteps, TrainingSteps
from configs import get_preset
from data.images.dataset import ImageDataset
from evaluation.in_loop.images import ImageEvaluator
from evaluation.scoring import RealImages, make_evaluate
from metrics.metric import get_metrics
from models import build_network
from models.architectures.diffit import DiffiTConfig
from models.architectures.latent_diffit import LatentDiffiTConfig
from models.architectures.set_dit import SetDiTConfig
from models.diffit import ResBlock
from models.layers import TMSA, UpsampleConv
from torch_utils.misc import count_parameters, peak_flops
from torch_utils.saver import Saver
from torch_utils.stop_signal import StopSignal
from training.loop import Job, training_loop
from training.run_report.write import RunReport

CPU = torch.device("cpu")
MIB = 2**20


def small_latent_model(**changes):
    config = dict(resolution=32, num_classes=3, num_blocks=2, hidden_dim=12, num_heads=2)
    return LatentDiffiTConfig(**{**config, "latent_downsampling": 4, "base_dim": 4, **changes})


def small_model(**changes):
    config = dict(
        resolution=16,
        num_classes=3,
        augment_dim=9,
        num_stages=3,
        num_blocks=(2, 1, 1),
        base_dim=8,
        hidden_dim=12,
        num_heads=2,
        window=4,
        time_dim=16,
    )
    return DiffiTConfig(**{**config, **changes})


def jolt(network):
    """Move all weights far from their initial values, at which half of the network does nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in network.parameters():
            param.add_(torch.randn(param.shape, generator=generator) * 0.2)
    return network


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    """48 labelled grey 8x8 pictures in 10 classes."""
    model = SimpleNamespace(resolution=8, img_channels=1)
    return make_pictures(tmp_path_factory.mktemp("data"), model, 48)


def tiny_run(dataset, **training):
    """Return the digits preset with a tiny model, fitted to a dataset."""
    run = get_preset("digits").run
    small = dict(num_stages=1, num_blocks=(1,), base_dim=16, num_heads=2, time_dim=16, dropout=0.0)
    return families.of(run).fit(
        dataclasses.replace(
            run,
            model=dataclasses.replace(run.model, **small),
            training=dataclasses.replace(run.training, **training),
            logging=dataclasses.replace(run.logging, workers=0),
        ),
        dataset,
    )


# The baseline.


@pytest.mark.parametrize(
    "config",
    [
        small_model(),
        small_model(window=8),
        small_model(skip="block"),
        small_model(num_classes=0, augment_dim=0),
        small_latent_model(),
        small_latent_model(num_classes=0, learned_variance=True, patch_size=1),
    ],
    ids=str,
)
def test_the_plain_network_computes_the_same_function_and_gradients(config):
    network = jolt(build_network(config)).eval()
    plain = build_plain_network(config).eval()
    plain.load_state_dict(network.state_dict())
    x, c_noise = torch.randn(2, *config.input_shape), torch.randn(2)
    cond = {}
    if config.num_classes:
        cond = dict(label=torch.tensor([2, 0]), augment=torch.randn(2, 9))
    weight = torch.randn(2, config.out_channels, *config.input_shape[1:])
    outputs = []
    for net in (network, plain):
        output = net(x, c_noise, net.context(cond, num=2))
        (output * weight).sum().backward()
        outputs.append(output)
    assert outputs[0].std() > 0.1
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)
    for (name, a), (other, b) in zip(
        network.named_parameters(), plain.named_parameters(), strict=True
    ):
        assert name == other
        # Relative to the largest: gradients of key biases are zero up to rounding.
        scale = max(a.grad.abs().max().item(), 1e-2 * outputs[0].numel())
        torch.testing.assert_close(b.grad, a.grad, rtol=0, atol=1e-4 * scale, msg=name)


@pytest.mark.parametrize("config", [small_model(), small_latent_model()], ids=["unet", "latent"])
def test_the_plain_network_starts_with_the_same_weights_and_no_fast_part(config):
    torch.manual_seed(0)
    network = build_network(config)
    torch.manual_seed(0)
    plain = build_plain_network(config)
    assert plain.state_dict().keys() == network.state_dict().keys()
    for name, value in network.state_dict().items():
        assert torch.equal(plain.state_dict()[name], value), name
    kinds_of_parts = {type(module) for module in plain.modules()}
    assert not kinds_of_parts & {ResBlock, TMSA, UpsampleConv}
    assert PlainTMSA in kinds_of_parts


def test_the_plain_network_has_the_presets_parameter_counts():
    for name in ("cifar10", "ffhq64", "imagenet256"):
        config = get_preset(name).run.model
        with torch.device("meta"):
            assert count_parameters(build_plain_network(config)) == count_parameters(
                build_network(config)
            )


@pytest.mark.parametrize("way", ["film", "lag"])
def test_the_plain_network_of_sets_computes_the_same_function(way):
    small = dict(resolution=8, img_channels=1, patch_size=4, hidden_dim=24, num_blocks=2)
    small |= dict(num_heads=2, hdim=16, encoder_depth=1, encoder_heads=2, encoder_dim_head=8)
    config = SetDiTConfig(mode_conditioning=way, **small)
    network = jolt(build_network(config)).eval()
    plain = build_plain_network(config).eval()
    plain.load_state_dict(network.state_dict())
    cond = {"set": torch.randn(2, config.sample_size, 1, 8, 8)}
    x = torch.randn(2 * config.sample_size, 1, 8, 8)
    outputs = [net(x, torch.ones(len(x)), net.context(cond)) for net in (network, plain)]
    assert outputs[0].std() > 0.1
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)


def test_steps_of_both_sides_are_the_same_training(synthetic):
    dataset = ImageDataset(synthetic, use_labels=True)
    run = tiny_run(dataset, batch=8, lr=1e-3, label_drop=0.2, ema_kimg=0.02)
    sides = [kind(run, dataset, CPU) for kind in (TrainingSteps, PlainTrainingSteps)]
    before = copy.deepcopy(sides[0].network.state_dict())
    clock = Clock(CPU)
    for _ in range(5):
        for side in sides:
            side.step(clock)
    x, c_noise = torch.randn(4, 1, 8, 8), torch.randn(4)
    cond = {"label": torch.arange(4)}

    def outputs(network, weights):
        network.load_state_dict(weights)
        with torch.no_grad():
            return network(x, c_noise, network.context(cond))

    averages = []
    for side in sides:
        weights = side.network.state_dict()
        names = dict(side.network.named_parameters())
        averages.append({**weights, **dict(zip(names, side.average, strict=True))})
    for states in ([side.network.state_dict() for side in sides], averages):
        a, b = (outputs(build_network(run.model), state) for state in states)
        moved = (a - outputs(build_network(run.model), before)).abs().max()
        assert moved > 1e-3
        assert (a - b).abs().max() < 0.02 * moved


def test_a_step_marks_its_parts_in_order(synthetic):
    dataset = ImageDataset(synthetic, use_labels=True)
    for kind in (TrainingSteps, PlainTrainingSteps):
        clock = Clock(CPU)
        side = kind(tiny_run(dataset, batch=4), dataset, CPU)
        clock.start()
        side.step(clock)
        seconds = clock.seconds()
        assert tuple(seconds) == PARTS
        assert all(value > 0 for value in seconds.values())


def test_plain_attention_is_a_softmax_over_keys():
    q, k, v = torch.randn(3, 2, 4, 5, 6).unbind(0)
    bias = torch.randn(4, 5, 5)
    expected = torch.empty_like(v)
    for n in range(2):
        for head in range(4):
            scores = q[n, head] @ k[n, head].T / 6**0.5 + bias[head]
            expected[n, head] = scores.exp() / scores.exp().sum(1, keepdim=True) @ v[n, head]
    torch.testing.assert_close(plain_attention(q, k, v, bias), expected)


# Measuring.


def test_turns_interleave_forwards_and_backwards():
    order = []
    turns = {name: (lambda name=name: order.append(name) or len(order)) for name in "abc"}
    results = interleave(turns, 3)
    assert "".join(order) == "abccbaabc"
    assert results == dict(a=[1, 6, 7], b=[2, 5, 8], c=[3, 4, 9])


def test_processor_time_is_that_of_this_process_and_its_children():
    def work(num):
        for _ in range(num):
            torch.randn(64, 64) @ torch.randn(64, 64)

    spent = measure.spent_by(lambda: work(300), CPU)
    assert 0 < spent.cpu < 1.2 * spent.wall + 0.01
    burn = "import time\nwhile time.process_time() < 0.3: pass"
    spent = measure.spent_by(lambda: subprocess.run([sys.executable, "-c", burn]), CPU)
    assert 0.25 < spent.cpu < 3  # The system counts in hundredths.


def test_cells_of_times_are_medians_and_minima():
    turns = [measure.Spent(*values) for values in ((3.0, 5.0), (1.0, 4.0), (2.0, 9.0))]
    assert measure.time_cells(turns, 10) == ["20", "10", "50", "40"]


def test_the_first_line_says_what_machine_it_is_and_how_busy():
    line = measure.describe_device(CPU)
    assert re.search(
        r"\d+ cores; torch [\d.]+.*; \d+ threads, float32 matrices by mkl; load [\d.]+$", line
    )


def test_the_ratio_is_taken_within_rounds():
    # One round in which the machine was ten times as slow changes nothing.
    assert median_ratio([3.0, 30.0, 3.0], [2.0, 20.0, 2.0]) == 1.5


def test_a_clock_adds_up_parts_with_the_same_name(monkeypatch):
    times = iter([1.0, 2.0, 5.0, 6.5, 6.75])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(times))
    clock = Clock(CPU)
    clock.start()
    for part in ("a", "b", "a", "b"):
        clock.mark(part)
    assert clock.seconds() == dict(a=2.5, b=3.25)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_growth_sees_memory_that_is_freed_again():
    def use(mebibytes):
        torch.ones(mebibytes * MIB // 4).sum()

    use(1)
    assert 60 * MIB < peak_growth(lambda: use(64), CPU) < 80 * MIB
    assert peak_growth(lambda: use(1), CPU) < 16 * MIB


@pytest.mark.parametrize(
    ("name", "arithmetic", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100-PCIE-40GB", "tf32", 156),
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H200", "fp32", 67),
        ("NVIDIA H200 NVL", "bf16", 835.5),
        ("NVIDIA L40S", "tf32", 183),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("NVIDIA GeForce RTX 4090 D", "bf16", None),
        ("NVIDIA L40", "bf16", None),
        ("Tesla T4", "fp32", None),
    ],
)
def test_peaks_are_of_the_named_gpu_without_sparsity(name, arithmetic, tflops):
    assert peak_flops(name, arithmetic) == (None if tflops is None else tflops * 1e12)


def test_synthetic_pictures_are_labelled_png_files_of_the_size_asked_for(synthetic):
    with zipfile.ZipFile(synthetic) as archive:
        names = [name for name in archive.namelist() if name.endswith(".png")]
        assert Image.open(io.BytesIO(archive.read(names[0]))).size == (8, 8)
    dataset = ImageDataset(synthetic, use_labels=True)
    assert len(names) == len(dataset) == 48
    assert (dataset.img_channels, dataset.num_classes) == (1, 10)
    images, _ = dataset.__getitems__(range(48))
    assert len(images.unique(dim=0)) == 48


# The script.


@pytest.fixture
def small_presets(monkeypatch, synthetic):
    """Make every preset a tiny one."""
    dataset = ImageDataset(synthetic, use_labels=True)

    def preset(name, *accepted):
        return SimpleNamespace(run=tiny_run(dataset), num_classes=10)

    monkeypatch.setattr(options, "get_preset", preset)
    monkeypatch.setattr(kinds, "NUM_SYNTHETIC_IMAGES", 64)


@pytest.fixture
def small_latent_presets(monkeypatch):
    """Make every preset a tiny one of latents."""
    run = get_preset("digits-latent").run
    model = dataclasses.replace(run.model, num_blocks=1, hidden_dim=16, num_heads=2)
    preset = SimpleNamespace(run=dataclasses.replace(run, model=model), num_classes=10)
    monkeypatch.setattr(options, "get_preset", lambda name, *accepted: preset)
    monkeypatch.setattr(kinds, "NUM_SYNTHETIC_IMAGES", 64)


def cells(output, row):
    """Return the cells of a table's row."""
    (line,) = [line for line in output.splitlines() if line.startswith(row)]
    return re.split(r"  +", line.strip())[1:]


def test_training_is_compared_in_fp32_and_bf16_and_never_compiled_unasked(
    small_presets, monkeypatch
):
    def refuse(*args, **kwargs):
        raise AssertionError("compiled")

    monkeypatch.setattr(torch, "compile", refuse)
    monkeypatch.setattr(torch.nn.Module, "compile", refuse)
    output = succeed(script, "train", "--batch-gpu=4", "--rounds=1").output
    for part in PARTS:
        assert all(float(cell) >= 0 for cell in cells(output, f"{part}, ms"))
    step = [float(cell) for cell in cells(output, "step, ms")]
    rates = [float(cell) for cell in cells(output, "images/s")]
    assert len(step) == 3
    assert rates == pytest.approx([4000 / ms for ms in step], rel=0.05)
    assert cells(output, "model-FLOPs utilisation") == ["unknown"] * 3
    ratios = [float(cell) for cell in cells(output, "speed")]
    assert ratios == pytest.approx([step[0] / ms for ms in step], abs=0.1)
    assert ratios[0] == 1


def test_utilisation_is_the_share_of_the_peak_of_a_known_device(small_presets, monkeypatch):
    # One GFLOP an image and pass makes three per training step and image.
    monkeypatch.setattr(train_benchmark, "device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(steps, "forward_flops", lambda config: 1e12)
    output = succeed(script, "train", "--batch-gpu=4", "--rounds=1").output
    seconds = [float(cell) / 1000 for cell in cells(output, "step, ms")]
    found = [float(cell.rstrip("%")) for cell in cells(output, "model-FLOPs utilisation")]
    peaks = [19.5, 19.5, 312]
    expected = [100 * 12 / s / peak for s, peak in zip(seconds, peaks, strict=True)]
    assert found == pytest.approx(expected, rel=0.05)


def test_latent_presets_are_measured_on_latents(small_latent_presets):
    output = succeed(script, "train", "--batch-gpu=4", "--rounds=1").output
    assert len(cells(output, "speed")) == 3
    output = succeed(script, "data", "--batch=16", "--batches=2", "--rounds=1").output
    assert "latents of 4x4x4" in output
    assert cells(output, "memory map alone")[-1] == "100%"
    output = succeed(script, "attention", "--batch=2", "--rounds=1", "--calls=1").output
    assert "0: 4x4x16" in output
    output = succeed(script, "sample", "--batch=2", "--steps=2", "--rounds=1").output
    assert float(cells(output, "batch 2, guided")[4]) > 0
    assert "choose an image preset" in fail(script, "metrics")


def test_training_takes_the_users_data(small_presets, synthetic):
    output = succeed(
        script, "train", f"--data={synthetic}", "--batch-gpu=4", "--rounds=1", "--precision=fp32"
    ).output
    assert "this code fp32" in output
    assert "bf16 " not in output
    message = fail(script, "train", "--data=nowhere.zip")
    assert "nowhere.zip: no such file" in message


def test_sampling_tells_what_guidance_costs(small_presets):
    output = succeed(script, "sample", "--batch=2", "--steps=2", "--rounds=1").output
    assert float(cells(output, "batch 2, guided")[4]) > 0
    assert re.search(r"Guidance costs \d\.\d+ times one doubled batch", output)


def test_loading_is_compared_with_bare_decoding(small_presets):
    output = succeed(script, "data", "--batch=16", "--batches=2", "--rounds=1").output
    assert cells(output, "Pillow alone")[-1] == "100%"
    assert float(cells(output, "256x256x1 images")[-2]) > 0
    for row in ("loader, no workers", "loader, 1 worker ", "loader, 2 workers"):
        assert cells(output, row)[-1].endswith("%")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_attention_is_timed_per_stage_and_backend(small_presets, precision):
    short = ("--batch=2", "--rounds=1", "--calls=1")
    output = succeed(script, "attention", f"--precision={precision}", *short).output
    assert "sdpa, ms  explicit, ms  plain, ms" in output
    assert "0: 8x8x16" in output
    assert "Flex attention has no backward pass on a CPU." in output
    assert "--attention=auto means explicit on this device." in output
    output = succeed(script, "attention", f"--precision={precision}", "--no-bias", *short).output
    assert "sdpa, ms  explicit, ms  auto, ms" in output


def test_an_unknown_preset_is_answered_with_the_nearest():
    result = call(script, "train", "--preset=cifar")
    assert result.code == 2
    assert "cifar10" in result.error


def test_options_of_the_model_change_what_is_measured(small_latent_presets):
    short = ("--batch-gpu=2", "--rounds=1", "--precision=fp32")
    counts = []
    for change in ((), ("--num-blocks=2",)):
        output = succeed(script, "train", *short, *change).output
        counts.append(int(re.search(r"([\d,]+) parameters", output)[1].replace(",", "")))
    assert counts[0] < counts[1] < 2 * counts[0]
    message = fail(script, "train", "--num-blcks=2")
    assert "--num-blocks" in message


def test_training_and_sampling_are_compared_with_diffusers(small_latent_presets):
    pytest.importorskip("diffusers")
    both = ("--against=plain,diffusers", "--rounds=1")
    output = succeed(script, "train", *both, "--batch-gpu=2").output
    head = "baseline fp32  diffusers fp32  diffusers bf16  this code fp32  this code bf16"
    assert head in output
    step = [float(cell) for cell in cells(output, "step, ms")]
    ratios = [float(cell) for cell in cells(output, "speed, diffusers fp32 = 1")]
    assert ratios == pytest.approx([step[1] / ms for ms in step], abs=0.1)
    assert len(set(cells(output, "parameters, M"))) <= 2
    output = succeed(script, "sample", *both, "--batch=2", "--steps=2").output
    for name in ("plain network", "diffusers, DDPM"):
        assert float(cells(output, f"batch 2, guided, {name}")[-2]) > 0


def test_the_dit_of_diffusers_has_the_size_of_the_model():
    pytest.importorskip("diffusers")
    from benchmarks.diffusers_sides import build_dit

    run = get_preset("imagenet256-s").run
    with torch.device("meta"):
        network = build_dit(run)
    assert len(network.transformer_blocks) == run.model.num_blocks
    assert network.pos_embed.proj.weight.shape == (384, 4, 2, 2)
    # Each block has a conditioning of its own beside the three quarters that both have.
    sizes = [
        count_parameters(block.attn1) + count_parameters(block.ff)
        for block in network.transformer_blocks
    ]
    assert sizes == [12 * 384**2 + 9 * 384] * 12


def test_comparisons_with_diffusers_say_what_is_missing(monkeypatch):
    message = fail(script, "train", "--against=diffusers")
    assert "cifar10 is not built like the DiT of diffusers" in message
    assert "imagenet256-s" in message
    assert "accepted: plain, diffusers" in fail(script, "sample", "--against=timm")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    message = fail(script, "train", "--preset=digits-latent", "--against=diffusers")
    assert "package diffusers is not installed; pip install diffusers" in message


@pytest.mark.compiled
def test_training_can_be_compiled(small_presets):
    output = succeed(
        script, "train", "--batch-gpu=4", "--rounds=1", "--precision=fp32", "--compile"
    ).output
    assert "batch 4, compiled" in output


# Memory.


class MemoryProbe:
    """Everything that can pile up: Python objects, tensors, traced memory, resident memory."""

    def __init__(self):
        self.rows = []

    def __enter__(self):
        gc.collect()
        gc.freeze()  # Leaves what exists already out of the counts.
        tracemalloc.start()
        return self

    def __exit__(self, *exc):
        tracemalloc.stop()

    def note(self):
        gc.collect()
        objects = gc.get_objects()
        num_bytes = sum(o.nbytes for o in objects if type(o) is torch.Tensor)
        row = dict(
            objects=len(objects),
            tensor_bytes=num_bytes,
            traced=tracemalloc.get_traced_memory()[0],
            resident=psutil.Process().memory_info().rss,
        )
        del objects
        self.rows.append(row)

    def assert_flat(self):
        """Require that the last third of the notes shows what the middle one does."""
        early, late = self.rows[len(self.rows) // 3], self.rows[-1]
        growth = {name: late[name] - early[name] for name in late}
        assert growth["objects"] < 100, growth
        assert growth["tensor_bytes"] < 1000, growth
        assert growth["traced"] < 40_000, growth
        assert growth["resident"] < 3 * MIB, growth


def test_memory_does_not_grow_with_ticks(synthetic, tmp_path, monkeypatch):
    # A report keeps the pictures that it shows, up to 20 MB of them.
    monkeypatch.setattr(RunReport, "write", lambda self: None)
    dataset = ImageDataset(synthetic, use_labels=True)
    run = tiny_run(dataset, batch=32, kimg=30 * 0.064, label_drop=0.1)
    logging = dataclasses.replace(
        run.logging, tick=0.064, snap=5, metrics=("fd_pixels",), metrics_ticks=1, sample_batch=16
    )
    sampling = dataclasses.replace(run.sampling, steps=1)
    run = dataclasses.replace(run, logging=logging, sampling=sampling)
    with MemoryProbe() as probe:
        evaluate = make_evaluate(
            get_metrics(run.logging.metrics), run.detectors, RealImages(dataset), run.model, CPU
        )

        def evaluate_and_note(names, generate):
            rows = evaluate(names, generate)
            probe.note()
            return rows

        run, codec = families.of(run).open_codec(run, dataset, CPU)
        evaluator = ImageEvaluator(run, dataset.class_counts, evaluate_and_note)
        job = Job(config=run, data=dataset, codec=codec, evaluator=evaluator, device=CPU)
        with StopSignal() as stop_signal, Saver() as saver:
            training_loop(job, tmp_path, saver=saver, stop_signal=stop_signal)
    assert len(probe.rows) == 31
    probe.assert_flat()


class TestMetrics:
    def test_all_ways_to_a_distance_agree(self):
        text = benchmark_distances(40, 60, num_rounds=1)
        rows = [line.rsplit(maxsplit=7) for line in text.splitlines()]
        apart = {row[0].strip(): float(row[-1]) for row in rows if row[-1] != "by"}
        assert list(apart)[1:3] == [
            "scipy.linalg.sqrtm",
            "a Cholesky factor, scipy.linalg.eigvalsh",
        ]
        assert max(list(apart.values())[:3]) < 1e-6
        assert apart["plain NumPy, float32"] < 1e-4
        assert apart["scikit-learn"] == 0

    def test_every_way_of_extraction_is_timed(self, synthetic):
        output = succeed(
            script,
            "metrics",
            f"--data={synthetic}",
            "--images=3",
            "--rounds=1",
            "--features=8",
            "--vectors=20",
        ).output
        for name in ("decoding alone", "detector alone, float32", "from files, bfloat16"):
            assert re.search(rf"{name} +[\d.]+", output)
        assert "Precision and recall of 20 vectors" in output
        assert "accepted: fp32, bf16" in fail(script, "metrics", "--precision=fp8")


def test_presets_of_which_nothing_is_measured_are_refused():
    for command in ("train", "sample", "data"):
        message = fail(script, command, "--preset=nanodit")
        assert "--preset: got nanodit, for which there is no benchmark yet" in message
        assert "cifar10" in message
        mistyped = fail(script, command, "--preset=nanodot")
        assert "got 'nanodot'" in mistyped
        assert "nanodit" not in mistyped


def test_states_keep_training_waiting_no_longer_on_a_slow_disk(tmp_path):
    options = ("--preset=digits-latent", "--rounds=1", "--warm-up=0", "--rate=4")
    output = succeed(script, "states", *options, f"--outdir={tmp_path}").output
    rows = {line[:30].strip(): line.split()[-3:] for line in output.splitlines()}
    gigabytes = float(rows["torch.save, and fsync"][0]) / float(rows["torch.save, and fsync"][1])
    stall, _, whole = map(float, rows["this code, 4 MB/s"])
    assert whole > 0.8 * gigabytes * 1000 / 4
    assert stall < whole / 2
    assert not list(tmp_path.iterdir())
