"""Reads pickles of plain containers and NumPy arrays without executing anything in them."""

import pickle
from collections.abc import Callable
from typing import IO, Any

import numpy as np


def load(file: IO[bytes]) -> Any:
    """Return the content of a pickle made of containers, numbers, text, bytes and NumPy arrays.

    Byte strings of Python 2 come back as bytes. No function or class that a pickle names is ever
    called: those that NumPy's arrays need are played by stand-ins, which check what they are given
    and only keep it. A pickle that names anything else, or that is damaged, raises ValueError with
    the reason (without the name of the file, which the caller knows).
    """
    try:
        return _with_arrays(_PlainUnpickler(file, encoding="bytes").load(), {})
    except _ForbiddenGlobalError as error:
        problem = f"it would run {error}, which data never needs, so nothing of it was read"
        raise ValueError(problem) from None
    except MemoryError:
        raise ValueError("it is damaged: it asks for more memory than there is") from None
    except Exception as error:  # A damaged pickle can fail in any way inside the unpickler.
        raise ValueError(f"it is not a readable pickle ({type(error).__name__}: {error})") from None


class _ForbiddenGlobalError(pickle.UnpicklingError):
    pass


def _text(value: Any) -> Any:
    return value.decode("ascii") if isinstance(value, bytes) else value


class _DType:
    """What a pickle says of an array's numbers: their kind and size, then their byte order."""

    def __init__(self, code: str | bytes, *_: Any) -> None:
        code = _text(code)
        dtype = np.dtype(code) if isinstance(code, str) and len(code) <= 4 else None
        if dtype is None or dtype.kind not in "biuf":
            raise _ForbiddenGlobalError(f"an array of type {code!r}")
        self.dtype = dtype

    def __setstate__(self, state: tuple) -> None:
        order = _text(state[1])
        if order not in ("<", ">", "|", "="):
            raise _ForbiddenGlobalError(f"an array of byte order {order!r}")
        self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """An array in the making: becomes one from plain bytes, of exactly the stated size."""

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, is_fortran, data = state
        if not isinstance(dtype, _DType) or not isinstance(data, bytes):
            raise _ForbiddenGlobalError("an array of objects")
        array = np.frombuffer(data, dtype.dtype)
        self.array = array.reshape(shape, order="F" if is_fortran else "C").copy()


class _StandIn:
    """Something callable that a pickle may name and cannot change."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise _ForbiddenGlobalError("a change of what it may call")


def _encode_latin1(text: str, encoding: str = "latin1") -> bytes:
    # Python 3 writes bytes this way under protocol 2. The real function takes any codec.
    if encoding not in ("latin1", b"latin1"):
        raise _ForbiddenGlobalError(f"_codecs.encode with codec {encoding!r}")
    return text.encode("latin1")


def _from_buffer(data: Any, dtype: Any, shape: Any, order: str, axes: Any = None) -> _Array:
    """Return an array that is contiguous, or is but for its axes, as protocol 5 has it."""
    if not isinstance(dtype, _DType) or not isinstance(data, bytes | bytearray):
        raise _ForbiddenGlobalError("an array of objects")
    flat = np.frombuffer(data, dtype.dtype)
    found = _Array()
    found.array = flat.reshape(shape, order="F" if order == "F" else "C").copy()
    if order == "K" and axes is not None:
        found.array = found.array.transpose(axes)
    return found


_RECONSTRUCT, _FROM_BUFFER = _StandIn(lambda *_: _Array()), _StandIn(_from_buffer)
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy.core.numeric", "_frombuffer"): _FROM_BUFFER,
    ("numpy._core.numeric", "_frombuffer"): _FROM_BUFFER,
    ("numpy", "ndarray"): "numpy.ndarray",  # An argument of the above, and nothing to call.
    ("numpy", "dtype"): _StandIn(_DType),
    ("_codecs", "encode"): _StandIn(_encode_latin1),
}


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise _ForbiddenGlobalError(f"{module}.{name}")
        return _ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise _ForbiddenGlobalError(f"the external reference {pid!r}")


def _with_arrays(value: Any, seen: dict[int, Any]) -> Any:
    """Return ``value`` with finished arrays in the place of those in the making."""
    if isinstance(value, _Array):
        return value.array
    if isinstance(value, tuple):
        return tuple(_with_arrays(child, seen) for child in value)
    if isinstance(value, dict | list) and id(value) not in seen:
        seen[id(value)] = value
        for key, child in list(value.items() if isinstance(value, dict) else enumerate(value)):
            value[key] = _with_arrays(child, seen)
    return value
