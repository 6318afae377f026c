"""Processes that start in milliseconds: forks of one that has loaded PyTorch and the scripts.

What they run is in a process and a session of its own, as if Python had just started it. Tests of
the start itself, or of a launcher, need the real ones.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Libraries that take seconds to load: a fork has them, and modules of the project, from the start
# if the test process has them.
_LIBRARIES = ("diffusers", "transformers", "safetensors", "webdataset", "sklearn", "scipy")
_POLL_SEC = 0.01
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# What a run of a script loads, some of it as late as in the first step of an optimizer.
_LOADED = (
    *("torch", "torch._dynamo", "torch.distributed", "torch.nn.parallel"),
    *("train", "generate", "fid", "dataset_tool", "families.image", "training.loop"),
    *("training.launch", "training.runs", "evaluation.in_loop.images", "torch.nn.attention"),
    *("torch_utils.heartbeat", "torch_utils.meeting", "torch_utils.sharding"),
)


def quiet_environment(**changes):
    """Return this process's environment for another one: one thread, no GPU, no launcher."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in _LAUNCHER and not name.startswith(("TORCHELASTIC_", "SLURM_"))
    }
    return {**kept, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **changes}


class WarmProcess:
    """``python script *args``, with the methods of Popen that tests use."""

    def __init__(self, command, env, stdout, stderr=None):
        self.returncode = None
        words, files = [str(word) for word in command], [str(stdout), str(stderr or stdout)]
        self.pid = _ask(dict(command=words, env=env, files=files, modules=_modules_here()))

    def poll(self):
        if self.returncode is None:
            self.returncode = _ask(dict(poll=self.pid))
        return self.returncode

    def wait(self, timeout):
        return _wait(self, timeout)

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)


class WarmRanks:
    """Ranks that find each other as under torchrun; when one fails, the others are ended."""

    def __init__(self, num_ranks, command, env, stdout, stderr=None):
        import torch.distributed

        # As torchrun does, this process keeps the store, so that no rank has to find a free port.
        self._store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True)
        shared = dict(
            WORLD_SIZE=num_ranks,
            LOCAL_WORLD_SIZE=num_ranks,
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=self._store.port,
            TORCHELASTIC_RUN_ID="test",
            TORCHELASTIC_RESTART_COUNT=0,
            TORCHELASTIC_USE_AGENT_STORE=True,
        )
        self.ranks = []
        for rank in range(num_ranks):
            own = {**shared, "RANK": rank, "LOCAL_RANK": rank}
            own = {**env, **{name: str(value) for name, value in own.items()}}
            self.ranks.append(WarmProcess(command, own, stdout, stderr))

    def poll(self):
        codes = [process.poll() for process in self.ranks]
        if any(codes):
            for process in self.ranks:
                process.send_signal(signal.SIGTERM)
        return None if None in codes else next(filter(None, codes), 0)

    def wait(self, timeout):
        return _wait(self, timeout)

    def send_signal(self, number):
        for process in self.ranks:
            process.send_signal(number)


def _wait(process, timeout):
    deadline = time.monotonic() + timeout
    while (code := process.poll()) is None:
        if time.monotonic() > deadline:
            raise subprocess.TimeoutExpired(f"process {process}", timeout)
        time.sleep(_POLL_SEC)
    return code


def _modules_here():
    """Return the names of the modules of _LIBRARIES and of the project that are loaded here."""
    ours = [path.stem for path in ROOT.iterdir() if path.suffix == ".py" or path.is_dir()]
    tops = {*_LIBRARIES, *ours} - {"tests"}
    return [name for name in sys.modules if name.partition(".")[0] in tops]


_server = None


def _ask(request):
    """Return the answer of this process's server, which the first question starts."""
    global _server
    if _server is None or _server[0] != os.getpid():
        _server = (os.getpid(), *_start_server())
    _, requests, answers = _server
    requests.write(json.dumps(request) + "\n")
    requests.flush()
    answer = answers.readline()
    assert answer, "the process that others are forked from has ended"
    return json.loads(answer)


def _start_server():
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-u", __file__, str(theirs.fileno())],
            cwd=ROOT,
            env=quiet_environment(),
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
    with ours:
        requests, answers = ours.makefile("w"), ours.makefile("r")

    def end():
        requests.close()
        answers.close()
        process.wait()

    atexit.register(end)
    return requests, answers


def _serve(connection):
    """Fork at every request; return what a fork is to run, or None at the end of requests."""
    running = set()
    with connection, connection.makefile("r") as requests, connection.makefile("w") as answers:
        for line in requests:
            request, answer = json.loads(line), None
            if "command" in request:
                for name in request["modules"]:
                    with contextlib.suppress(ImportError):
                        importlib.import_module(name)
                gc.freeze()  # A collection in the fork would copy the memory of all objects.
                answer = os.fork()
                if answer == 0:
                    return request
                running.add(answer)
            else:
                pid, status = os.waitpid(request["poll"], os.WNOHANG)
                if pid:
                    running.remove(pid)
                    answer = os.waitstatus_to_exitcode(status)
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
    for pid in running:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return None


def _become(request):
    """Make of this fork what Python would have started; return the script."""
    os.setsid()
    for descriptor, path in enumerate(request["files"], start=1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, descriptor)
        os.close(file)
    os.environ.clear()
    os.environ.update(request["env"])
    script, *_ = sys.argv = request["command"]
    sys.path[0] = os.path.dirname(script)
    sys.path[1:1] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    return script


def _main():
    sys.path.insert(1, str(ROOT))
    for name in _LOADED:
        importlib.import_module(name)
    request = _serve(socket.socket(fileno=int(sys.argv[1])))
    if request is None:
        return
    script = _become(request)
    main = vars(sys.modules["__main__"])
    main.update(__file__=script, __doc__=None)
    exec(compile(Path(script).read_text(encoding="utf-8"), script, "exec"), main)


if __name__ == "__main__":
    _main()
