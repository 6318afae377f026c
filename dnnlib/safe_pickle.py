"""Reads pickles of plain containers and NumPy arrays without executing anything in them."""

import pickle
from typing import IO, Any

import numpy as np


def load(file: IO[bytes]) -> Any:
    """Return the content of a pickle made of containers, numbers, text, bytes and NumPy arrays.

    Byte strings of Python 2 come back as bytes. Nothing outside a fixed list of array constructors
    can be called: a pickle that names anything else, or that is damaged, raises ValueError with
    the reason (without the name of the file, which the caller knows).
    """
    try:
        return _PlainUnpickler(file, encoding="bytes").load()
    except _ForbiddenGlobalError as error:
        raise ValueError(
            f"it would run {error}, which data never needs, so that nothing of it was read"
        ) from None
    except MemoryError:
        raise ValueError("it is damaged: it asks for more memory than there is") from None
    except Exception as error:  # A damaged pickle can fail in any way inside the unpickler.
        raise ValueError(f"it is not a readable pickle ({type(error).__name__}: {error})") from None


class _ForbiddenGlobalError(pickle.UnpicklingError):
    pass


def _encode_latin1(text: str, encoding: str = "latin1") -> bytes:
    # Python 3 writes bytes this way under protocol 2. The real function takes any codec.
    if encoding not in ("latin1", b"latin1"):
        raise _ForbiddenGlobalError(f"_codecs.encode with codec {encoding!r}")
    return text.encode("latin1")


_reconstruct = np.empty(0).__reduce__()[0]
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _encode_latin1,
}


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise _ForbiddenGlobalError(f"{module}.{name}")
        return _ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise _ForbiddenGlobalError(f"the external reference {pid!r}")
