"""Read the tensors of a PyTorch checkpoint without unpickling it: nothing in the file is ever called.

A checkpoint (`torch.save` since 1.6) is a zip archive: `<name>/data.pkl` describes a tree of containers by a pickle program,
and `<name>/data/<key>` holds the bytes of each storage. Python's unpickler runs the callables that such a program names. Here
the program is interpreted instead by a small stack machine that knows only how to build containers. A name of a class or a
function becomes a `Name`, and what the program asks to be made with it a `Made`, which remembers the arguments and does
nothing. The two shapes that PyTorch itself writes, ordered dictionaries and tensors, are recognised by name and rebuilt from
data. An instruction that is not needed for this is refused.

The format of the program is that of `pickletools`, which only parses it (PEP 307, PEP 3154).
"""

from __future__ import annotations

import math
import pickletools
import zipfile
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from longstride.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# torch's storage classes by name
STORAGES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "<i1",
    "ByteStorage": "<u1",
    "BoolStorage": "?",
}
_LARGEST_PROGRAM = 1 << 28  # bytes; the largest published checkpoint's is about 1 MB


@dataclass(frozen=True)
class Name:
    """A class or function that the file names; never imported, never called."""

    module: str
    name: str


@dataclass(eq=False)
class Made:
    """What the file asked to be made by calling something.

    Attributes:
        of: what was to be called, a `Name` in any sensible file.
        arguments: what it was to be called with.
        state: what was to be put into the result; for plain objects their attributes by name.
    """

    of: Any
    arguments: tuple[Any, ...]
    state: Any = None


@dataclass(frozen=True)
class Storage:
    """A one-dimensional piece of memory in the archive."""

    key: str
    dtype: np.dtype[Any]
    count: int


@dataclass(frozen=True)
class TensorEntry:
    """A tensor whose values are still in the archive; strides and offset in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def in_bounds(self) -> bool:
        """Whether all elements lie in the storage."""
        numbers = (self.offset, *self.shape, *self.strides)
        if len(self.shape) != len(self.strides) or any(type(value) is not int or value < 0 for value in numbers):
            return False
        if math.prod(self.shape) > self.storage.count:  # zero strides could blow a few bytes up to anything
            return False
        last = self.offset + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        return 0 in self.shape or last < self.storage.count


def read_archive(path: Path) -> Any:  # noqa: ANN401 - the root of the file is whatever was saved
    """Return the tree of a checkpoint: containers, numbers, text, `TensorEntry`, `Name` and `Made`.

    Raises:
        DataError: not such a checkpoint, damaged, or with an instruction that data never needs.
    """
    with _open(path) as archive:
        entry = archive.getinfo(f"{_root(path, archive)}/data.pkl")
        if entry.file_size > _LARGEST_PROGRAM:
            raise DataError(f"{path} is not a checkpoint of a model: its index alone has {entry.file_size} bytes")
        program = _content(path, archive, entry)
    try:
        return _Machine().run(program)
    except Exception as error:  # whatever a damaged or hostile program trips over
        raise DataError(f"{path} cannot be read as a PyTorch checkpoint: {_line(error)}; download it again") from error


def read_tensors(path: Path, entries: dict[str, TensorEntry]) -> dict[str, np.ndarray]:
    """Return the values of named tensors.

    Raises:
        DataError: a storage is missing, compressed, or has another size than the index says.
    """
    with _open(path) as archive:
        root = _root(path, archive)
        return {name: _read_tensor(path, archive, f"{root}/data/{entry.storage.key}", entry) for name, entry in entries.items()}


def _read_tensor(path: Path, archive: zipfile.ZipFile, member: str, entry: TensorEntry) -> np.ndarray:
    storage = entry.storage
    if not entry.in_bounds:
        raise DataError(f"{path}: a tensor reaches beyond its storage {member}; the file is damaged")
    try:
        info = archive.getinfo(member)
    except KeyError:
        raise DataError(f"{path} has no storage {member}; the file is incomplete") from None
    size = storage.count * storage.dtype.itemsize
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != size:
        raise DataError(f"{path}: the storage {member} does not have the {size} bytes that its index names; download it again")
    flat = np.frombuffer(_content(path, archive, info), storage.dtype)
    strides = tuple(stride * storage.dtype.itemsize for stride in entry.strides)
    return np.lib.stride_tricks.as_strided(flat[entry.offset :], entry.shape, strides).copy()


def _open(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except FileNotFoundError:
        raise DataError(f"checkpoint {path} does not exist") from None
    except Exception as error:  # a damaged directory of the archive raises much else than BadZipFile
        raise DataError(f"{path} is not a PyTorch checkpoint ({_line(error)}), or an incomplete download") from error


def _content(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    try:
        return archive.read(entry)
    except Exception as error:  # so do damaged entries: wrong checksums, broken compression, marks of encryption
        raise DataError(f"{path} is damaged ({_line(error)}); download it again") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _root(path: Path, archive: zipfile.ZipFile) -> str:
    programs = [name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(programs) != 1:
        raise DataError(f"{path} is a zip archive but not a PyTorch checkpoint")
    root = programs[0].split("/")[0]
    order = f"{root}/byteorder"
    if order in archive.namelist() and _content(path, archive, archive.getinfo(order)) != b"little":
        raise DataError(f"{path} was written on a big-endian machine, which is not supported")
    return root


_MARK = object()
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": set,
}
_LITERALS = frozenset(
    "BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES".split()
)
_IGNORED = frozenset(("PROTO", "FRAME"))
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass
class _Machine:
    """The stack machine: its instructions build containers and remember names; none of them calls anything from the file."""

    stack: list[Any] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def run(self, program: bytes) -> Any:  # noqa: ANN401 - the root of the file is whatever was saved
        for opcode, argument, _ in pickletools.genops(program):
            name = opcode.name
            if name == "STOP":
                return self.stack.pop()
            if name in _LITERALS:
                self.stack.append(argument)
            elif name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name]())
            elif name in _TUPLES:
                self.stack[-_TUPLES[name] :] = [tuple(self.stack[-_TUPLES[name] :])]
            elif name not in _IGNORED:
                handler = getattr(self, f"_{name.lower()}", None)
                if handler is None:
                    raise ValueError(f"it holds the instruction {name}, which no model needs")
                handler(argument)
        raise ValueError("its index ends early")

    def _mark(self, _: object) -> None:
        self.stack.append(_MARK)

    def _above_mark(self) -> list[Any]:
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise ValueError("a list has no beginning")
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    def _binput(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    _long_binput = _binput

    def _memoize(self, _: object) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _binget(self, index: int) -> None:
        self.stack.append(self.memo[index])

    _long_binget = _binget

    def _tuple(self, _: object) -> None:
        self.stack.append(tuple(self._above_mark()))

    def _append(self, _: object) -> None:
        item = self.stack.pop()
        self._top(list).append(item)

    def _appends(self, _: object) -> None:
        items = self._above_mark()
        self._top(list).extend(items)

    def _additems(self, _: object) -> None:
        items = self._above_mark()
        self._top(set).update(items)

    def _setitem(self, _: object) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._top(dict)[key] = value

    def _setitems(self, _: object) -> None:
        items = self._above_mark()
        self._top(dict).update(zip(items[::2], items[1::2], strict=True))

    def _top(self, kind: type) -> Any:  # noqa: ANN401 - one of list, set, dict
        if type(self.stack[-1]) is not kind:
            raise ValueError(f"a {kind.__name__} was expected")
        return self.stack[-1]

    def _global(self, argument: str) -> None:
        module, name = argument.split(" ", 1)
        self.stack.append(Name(module, name))

    def _stack_global(self, _: object) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is not str or type(module) is not str:
            raise ValueError("a name is not text")
        self.stack.append(Name(module, name))

    def _reduce(self, _: object) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if type(arguments) is not tuple:
            raise ValueError("arguments are not a tuple")
        self.stack.append(_made(function, arguments))

    _newobj = _reduce

    def _build(self, _: object) -> None:
        state = self.stack.pop()
        # attributes of a dictionary (modules' version numbers) and of a tensor are of no use
        if isinstance(self.stack[-1], Made):
            self.stack[-1].state = state

    def _binpersid(self, _: object) -> None:
        self.stack.append(_storage(self.stack.pop()))


def _made(function: Any, arguments: tuple[Any, ...]) -> Any:  # noqa: ANN401 - whatever the file holds
    if function == Name("collections", "OrderedDict") and not arguments:
        return {}
    if function == Name("torch._utils", "_rebuild_tensor_v2") and len(arguments) >= 4:
        storage, offset, shape, strides = arguments[:4]
        if type(storage) is Storage and type(shape) is tuple and type(strides) is tuple:
            return TensorEntry(storage, offset, shape, strides)
    if function == Name("torch._utils", "_rebuild_parameter") and arguments and type(arguments[0]) is TensorEntry:
        return arguments[0]
    return Made(function, arguments)


def _storage(identity: Any) -> Storage:  # noqa: ANN401 - whatever the file holds
    kind, storage, key, _, count = identity
    if kind != "storage" or type(storage) is not Name or storage.name not in STORAGES or type(count) is not int or count < 0:
        raise ValueError(f"it stores data of the type {getattr(storage, 'name', storage)}, which is not supported")
    if type(key) is not str or not key.isalnum():
        raise ValueError("a storage has no proper name")
    return Storage(key, np.dtype(STORAGES[storage.name]), count)


def attribute(value: Any, *path: str) -> Any:  # noqa: ANN401 - a leaf of whatever the file holds
    """Return what lies at `path` below `value` in dictionaries and attributes of remembered objects, or None."""
    for name in path:
        if isinstance(value, Made):
            value = value.state
        value = value.get(name) if isinstance(value, dict) else None
    return value
