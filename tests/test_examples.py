"""The job files in examples/: what they call exists, and means what it says."""

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import helpers
import pytest
import yaml

EXAMPLES = Path(__file__).parents[1] / "examples"


def kubernetes_args():
    (container,) = _pod()["containers"]
    assert container["args"][0] == "torchrun"
    return container["args"][1:]


def _pod():
    job = yaml.safe_load((EXAMPLES / "kubernetes.yaml").read_text())
    return job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]


def slurm_args():
    text = (EXAMPLES / "slurm.sh").read_text().replace("\\\n", " ")
    (line,) = re.findall(r"torchrun (.+) \|\| failed", text)
    return shlex.split(line.replace("$OUTDIR", "runs/ffhq64"))


def elastic_args():
    text = (EXAMPLES / "elastic.sh").read_text().replace("\\\n", " ")
    (line,) = re.findall(r"torchrun (.+) 2> >", text)
    return shlex.split(line)


def docker_args():
    text = (EXAMPLES / "Dockerfile").read_text()
    (line,) = re.findall(r"setdiffit (train\.py .+)", text)
    return shlex.split(line)


@pytest.mark.parametrize("args", [kubernetes_args, slurm_args, elastic_args, docker_args])
def test_the_training_commands_would_run(args):
    own = args()
    own = own[own.index("train.py") + 1 :]
    assert "--resume=auto" in own
    _, description = helpers.dry_run(*own)
    assert "parameters" in description


def test_torchrun_takes_the_options_that_it_is_given():
    from torch.distributed.run import get_args_parser

    for args in (kubernetes_args(), slurm_args()):
        own = [re.sub(r"\$\{?\w+\}?", "1", arg) for arg in args[: args.index("train.py")]]
        parsed = get_args_parser().parse_args([*own, "train.py"])
        assert "SIGUSR1" in parsed.signals_to_handle
        assert parsed.nproc_per_node == "8"
    own = [re.sub(r"\$\{?\w+\}?", "1", arg) for arg in elastic_args()]
    parsed = get_args_parser().parse_args(own[: own.index("train.py") + 1])
    assert (parsed.nnodes, parsed.rdzv_conf) == ("1:4", "store_type=file")


def test_volumes_of_the_pod_are_those_that_it_mounts():
    pod = _pod()
    mounted = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    limit = pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    assert f"--nproc_per_node={limit}" in kubernetes_args()


def test_the_docker_image_copies_what_is_there():
    lines = (EXAMPLES / "Dockerfile").read_text().splitlines()
    (command, *_) = _pod()["containers"][0]["command"]
    assert os.access(EXAMPLES.parent / command, os.X_OK)
    for line in lines:
        for name in line.split()[1:-1] if line.startswith("COPY") else ():
            assert (EXAMPLES.parent / name).exists()


_PROGRAMS = {
    # As the scheduler's and torch's programs, in the folder that the job runs in.
    "scontrol": 'if [ "$1" = show ]; then echo node1; echo node2; else echo "$@" >> calls; fi',
    "srun": """echo "srun $@" >> calls
[ -n "$REQUEUE" ] && touch runs/ffhq64/00000-x/requeue
exit $CODE""",
}


@pytest.mark.parametrize(
    ("code", "wants_to_go_on", "expected"), [(1, True, 0), (1, False, 1), (0, False, 0)]
)
def test_a_job_that_was_stopped_is_queued_again(tmp_path, code, wants_to_go_on, expected):
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    run_dir = tmp_path / "runs" / "ffhq64" / "00000-x"
    run_dir.mkdir(parents=True)
    (run_dir / "requeue").touch()  # Of the job before.
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in _PROGRAMS.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    own = dict(SLURM_JOB_ID="17", SLURM_NNODES="2", SLURM_CPUS_PER_TASK="4")
    own.update(
        SLURM_JOB_NODELIST="node[1-2]", CODE=str(code), REQUEUE="1" if wants_to_go_on else ""
    )
    own["PATH"] = f"{programs}:{os.environ['PATH']}"
    found = subprocess.run(
        ["bash", EXAMPLES / "slurm.sh"], cwd=tmp_path, env={**os.environ, **own}, timeout=30
    )
    assert found.returncode == expected
    calls = (tmp_path / "calls").read_text()
    assert "--rdzv_endpoint=node1:29500" in calls
    assert ("requeue 17" in calls) == wants_to_go_on


def test_nodes_meet_elsewhere_once_a_place_is_closed_and_start_until_the_run_is_complete(tmp_path):
    command = tmp_path / "torchrun"
    command.write_text(
        """#!/bin/bash
echo "$@" >> "$CALLS"
case $(wc -l < "$CALLS") in
    1) exit 1 ;;
    2) echo "torch: RendezvousClosedError" >&2; exit 1 ;;
esac
"""
    )
    command.chmod(0o755)
    own = dict(os.environ, PAUSE="0.3", CALLS=str(tmp_path / "calls"))
    own["PATH"] = f"{tmp_path}:{Path(sys.executable).parent}:{own['PATH']}"
    (tmp_path / "runs" / "ffhq64").mkdir(parents=True)
    (tmp_path / "training").symlink_to(EXAMPLES.parent / "training")
    (tmp_path / "dnnlib").symlink_to(EXAMPLES.parent / "dnnlib")
    script = ["bash", EXAMPLES / "elastic.sh", tmp_path / "job"]
    assert subprocess.run(script, cwd=tmp_path, env=own, timeout=60).returncode == 0
    calls = (tmp_path / "calls").read_text().splitlines()
    places = [re.search(r"--rdzv_id=(\d) --rdzv_endpoint=\S+/job\.(\d) ", call) for call in calls]
    assert [place.groups() for place in places] == [("0", "0"), ("0", "0"), ("1", "1")]


def test_a_container_passes_its_stop_on_and_waits_for_the_state(tmp_path):
    run_dir = tmp_path / "runs" / "00000-x"
    run_dir.mkdir(parents=True)
    command = tmp_path / "torchrun"
    # It ends at a stop, with its saver still at work.
    command.write_text(
        f"#!{sys.executable}\n"
        "import signal, sys, threading\n"
        "from pathlib import Path\n"
        f"sys.path[:0] = [{str(EXAMPLES.parent)!r}]\n"
        "import torch\n"
        "from torch_utils.saver import Saver\n"
        "stop = threading.Event()\n"
        "signal.signal(signal.SIGTERM, lambda *_: stop.set())\n"
        "run_dir = Path(sys.argv[1]) / '00000-x'\n"
        "with Saver(rate=2) as saver:\n"
        "    saver.hold(run_dir / '.saver-00000.lock'); saver.wait()\n"
        "    (run_dir / 'begun').touch()\n"
        "    stop.wait()\n"
        "    region = saver.stage(torch.zeros(10**6))\n"
        "    saver.write_file(run_dir / 'part.safetensors', [region])\n"
        "sys.exit(7)\n"
    )
    command.chmod(0o755)
    own = {name: value for name, value in os.environ.items() if name != "SLURM_JOB_ID"}
    own["PATH"] = f"{Path(sys.executable).parent}:{own['PATH']}"
    script = [EXAMPLES / "train_and_wait.sh", run_dir.parent, command, run_dir.parent]
    process = subprocess.Popen(["bash", *script], cwd=EXAMPLES.parent, env=own)
    deadline = time.monotonic() + 60
    while not (run_dir / "begun").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    assert process.wait(60) == 7
    assert (run_dir / "part.safetensors").is_file()
