"""Distillation as it is typed: students of every kind, their snapshots, resumed runs, refusals."""

import json
import random
import signal
import time

import pytest
import torch
from feature_files import tiny_features
from helpers import (
    TINY_FEATURES,
    TINY_LATENT,
    fail,
    set_snapshot,
    succeed,
    toy_data,
    train_tiny,
    trained_snapshot,
)
from latent_files import tiny_autoencoder
from training_runs import TINY, assert_same_run, final_state, num_rows, only_run

import fid
import generate
import setdiffit
import train as train_script
from training.checkpoint import find_snapshots, load_snapshot


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return tmp_path_factory.getbasetemp()


def distil(outdir, teacher, *args):
    """Train students in this process; return their run folder and what was printed."""
    before = set(outdir.iterdir()) if outdir.is_dir() else set()
    quick = ("--lr-rampup=0", "--tick=1000", "--board=none", f"--outdir={outdir}")
    result = succeed(train_script, f"--distill={teacher}", *quick, *args)
    (run_dir,) = set(outdir.iterdir()) - before
    return run_dir, result.output


def teacher_of(kind, base):
    if kind == "image":
        return trained_snapshot(base)
    if kind == "sets":
        return set_snapshot(base)
    outdir, tiny, data = base / f"teacher-{kind}", TINY_FEATURES, None
    if kind == "features":
        data = tiny_features(base / "features")
    else:
        data = toy_data(base)
        tiny = [*TINY_LATENT, f"--vae={tiny_autoencoder(base / 'distilled-vae')}"]
        tiny += ["--label-drop=0.2"]
    return find_snapshots(train_tiny(outdir, data, tiny=tiny).run_dir)[0]


GUIDED = {
    "image": ("--distill-cfg-scale=2",),
    "latent": ("--distill-cfg-scale=2",),
    "sets": ("--distill-cfg-scale=2",),
    "features": ("--distill-text-scale=3", "--distill-visual-scale=2"),
}
ASKED = {"sets": ("--episodes=1", "--split=unseen"), "features": ("--prompt=a red house",)}


@pytest.mark.parametrize("kind", GUIDED)
def test_students_of_every_kind_are_sampled_as_they_were_trained(kind, base, tmp_path):
    teacher = teacher_of(kind, base)
    options = ("--iters=3", "--distill-steps=4,2,1", *GUIDED[kind])
    run_dir, output = distil(tmp_path / "runs", teacher, *options)
    assert "Stage 3 of 3: 1 sampling steps, from 2 of the teacher." in output
    found = [load_snapshot(path) for path in reversed(find_snapshots(run_dir))]
    assert [snapshot.config.sampling.steps for snapshot in found] == [4, 2, 1]
    for snapshot in found:
        config = snapshot.config
        assert config.sampling.sampler == "euler"
        assert config.guidance == config.guidance.switched_off()
        assert config.distillation.distill_steps == (4, 2, 1)
        assert config.distillation.guidance != config.guidance
    asked = (f"--network={found[0].path}", "--num=2", *ASKED.get(kind, ()))
    succeed(generate, *asked, f"--outdir={tmp_path / 'made'}")
    note = json.loads((tmp_path / "made" / "generation.json").read_text())
    assert note["sampling"]["steps"] == 4
    message = fail(generate, *asked, f"--outdir={tmp_path / 'more'}", "--steps=2")
    assert "is a student of 4 sampling steps" in message
    name = "text" if kind == "features" else "cfg"
    refused = fail(generate, *asked, f"--outdir={tmp_path / 'more'}", f"--{name}-scale=2")
    assert f"--{name}-scale: got 2.0, but" in refused


@pytest.mark.parametrize("kind", ["image", "sets"])
def test_what_students_need_is_told_before_they_are_trained(kind, base):
    teacher = teacher_of(kind, base)
    words = (f"--distill={teacher}", *GUIDED[kind], "--distill-steps=2,1", "--iters=4", "--dry-run")
    output = succeed(train_script, *words).output
    assert "students of 2, 1 sampling steps, of 2 optimizer steps" in output
    assert "a rank: weights" in output


def test_scores_and_the_python_interface_take_the_steps_of_a_student(base, tmp_path):
    options = ("--iters=2", "--distill-steps=2,1")
    run_dir, _ = distil(tmp_path / "runs", trained_snapshot(base), *options)
    network, row = find_snapshots(run_dir)[0], tmp_path / "row.json"
    words = (f"--network={network}", f"--ref={toy_data(base)}", "--metrics=fd_pixels")
    words += (f"--json={row}", "--num-images=8")
    succeed(fid, "calc", *words)
    assert json.loads(row.read_text())["rows"][0]["nfe"] == 1
    message = fail(fid, "calc", *words, "--steps=2")
    assert "--steps: got 2, but" in message
    assert "is a student of 1 sampling steps" in message
    model = setdiffit.load(network, device="cpu")
    assert len(model.generate(seeds=2)) == 2
    with pytest.raises(ValueError, match="is a student of 1 sampling steps"):
        model.generate(seeds=2, sampler="heun")


def test_a_stage_begins_with_the_averaged_weights_of_the_one_before(base, tmp_path):
    options = ("--iters=6", "--distill-steps=2,1", "--lr=1e-12", "--lr-final=1e-12")
    run_dir, _ = distil(tmp_path, trained_snapshot(base), *options)
    teacher = load_snapshot(trained_snapshot(base)).state_dict
    state = final_state(run_dir)
    # With next to no learning, all of them stay what the teacher was.
    for weights in (state["net"], state["ema"], state["distillation"]["teacher"]):
        torch.testing.assert_close(weights, teacher, rtol=0, atol=1e-8)
    assert state["distillation"]["stage"] == 1

    run_dir, _ = distil(tmp_path, trained_snapshot(base), *options, "--lr=0.01")
    first = load_snapshot(find_snapshots(run_dir)[1])
    assert first.config.sampling.steps == 2
    state = final_state(run_dir)
    torch.testing.assert_close(state["distillation"]["teacher"], first.state_dict, rtol=0, atol=0)
    moments = state["optimizer"]["adam"]["state"].values()
    assert {int(own["step"]) for own in moments} == {3}


def test_a_student_can_be_a_teacher_on_its_own_noise_levels(base, tmp_path):
    run_dir, _ = distil(tmp_path, trained_snapshot(base), "--iters=1", "--distill-steps=4")
    student = find_snapshots(run_dir)[0]
    run_dir, _ = distil(tmp_path, student, "--iters=2")
    sampling = [load_snapshot(path).config.sampling for path in find_snapshots(run_dir)]
    assert [(own.steps, own.grid_steps) for own in sampling] == [(1, 8), (2, 8)]
    refused = (f"--distill={student}", f"--outdir={tmp_path}")
    assert "begin with 2" in fail(train_script, *refused, "--distill-steps=4,2")
    assert "with other noise levels" in fail(train_script, *refused, "--sigma-max=40")
    last = find_snapshots(run_dir)[0]
    assert "cannot be halved" in fail(train_script, f"--distill={last}", f"--outdir={tmp_path}")


def test_a_distillation_killed_before_and_after_a_boundary_equals_the_uninterrupted_one(
    train, digits_zip, tmp_path
):
    tiny = [word for word in TINY if not word.startswith("--kimg")]
    teacher = train(f"--outdir={tmp_path / 'teacher'}", *tiny, "--kimg=0.2", warm=True)
    teacher.finish()
    snapshot = find_snapshots(only_run(tmp_path / "teacher"))[0]
    options = (f"--distill={snapshot}", "--distill-steps=4,2,1", "--kimg=2", "--tick=0.2")
    options += ("--dump=1", "--snap=2", "--dropout=0.1", "--lr-rampup=0.5", "--resume=auto")
    train(f"--outdir={tmp_path / 'whole'}", *options, warm=True).finish()
    command = (f"--outdir={tmp_path / 'killed'}", *options)
    stages = set()
    for rows in (2, 6):  # The stages end in the fourth tick and in the eighth.
        process = train(*command, warm=True)
        process.wait_until(lambda rows=rows: num_rows(tmp_path / "killed") >= rows)
        time.sleep(random.uniform(0, 0.1))
        process.send(signal.SIGKILL)
        process.kill()
        stages.add(final_state(only_run(tmp_path / "killed"))["distillation"]["stage"])
    assert len(stages) == 2
    train(*command, warm=True).finish()
    assert_same_run(only_run(tmp_path / "killed"), only_run(tmp_path / "whole"))
