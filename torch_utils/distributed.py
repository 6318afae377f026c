"""Processes started by torchrun, or a single one: the only importer of torch.distributed."""

import contextlib
import ctypes
import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")
_cpu_group: dist.ProcessGroup | None = None


def init() -> torch.device:
    """Join the process group that torchrun describes, and return this rank's device.

    Uses NCCL and ``cuda:LOCAL_RANK`` if there are GPUs, gloo and the CPU otherwise. A plain
    ``python`` run forms no group. Raises ValueError if a node starts more ranks than it has GPUs.
    """
    global _cpu_group
    # Full float32 products everywhere, unless a run asks for less.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if local_rank >= torch.cuda.device_count():
            problem = f"has no GPU: this node has {torch.cuda.device_count()}"
            remedy = "Start at most that many processes with --nproc_per_node."
            raise ValueError(f"Local rank {local_rank} {problem}. {remedy}")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
            # Have this rank killed when torchrun is, so that it does not train beside its
            # successor: a kill of torchrun's group does not reach the session of a rank.
            pr_set_pdeathsig = 1
            ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        settings = dict(timeout=timedelta(hours=1))
        if device.type == "cuda":
            dist.init_process_group("nccl", device_id=device, **settings)
        else:
            dist.init_process_group("gloo", **settings)
        # Signals and Python objects travel over gloo, off the device's path.
        _cpu_group = dist.new_group(backend="gloo", **settings)
    return device


def shutdown() -> None:
    """Leave the process group, if there is one."""
    global _cpu_group
    if dist.is_initialized():
        dist.destroy_process_group()
    _cpu_group = None


def rank() -> int:
    """Return this process's rank among all processes of the run, 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes of the run, 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Return whether this process is the one that prints and writes files."""
    return rank() == 0


def print0(*args: Any, **kwargs: Any) -> None:
    """Print on rank 0 only."""
    if is_main():
        print(*args, **kwargs, flush=True)


def barrier() -> None:
    """Wait until every rank has arrived."""
    if world_size() > 1:
        dist.barrier(group=_cpu_group)


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Return ``tensor`` summed in place over ranks. CPU tensors go over gloo."""
    if world_size() > 1:
        dist.all_reduce(tensor, group=_cpu_group if tensor.device.type == "cpu" else None)
    return tensor


def broadcast_object(value: Any) -> Any:
    """Return rank 0's ``value`` (a small plain object) on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=_cpu_group)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Return every rank's (small) ``value`` in rank order, on every rank. Collective."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=_cpu_group)
    return values


def gather_rows(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return the rows of every rank's ``tensor`` [N, ...] in rank order, on rank 0's CPU.

    Other ranks get None. N may differ between ranks. Collective.
    """
    if world_size() == 1:
        return tensor.cpu()
    tensor = tensor.detach().cpu().contiguous()
    sizes = gather_objects(len(tensor))
    if not is_main():
        if len(tensor):
            dist.send(tensor, dst=0, group=_cpu_group)
        return None
    rows = tensor.new_empty(sum(sizes), *tensor.shape[1:])
    for source, part in enumerate(rows.split(sizes)):
        if source == 0:
            part.copy_(tensor)
        elif len(part):
            dist.recv(part, src=source, group=_cpu_group)
    return rows


def on_main(function: Callable[[], T], broadcast: Callable[[T], T] = broadcast_object) -> T:
    """Run ``function`` on rank 0 and return its (small) result on every rank.

    An exception is raised on every rank, so that no rank waits for a failed one.
    """
    result, error = None, None
    if is_main():
        try:
            result = function()
        except Exception as caught:
            error = _transportable(caught)
    error = broadcast_object(error)
    if error is not None:
        raise error
    return broadcast(result)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Raise an error of any rank's block on every rank, so that none waits. Collective."""
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    for found in gather_objects(None if error is None else _transportable(error)):
        if found is not None:
            raise error or found


def on_main_tree(function: Callable[[], T]) -> T:
    """Like :func:`on_main` for nested dicts, lists and tuples of tensors, of any size."""
    return on_main(function, _broadcast_tree)


def _transportable(error: Exception) -> Exception:
    """Return ``error``, or its text as a ValueError if it cannot be sent to other ranks."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # Whatever keeps it from travelling, its text can.
        return ValueError(f"{type(error).__name__}: {error}")
    return error


def _broadcast_tree(tree: Any) -> Any:
    """Return rank 0's nested dicts and lists of tensors and plain values on every rank.

    Tensors arrive on the CPU. Only rank 0 needs to see the file that the tree came from.
    """
    if world_size() == 1:
        return tree
    tensors: list[torch.Tensor] = []

    def strip(tensor: torch.Tensor) -> torch.Tensor:
        tensors.append(tensor.detach().cpu().contiguous())
        return tensors[-1].to("meta")

    def fill(empty: torch.Tensor) -> torch.Tensor:
        tensor = tensors.pop(0) if is_main() else torch.empty(empty.shape, dtype=empty.dtype)
        dist.broadcast(tensor, src=0, group=_cpu_group)
        return tensor

    return _map_tensors(fill, broadcast_object(_map_tensors(strip, tree) if is_main() else None))


def _map_tensors(function: Callable[[torch.Tensor], torch.Tensor], tree: Any) -> Any:
    """Return nested dicts, lists and tuples with another tensor in the place of each."""
    if isinstance(tree, torch.Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: _map_tensors(function, child) for key, child in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_map_tensors(function, child) for child in tree)
    return tree


def wrap(module: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """Return ``module`` under DistributedDataParallel, or as it is in a single process.

    Parameters are broadcast from rank 0; buffers are constants and are not synchronised again.
    """
    if world_size() == 1:
        return module
    ids = [device] if device.type == "cuda" else None
    wrapped = DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=True)
    # As an attribute, because versions of PyTorch differ in the name of the argument.
    wrapped.broadcast_buffers = False
    return wrapped


def no_sync(module: torch.nn.Module, skip: bool) -> contextlib.AbstractContextManager:
    """Return a context in which backward passes leave gradients unreduced if ``skip``."""
    if skip and isinstance(module, DistributedDataParallel):
        return module.no_sync()
    return contextlib.nullcontext()


class StopSignal:
    """Turns SIGTERM and SIGUSR1 into a step at which all ranks agree to stop.

    Each step starts an asynchronous sum of the ranks' flags on the CPU group and reads the sum
    that the previous step started. Every rank sees the same sums, so every rank stops at the same
    step, and neither the device nor the step waits for the network. Once a signal came, further
    ones are ignored until the process ends: launcher and scheduler often send one each.
    """

    signals = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.received: int | None = None
        self._stop = False
        self._work: dist.Work | None = None
        self._sum = torch.zeros([], dtype=torch.int32)
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        for number in self.signals:
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exc: object) -> None:
        ending = self._stop or self.received is not None
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_IGN if ending else handler)
        if self._work is not None and exc[0] is None:
            self._work.wait()

    def _receive(self, number: int, frame: object) -> None:
        self.received = self.received or number

    def name_received(self) -> str:
        """Return the name of the signal, or of the fact that another rank got one."""
        return signal.Signals(self.received).name if self.received else "a signal to another rank"

    def agreed(self) -> bool:
        """Return True on every rank at the same call once any rank got a signal. Collective."""
        if world_size() == 1:
            return self.received is not None
        if self._work is not None:
            self._work.wait()
            self._stop = bool(self._sum)
        self._sum = torch.tensor(int(self.received is not None), dtype=torch.int32)
        self._work = dist.all_reduce(self._sum, group=_cpu_group, async_op=True)
        return self._stop
