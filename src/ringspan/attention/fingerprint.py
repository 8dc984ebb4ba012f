"""What a user's mask function is, in a few words: ranks compare them, since two functions of one name need not be the same."""

from __future__ import annotations

import ctypes
import dis
import functools
import hashlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ringspan.geometry import Mask, MaskMod

_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(...), torch.dtype)


def describe_mask(mask: Mask) -> str:
    """`mask` by name, and for each function of a user's in it where it is defined and digests of its code and of the values that it reads.

    The same on every rank where the function is, also as another object in another process; files, lines and devices do not count. What is
    read: constants, defaults, closures, globals that the code names, attributes that it names of the object that it is a method of, and
    whatever functions among these read. Of what is neither plain, nor a tensor, nor a function only the type counts.
    """
    return " ".join([str(mask), *(f"({_describe(function)})" for function in mask.functions)])


def _describe(function: MaskMod) -> str:
    code, values = _Digest(), _Digest()
    _add(function, code, values, {})
    module = getattr(function, "__module__", None) or type(function).__module__
    return f"{module}, code {code.short()}, values {values.short()}"


class _Digest:
    """Of a list of texts and bytes."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, *parts: str | bytes) -> None:
        for part in parts:
            data = part.encode() if isinstance(part, str) else part
            self._hash.update(len(data).to_bytes(8, "little") + data)

    def short(self) -> str:
        return self._hash.hexdigest()[:12]


def _add(value: Any, code: _Digest, values: _Digest, seen: dict[int, Any]) -> None:
    """What `value` does goes into `code`, what it holds into `values`. `seen` ends circles, and keeps alive what it knows by id."""
    value = getattr(value, "_torchdynamo_orig_callable", value)  # torch.compile
    values.add(f"{type(value).__module__}.{type(value).__qualname__}")
    if isinstance(value, _PLAIN):
        values.add(repr(value))
    elif isinstance(value, Tensor):
        values.add(*_tensor(value))
    elif isinstance(value, (types.ModuleType, type, types.BuiltinFunctionType)):
        values.add(value.__name__)
    elif type(value).__module__ == "numpy":
        values.add(repr(value.shape), value.tobytes()) if hasattr(value, "tobytes") else None
    elif id(value) not in seen:
        seen[id(value)] = value
        if isinstance(value, types.FunctionType):
            _function(value, None, code, values, seen)
        elif isinstance(value, types.MethodType) and isinstance(value.__func__, types.FunctionType):
            _function(value.__func__, value.__self__, code, values, seen)
        elif isinstance(call := vars(type(value)).get("__call__"), types.FunctionType) and not _is_library(type(value).__module__):
            _function(call, value, code, values, seen)
        else:
            for part in _parts(value):
                _add(part, code, values, seen)
            # Equal parts of a whole may be one object on one rank and two on another; functions are what would take long.
            del seen[id(value)]


def _parts(value: Any) -> list[Any]:
    """What `value` is made of, in an order that is the same in every process."""
    if isinstance(value, (tuple, list)):
        return list(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=repr)
    if isinstance(value, dict):
        return [part for key in sorted(value, key=repr) for part in (key, value[key])]
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    return [value.__wrapped__] if hasattr(value, "__wrapped__") else []


def _function(function: types.FunctionType, owner: Any, code: _Digest, values: _Digest, seen: dict[int, Any]) -> None:
    """`function`, where it is a method that of `owner`."""
    code.add(function.__module__ or "", function.__qualname__)
    loaded, named = set(), set()
    if _is_library(function.__module__):
        # What torch and Python do is named; what they were given, such as the functions that and_masks joins, is read.
        for each in (function.__defaults__, *(_content(cell) for cell in function.__closure__ or ())):
            _add(each, code, values, seen)
        return
    for part in _codes(function.__code__):
        code.add(part.co_code, *part.co_names, *part.co_varnames, *part.co_freevars)
        _add([each for each in part.co_consts if not isinstance(each, types.CodeType)], code, values, seen)
        loaded |= {each.argval for each in dis.get_instructions(part) if each.opname == "LOAD_GLOBAL"}
        named |= set(part.co_names)
    read = [function.__defaults__, function.__kwdefaults__, *(_content(cell) for cell in function.__closure__ or ())]
    read += [function.__globals__[name] for name in sorted(loaded & set(function.__globals__))]
    held = getattr(owner, "__dict__", {})
    read += [held[name] for name in sorted(named & set(held))]
    for each in read:
        _add(each, code, values, seen)


def _is_library(module: str | None) -> bool:
    top = (module or "").partition(".")[0]
    return top == "torch" or (top in sys.stdlib_module_names and top != "__main__")


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """`code` and that of the functions inside it."""
    yield code
    for each in code.co_consts:
        if isinstance(each, types.CodeType):
            yield from _codes(each)


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None  # not assigned yet


def _tensor(tensor: Tensor) -> tuple[str | bytes, ...]:
    about = str(tensor.dtype), str(tuple(tensor.shape))
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout != torch.strided or tensor.is_meta:
        return about  # no bytes of its own, or not here
    flat = tensor.detach().cpu().contiguous()
    return *about, ctypes.string_at(flat.data_ptr(), flat.numel() * flat.element_size())
