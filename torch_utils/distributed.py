"""Processes started by torchrun, or a single one: the only importer of torch.distributed."""

import contextlib
import dataclasses
import functools
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from dnnlib import launcher
from dnnlib.errors import refusal, transportable
from torch_utils.misc import keep_freed_memory
from torch_utils.states import Pieces, map_leaves

T = TypeVar("T")
_MEETING_MINUTES = 5
_MAX_EAGER = 4096  # Tensors of up to so many elements are sent at once even if ``lazily``.
_cpu_group: dist.ProcessGroup | None = None
_heartbeat: Any = None  # A torch_utils.heartbeat.Heartbeat if there are other processes.


def init(hang_limit: float = 5.0) -> torch.device:
    """Join the process group that torchrun describes, and return this rank's device.

    Uses NCCL and ``cuda:LOCAL_RANK`` if there are GPUs, gloo and the CPU otherwise, and switches
    TF32 off. A plain ``python`` run forms no group. Raises ValueError if a node starts more ranks
    than it has GPUs, or if the other processes that the environment announces do not arrive.

    Args:
        hang_limit: Minutes without a sign of life from another rank after which this process ends;
            0 disables the watch.
    """
    global _cpu_group
    joins_others = launcher.joins_others()
    # Full float32 precision everywhere, unless a run asks for less.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local_rank = launcher.number("LOCAL_RANK")
        if local_rank >= torch.cuda.device_count():
            problem = f"has no GPU: this node has {torch.cuda.device_count()}"
            remedy = "Start at most that many processes with --nproc_per_node."
            raise ValueError(f"Local rank {local_rank} {problem}. {remedy}")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    if joins_others and not dist.is_initialized():
        # Each rank has a session of its own, so killing torchrun's process group does not reach
        # it, and it would go on training beside its successor.
        launcher.die_with_launcher(signal.SIGKILL)
        settings = dict(timeout=timedelta(hours=1))
        settings["store"], settings["rank"], settings["world_size"] = _meet(hang_limit)
        if device.type == "cuda":
            dist.init_process_group("nccl", device_id=device, **settings)
        else:
            dist.init_process_group("gloo", **settings)
        # Stop flags and Python objects are exchanged over gloo, which does not involve the device.
        _cpu_group = dist.new_group(backend="gloo", timeout=settings["timeout"])
    return device


def _meet(hang_limit: float) -> tuple[Any, int, int]:
    """Return the store of the processes that start together, this one's rank and their number."""
    from torch_utils.heartbeat import Heartbeat
    from torch_utils.meeting import meet

    global _heartbeat
    num, address = launcher.number("WORLD_SIZE"), os.environ["MASTER_ADDR"]
    port = launcher.number("MASTER_PORT")
    where = f"{address}:{port}"
    if "TORCHELASTIC_RUN_ID" not in os.environ and num > 1:
        number = launcher.number("RANK") + 1
        waiting = f"Process {number} of {num} waits for the other processes at {where}"
        print(f"{waiting}, for {_MEETING_MINUTES} minutes.", file=sys.stderr, flush=True)
    # torchrun hosts the store, unless TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 leaves it to rank 0.
    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    rank, deadline = launcher.number("RANK"), time.monotonic() + 60 * _MEETING_MINUTES
    try:
        store = _connect(address, port, deadline, is_host=rank == 0 and not of_agent)
        # The heartbeat needs its own connection: a waiting call would block it on the other one.
        own = _connect(address, port, deadline)
        name = meet(own, rank, num, deadline)
    except (RuntimeError, OSError) as error:  # OSError includes TimeoutError.
        but = f"not all of {num} processes reached {where} ({str(error).splitlines()[0]})"
        remedy = "start them all with torchrun, or unset WORLD_SIZE for a single process"
        raise refusal("WORLD_SIZE", but=but, remedy=remedy) from error
    if hang_limit and num > 1:
        host = f"{'torchrun' if of_agent else 'rank 0'} at {where}"
        _heartbeat = Heartbeat(own, name, rank, num, limit_sec=60 * hang_limit, host=host)
    store.set_timeout(timedelta(hours=1))
    return dist.PrefixStore(name, store), rank, num


def _connect(address: str, port: int, deadline: float, *, is_host: bool = False) -> Any:
    """Return a connection to the store at an address; ``is_host`` makes this process hold it.

    Raises OSError if no process holds the store there by ``deadline``.
    """
    while not is_host:
        # Python cannot handle signals while the store itself tries to connect.
        try:
            socket.create_connection((address, port), timeout=1).close()
            break
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
    settings = dict(multi_tenant=True, wait_for_workers=False)
    return dist.TCPStore(
        address, port, is_master=is_host, timeout=timedelta(minutes=_MEETING_MINUTES), **settings
    )


def shutdown() -> None:
    """Leave the process group, if there is one."""
    global _cpu_group, _heartbeat
    if _heartbeat is not None:
        _heartbeat.stop()
        _heartbeat = None
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
    """Return whether this process is rank 0, which prints and writes files."""
    return rank() == 0


def print0(*args: Any, **kwargs: Any) -> None:
    """Print on rank 0 only."""
    if is_main():
        print(*args, **kwargs, flush=True)


def _together() -> contextlib.AbstractContextManager:
    """Return a context for an operation of all ranks, so that a missing rank can be named."""
    return contextlib.nullcontext() if _heartbeat is None else _heartbeat.together()


def finish_step(step: str) -> None:
    """Record the step that this rank has finished, for the message if it falls silent."""
    if _heartbeat is not None:
        _heartbeat.finish_step(step)


def barrier() -> None:
    """Wait until every rank has arrived."""
    if world_size() > 1:
        with _together():
            dist.barrier(group=_cpu_group)


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum ``tensor`` over all ranks in place and return it. CPU tensors use gloo. Collective."""
    if world_size() > 1:
        with _together():
            dist.all_reduce(tensor, group=_cpu_group if tensor.device.type == "cpu" else None)
    return tensor


class BackgroundSum:
    """A sum of int32 values over all ranks, on the CPU and in the background. Collective."""

    def __init__(self, value: int) -> None:
        self._sum = torch.tensor(value, dtype=torch.int32)
        self._work = dist.all_reduce(self._sum, group=_cpu_group, async_op=True)

    def wait(self) -> int:
        """Wait for every rank's value and return the sum."""
        with _together():
            self._work.wait()
        return int(self._sum)


def broadcast_object(value: Any) -> Any:
    """Return rank 0's ``value`` (a small picklable object) on every rank. Collective."""
    if world_size() == 1:
        return value
    box = [value]
    with _together():
        dist.broadcast_object_list(box, src=0, group=_cpu_group)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Return every rank's (small) ``value`` in rank order, on every rank. Collective."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    with _together():
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
    with _together():
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
    """Run ``function`` on rank 0 and return its (small) result on every rank. Collective.

    An exception of ``function`` is raised on every rank, so that none waits for a failed one.
    """
    result, error = None, None
    if is_main():
        try:
            result = function()
        except Exception as caught:
            error = transportable(caught)
    error = broadcast_object(error)
    if error is not None:
        raise error
    return broadcast(result)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Raise an error from any rank's block on every rank, so that none waits. Collective.

    A rank whose own block failed raises its own error, the others that of the lowest failed rank.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    for found in gather_objects(None if error is None else transportable(error)):
        if found is not None:
            raise error or found


def in_turn(read: Callable[[], T]) -> T:
    """Return the result of ``read``, called on rank 0, then one rank a node, then on all others.

    Collective. Ranks thus find on the disk of their node, or on one that nodes share, the files
    that another rank has downloaded.
    """
    own = 0 if is_main() else 1 if launcher.number("LOCAL_RANK") == 0 else 2
    box = []
    for turn in range(3):
        with together():
            if turn == own:
                box.append(read())
    return box[0]


@dataclasses.dataclass(frozen=True)
class Remote:
    """A tensor that only rank 0 holds until all ranks fetch it with :meth:`whole`."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    source: Any = None  # The tensor or its Pieces on rank 0, None elsewhere.

    def whole(self) -> torch.Tensor:
        """Return the tensor, on every rank's CPU. Collective."""
        if self.source is None:
            tensor = torch.empty(self.shape, dtype=self.dtype)
        else:
            tensor = self.source.whole() if isinstance(self.source, Pieces) else self.source
            tensor = tensor.detach().cpu().contiguous()
        if world_size() > 1:
            with _together():
                dist.broadcast(tensor, src=0, group=_cpu_group)
        return tensor


def on_main_tree(function: Callable[[], T], lazily: bool = False) -> T:
    """Like :func:`on_main`, for nested dicts, lists and tuples of tensors of any size. Collective.

    Tensors arrive on the CPU. Only rank 0 needs access to the file that the tree comes from. With
    ``lazily``, every rank gets a :class:`Remote` in place of each large tensor.
    """
    return on_main(function, functools.partial(_broadcast_tree, lazily=lazily))


def _broadcast_tree(tree: Any, lazily: bool) -> Any:
    sources: list[Any] = []

    def strip(leaf: Any) -> Remote:
        sources.append(leaf)
        return Remote(tuple(leaf.shape), leaf.dtype)

    def fill(empty: Remote) -> Any:
        source = sources.pop(0) if is_main() else None
        remote = dataclasses.replace(empty, source=source)
        return remote if lazily and math.prod(empty.shape) > _MAX_EAGER else remote.whole()

    stripped = map_leaves(strip, tree, (torch.Tensor, Pieces)) if is_main() else None
    return map_leaves(fill, broadcast_object(stripped), (Remote,))


def wrap(module: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """Return ``module`` wrapped in DistributedDataParallel, or unchanged in a single process.

    Parameters and buffers are broadcast from rank 0. Buffers are constants, so they are not
    synchronised again.
    """
    if world_size() == 1:
        return module
    ids = [device] if device.type == "cuda" else None
    wrapped = DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=True)
    # Set as an attribute, because the name of the argument differs between PyTorch versions.
    wrapped.broadcast_buffers = False
    return wrapped


@contextlib.contextmanager
def no_sync(module: torch.nn.Module, skip: bool) -> Iterator[None]:
    """A context for the forward and backward pass; gradients stay unreduced in it if ``skip``."""
    leaves = skip and isinstance(module, DistributedDataParallel)
    with _together(), module.no_sync() if leaves else contextlib.nullcontext():
        yield
