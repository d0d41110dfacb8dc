"""The pickles of EDM, EDM2, ECT and TCM, read without running anything in them.

Their networks are objects of NVIDIA's `torch_utils.persistence`: class name, constructor's arguments, state, and the
source text of the class, which is never looked at. Everything that a pickle asks for by name is answered from a short
list, and the answer is a value of our own that cannot be called: what stands for a call is looked up in a table below.
Anything else is refused by name. A storage is a file within the file (torch.save's before PyTorch 1.6); it is read by
the same reader with a shorter list, since torch.load(weights_only=True) ran code from such files before PyTorch 2.6.

The machine is pickle's own in Python, not the one in C: there an extension code or a new instance cannot be intercepted,
and the index of a memo is the size of a table. Sizes and strides are checked against the storage that is there.
"""

import io
import math
import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Final, NoReturn, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fewstep.types import FewstepError

Maker: TypeAlias = Callable[..., Any]

DEPTH: Final = 32  # of modules within modules; EDM's have 4
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of torch.save before PyTorch 1.6
PLAIN = (str, int, float, bytes, type(None))  # what may be a key or in a set: hashing it cannot recurse


@dataclass(eq=False)
class Module:
    """An inert module of a pickle, or another persistent object (a loss, an augmentation pipe): what it was made of."""

    kind: str
    """class name: EDMPrecond, SongUNet, ModuleDict, Dropout"""
    arguments: dict[str, Any] = field(default_factory=dict)
    """the constructor's, by keyword; positional ones under '0', '1', ...; empty for classes of torch.nn"""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """parameters and persistent buffers of its own"""
    children: dict[str, "Module"] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    """everything else in its state"""
    owned: bool = field(default=False, repr=False)
    """is a child of another"""

    def state(self, depth: int = 0) -> dict[str, Tensor]:
        """Parameters and persistent buffers with dotted names, as in a state dict; FewstepError if nested too deep."""
        if depth > DEPTH:
            raise FewstepError(f"a module in the pickle is nested more than {DEPTH} deep: it is no network known here")
        inner = {name: child.state(depth + 1) for name, child in self.children.items()}
        return self.tensors | {f"{name}.{key}": tensor for name, held in inner.items() for key, tensor in held.items()}

    def fill(self, state: Any) -> None:
        """Take over the state of an object as it was pickled."""
        rest = dict(typed(state, Mapping))
        transient = typed(rest.pop("_non_persistent_buffers_set", set()), set)
        tensors = dict(typed(rest.pop("_parameters", {}), dict))
        tensors |= {name: t for name, t in typed(rest.pop("_buffers", {}), dict).items() if name not in transient}
        self.tensors |= {typed(name, str): typed(t, Tensor) for name, t in tensors.items() if t is not None}
        for name, child in typed(rest.pop("_modules", {}), dict).items():
            if child is not None:
                self.adopt(typed(name, str), typed(child, Module))
        positional = typed(rest.pop("_init_args", ()), tuple | list)
        self.arguments |= {str(i): value for i, value in enumerate(positional)}
        self.arguments |= {typed(name, str): held for name, held in typed(rest.pop("_init_kwargs", {}), dict).items()}
        self.attributes |= {typed(name, str): value for name, value in rest.items()}

    def adopt(self, name: str, child: "Module") -> None:
        """A module has one parent only: else a small file could unfold to any size."""
        if child.owned:
            damaged("one module in two places")
        child.owned = True
        self.children[name] = child


def read_pickle(path: Path) -> Any:
    """What the file holds: dicts, lists, tuples, sets, numbers, strings, numpy arrays (as Array), tensors, Modules.

    FewstepError: it asks for anything outside of the list (named), is truncated or damaged, or does not exist.
    """
    try:
        with path.open("rb") as file:
            if file.read(4) == b"PK\x03\x04":
                raise FewstepError(f"{path} is a PyTorch archive and no pickle: name it .pt")
            file.seek(0)
            return Reader(file).load()
    except AskedFor as error:
        raise FewstepError(
            f"{path} asks for {error}: it is not a model, or a dangerous one; nothing in it was run"
        ) from None
    except FewstepError:
        raise
    except OSError as error:
        raise FewstepError(f"{path} cannot be read ({error.strerror}): give a .pkl file") from None
    except Exception as error:  # a damaged pickle may raise anything
        why = " ".join(str(error).split())[:100] or type(error).__name__
        raise FewstepError(
            f"{path} is no whole pickle of a model ({printable(why)}): fetch it again; nothing in it was run"
        ) from None


# ------------------------------------------------------------------------------------------------------ what is refused


class AskedFor(Exception):
    """Something that is not on the list, in its words."""


def asked(what: str) -> NoReturn:
    raise AskedFor(printable(what))


def damaged(why: str) -> NoReturn:
    raise pickle.UnpicklingError(why)


def printable(text: str) -> str:
    """Text of a file, fit to be shown in a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text[:120])


def typed(value: Any, wanted: Any) -> Any:
    """The value, if it is of the wanted type."""
    if not isinstance(value, wanted):
        damaged(f"a {type(value).__name__} where another type belongs")
    return value


# ------------------------------------------------------------------------------------------- what may stand for a call


@dataclass(frozen=True)
class Name:
    """The answer to a name that a pickle may ask for in order to call it."""

    name: str


@dataclass(frozen=True)
class Storage:
    flat: Tensor


@dataclass(eq=False)
class Dtype:
    """Of numpy, numbers only."""

    numpy: np.dtype[Any]

    def fill(self, state: Any) -> None:
        order = typed(state, tuple)[1]
        self.numpy = self.numpy.newbyteorder(order)


@dataclass(eq=False)
class Array:
    """A numpy array of numbers."""

    values: np.ndarray | None = None

    def fill(self, state: Any) -> None:
        _, shape, kind, fortran, data = typed(state, tuple)
        values = np.frombuffer(typed(data, bytes), typed(kind, Dtype).numpy)
        self.values = values.reshape(typed(shape, tuple), order="F" if fortran else "C")


def persistent(meta: Any) -> Module:
    """An object of torch_utils.persistence, whose reduce value is (version, source text, class name, state)."""
    described = typed(meta, dict)
    if described.get("type") != "class":
        damaged("a persistent object that is no class")
    module = Module(printable(typed(described.get("class_name"), str)))
    module.fill(described.get("state"))
    return module


def mapping(pairs: Iterable[Any] = ()) -> dict[Any, Any]:
    return {key: value for key, value in typed(pairs, list | tuple) if plain([key])}


def members(items: Iterable[Any] = ()) -> set[Any]:
    return set(plain(typed(items, list | tuple)))


def plain(items: Any) -> Any:
    """The items, all of them hashable without recursion."""
    if not all(isinstance(item, PLAIN) for item in items):
        damaged("a key that is neither text nor number")
    return items


def tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    """A view of a storage, within its bounds and not larger than it."""
    flat = typed(storage, Storage).flat
    numbers = (offset, *typed(size, tuple), *typed(stride, tuple))
    if len(size) != len(stride) or any(type(n) is not int or not 0 <= n < 2**48 for n in numbers):
        damaged("a tensor of impossible shape")
    if math.prod(size) == 0:
        return flat.new_empty(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if last >= flat.numel() or math.prod(size) > flat.numel():
        damaged("a tensor that reaches beyond its storage")
    return flat.as_strided(size, stride, offset)


def storage(data: Any) -> Storage:
    """What torch.save wrote of one storage before PyTorch 1.6: five pickles, the length [int64], the numbers."""
    file = io.BytesIO(typed(data, bytes))
    magic, protocol, system, described, keys = (StorageReader(file).load() for _ in range(5))
    if (magic, protocol) != (MAGIC, PROTOCOL) or not typed(system, dict).get("little_endian"):
        damaged("a storage of another format or byte order")
    dtype, key, count = typed(described, tuple)
    start = file.tell() + 8
    if keys != [key] or int.from_bytes(data[start - 8 : start], "little") != count:
        damaged("a storage that contradicts itself")
    if len(data) != start + count * dtype.itemsize:
        damaged("a storage of another length than it says")
    numbers = bytearray(memoryview(data)[start:])  # a copy: aligned, and PyTorch may write to it
    return Storage(torch.frombuffer(numbers, dtype=dtype) if count else torch.empty(0, dtype=dtype))


def number(kind: Any, data: Any) -> Any:
    """A numpy scalar as a number of Python."""
    return np.frombuffer(typed(data, bytes), typed(kind, Dtype).numpy, count=1)[0].item()


def numpy_dtype(code: Any, *_: Any) -> Dtype:
    if not re.fullmatch("[fiu][1248]|b1", typed(code, str)):
        asked(f"numpy.dtype({code})")
    return Dtype(np.dtype(code))


LAYERS: Final = {
    "activation": ("SiLU", "Sigmoid"),
    "container": ("ModuleDict", "ModuleList", "ParameterDict", "ParameterList", "Sequential"),
    "conv": ("Conv2d",),
    "dropout": ("Dropout",),
    "linear": ("Identity", "Linear"),
    "normalization": ("GroupNorm", "LayerNorm"),
}
MAKERS: Final[dict[str, Maker]] = {
    "torch_utils.persistence._reconstruct_persistent_obj": persistent,
    "dnnlib.util.EasyDict": mapping,
    "collections.OrderedDict": mapping,
    "builtins.set": members,
    "torch._utils._rebuild_tensor_v2": tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: typed(data, Tensor),
    "torch.storage._load_from_bytes": storage,
    "torch.device": lambda *about: ":".join(map(str, plain(about))),
    "torch.Size": lambda sizes: tuple(plain(sizes)),
    "numpy.dtype": numpy_dtype,
    **{f"torch.nn.modules.{file}.{kind}": lambda k=kind: Module(k) for file, kinds in LAYERS.items() for kind in kinds},
    **{f"numpy.{core}.multiarray._reconstruct": lambda *_: Array() for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": number for core in ("core", "_core")},
}
DTYPES: Final[dict[str, torch.dtype]] = {
    "Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ the reader


class Reader(pickle._Unpickler):
    """The pickle machine, without any way from a file to a call, an attribute or an import."""

    makers: ClassVar[Mapping[str, Maker]] = MAKERS
    values: ClassVar[Mapping[str, Any]] = {str(d): d for d in DTYPES.values()} | {"numpy.ndarray": "ndarray"}
    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def find_class(self, module: Any, name: Any) -> Any:
        wanted = f"{typed(module, str)}.{typed(name, str)}"
        if wanted not in self.makers and wanted not in self.values:
            asked(wanted)
        return self.values[wanted] if wanted in self.values else Name(wanted)

    def persistent_load(self, pid: Any) -> Any:
        asked(f"the persistent id {pid!r:.40}" if isinstance(pid, PLAIN) else "a persistent id")

    def get_extension(self, code: int) -> None:
        asked(f"the extension code {code}")

    def _instantiate(self, klass: Any, args: Any) -> None:
        asked("an instance of an old-style class")

    def made(self, name: Any, args: Any) -> Any:
        """What a call of an allowed name stands for."""
        return self.makers[typed(name, Name).name](*typed(args, tuple))

    def load_reduce(self) -> None:
        args, name = self.stack.pop(), self.stack.pop()
        self.stack.append(self.made(name, args))

    def load_newobj_ex(self) -> None:
        if typed(self.stack.pop(), dict):
            damaged("keyword arguments of a class")
        self.load_reduce()

    def load_build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], dict):  # whose attributes, _metadata of a state dict, are of no use here
            typed(self.stack[-1], Module | Array | Dtype).fill(state)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.put([key, value])

    def load_setitems(self) -> None:
        self.put(self.pop_mark())

    def put(self, items: list[Any]) -> None:
        typed(self.stack[-1], dict).update(zip(plain(items[::2]), items[1::2], strict=True))

    def load_additems(self) -> None:
        items = self.pop_mark()
        typed(self.stack[-1], set).update(plain(items))

    def load_refused(self) -> None:
        asked("an operation that no pickle of a model has")

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = pickle._Unpickler.dispatch | {
        pickle.REDUCE[0]: load_reduce, pickle.NEWOBJ[0]: load_reduce, pickle.NEWOBJ_EX[0]: load_newobj_ex,
        pickle.BUILD[0]: load_build, pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems,
        pickle.ADDITEMS[0]: load_additems, pickle.FROZENSET[0]: load_refused, pickle.DICT[0]: load_refused,
        pickle.BYTEARRAY8[0]: load_refused, pickle.NEXT_BUFFER[0]: load_refused, pickle.READONLY_BUFFER[0]: load_refused,
    }  # fmt: skip


class StorageReader(Reader):
    """For the pickles inside a storage: nothing stands for a call, and a persistent id describes the storage."""

    makers: ClassVar[Mapping[str, Maker]] = {}
    values: ClassVar[Mapping[str, Any]] = {f"torch.{name}Storage": dtype for name, dtype in DTYPES.items()}

    def persistent_load(self, pid: Any) -> tuple[torch.dtype, str, int]:
        word, dtype, key, _, count, view = typed(pid, tuple)
        if word != "storage" or view is not None or type(count) is not int or count < 0:
            damaged("an unknown description of a storage")
        return typed(dtype, torch.dtype), typed(key, str), count
