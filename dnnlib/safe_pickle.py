"""Reads pickles of plain containers and NumPy arrays without executing anything in them."""

import pickle
from collections.abc import Callable
from typing import IO, Any

import numpy as np


def load(file: IO[bytes]) -> Any:
    """Return the content of a pickle made of containers, numbers, text, bytes and NumPy arrays.

    Byte strings of Python 2 come back as bytes. No function or class that a pickle names is ever
    called: stand-ins replace those that NumPy's arrays need, and only check and keep their
    arguments. A pickle that names anything else, or that is damaged, raises ValueError with the
    reason (without the name of the file, which the caller adds).
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
    """Stands in for numpy.dtype: takes the kind and size of numbers, then their byte order."""

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
    """Stands in for an array until its state arrives: bytes of exactly the size its shape needs."""

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, is_fortran, data = state
        if not isinstance(dtype, _DType) or not isinstance(data, bytes):
            raise _ForbiddenGlobalError("an array of objects")
        array = np.frombuffer(data, dtype.dtype)
        self.array = array.reshape(shape, order="F" if is_fortran else "C").copy()


class _StandIn:
    """A callable that a pickle may name but not alter."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise _ForbiddenGlobalError("a change of what it may call")


def _encode_latin1(text: str, encoding: str = "latin1") -> bytes:
    # Python 3 pickles bytes this way with protocol 2. The real function accepts every codec.
    if encoding not in ("latin1", b"latin1"):
        raise _ForbiddenGlobalError(f"_codecs.encode with codec {encoding!r}")
    return text.encode("latin1")


def _from_buffer(data: Any, dtype: Any, shape: Any, order: str, axes: Any = None) -> _Array:
    """Return an array that protocol 5 pickled as contiguous, or as contiguous up to a transpose."""
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
    ("numpy", "ndarray"): "numpy.ndarray",  # Only an argument of _reconstruct.
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
    """Return ``value`` with the arrays of all :class:`_Array` stand-ins in their place.

    Dicts and lists change in place; ``seen`` holds those already visited, by id.
    """
    if isinstance(value, _Array):
        return value.array
    if isinstance(value, tuple):
        return tuple(_with_arrays(child, seen) for child in value)
    if isinstance(value, dict | list) and id(value) not in seen:
        seen[id(value)] = value
        for key, child in list(value.items() if isinstance(value, dict) else enumerate(value)):
            value[key] = _with_arrays(child, seen)
    return value
