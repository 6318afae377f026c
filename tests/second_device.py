"""A device beside the CPU, in this process: its tensors meet no others, as those of a GPU.

What computes on it shows that code puts every tensor where it belongs, without a GPU.
"""

import contextlib
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from torch_utils import distributed

_NAME = "second"
_MOVES = ("aten._to_copy.default", "aten.copy_.default")
_READS_BACK = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.equal")


class SecondTensor(torch.Tensor):
    """A tensor of the device; ``here`` is the one of the CPU that does its work."""

    def __new__(cls, here):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            here.size(),
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=torch.device(_NAME, 0),
        )

    def __init__(self, here):
        self.here = here

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _compute(function, args, kwargs or {})

    def __repr__(self):
        return f"SecondTensor({self.here})"

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copy = self.detach().clone().requires_grad_(self.requires_grad)
            is_parameter = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = torch.nn.Parameter(copy, self.requires_grad) if is_parameter else copy
        return memo[id(self)]

    def data_ptr(self):
        return self.here.data_ptr()

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, **kwargs):
        raise TypeError("a tensor of the second device is no array of NumPy: use Tensor.cpu()")

    __array__ = numpy


def _is_there(device):
    return device is not None and torch.device(device).type == _NAME


def _compute(function, args, kwargs):
    composite = "CompositeImplicitAutograd"
    if torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), composite):
        with _Factories():
            return function.decompose(*args, **kwargs)
    name, wanted = str(function), kwargs.get("device")
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
    theirs = [own for own in tensors if isinstance(own, SecondTensor)]
    for own in tensors if theirs and name not in _MOVES else ():
        # As on a GPU, numbers without dimensions may come from the CPU, but not as indices.
        if not isinstance(own, SecondTensor) and (own.ndim or name.startswith("aten.index")):
            raise RuntimeError(f"{name}: {tuple(own.shape)} of the CPU among the second device's")
    here_args, here_kwargs = tree_map_only(SecondTensor, lambda own: own.here, (args, kwargs))
    if _is_there(wanted):
        here_kwargs["device"] = torch.device("cpu")
    out = function(*here_args, **here_kwargs)
    is_theirs = _is_there(wanted) or (theirs and wanted is None)
    if name == "aten.copy_.default":
        is_theirs = isinstance(args[0], SecondTensor)
    if not is_theirs or name.startswith("aten._local_scalar_dense"):
        return out
    return return_and_correct_aliasing(
        function, args, kwargs, tree_map_only(torch.Tensor, SecondTensor, out)
    )


class _Factories(TorchDispatchMode):
    """Makes tensors on the device where code asks for them."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _compute(function, args, kwargs or {})


class _Constants(TorchFunctionMode):
    """Does the same for what torch makes of Python's numbers, which no dispatch mode sees."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch.tensor, torch.as_tensor) and _is_there(kwargs.get("device")):
            device = kwargs.pop("device")
            return function(*args, **kwargs).to(device)
        if function is torch.Tensor.new_tensor and isinstance(args[0], SecondTensor):
            dtype = kwargs.get("dtype", args[0].dtype)
            return torch.tensor(args[1], dtype=dtype).to(args[0].device)
        return function(*args, **kwargs)


class _Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu" if _is_there(device) else device)


class _Module:
    """What torch asks the module of a device."""

    def is_initialized(self):
        return True

    is_available = is_initialized

    def _is_in_bad_fork(self):
        return False

    def current_device(self):
        return 0

    def device_count(self):
        return 1

    def manual_seed_all(self, seed):
        pass

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]


_setup_privateuseone_for_python_backend(_NAME, _Module())
_LIBRARY = torch.library.Library("_", "IMPL")
_LIBRARY.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")


@contextlib.contextmanager
def second_device():
    """Let runs within use the device; yields it."""
    device, begin = torch.device(_NAME, 0), distributed.init

    def init(*args):
        begin(*args)
        return device

    with (
        mock.patch.object(distributed, "init", init),
        mock.patch.object(torch, "Generator", _Generator),
        _Factories(),
        _Constants(),
    ):
        yield device
