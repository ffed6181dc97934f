"""Typed JSON: Python values as JSON that gives the same values back, with no pickle unless both sides allow it.

`encode(value)` returns what `json.dumps` accepts; `decode(encoded)` takes what `json.loads` returns. None, bool, int,
finite float, str, list and dict with str keys are themselves. All else is an object of one key that starts with "$":

    {"$tuple": [...]}  {"$set": [...]}  {"$frozenset": [...]}  {"$size": [2, 3]}  {"$slice": [start, stop, step]}
    {"$ellipsis": true}  {"$range": [0, 9, 2]}  {"$complex": [re, im]}  {"$bytes": base64}  {"$bytearray": base64}
    {"$dict": [[key, value], ...]}     where a key is not a str, starts with "$" or is not valid Unicode
    {"$float": "nan"}                  also "inf", "-inf", or the 16 hex digits of a NaN with another payload
    {"$int": "-0x..."}                 beyond 4096 bits; smaller ints, also beyond 64 bits, are plain JSON integers
    {"$str": base64}                   UTF-8 ("surrogatepass") of a str with lone surrogates
    {"$dtype": "bfloat16"}  {"$device": "cuda:0"}  {"$path": "a/b"}
    {"$datetime": iso}  {"$date": iso}  {"$timedelta": [days, seconds, microseconds]}
    {"$numpy": {"dtype": "float32", "data": base64}}    a numpy scalar, bit for bit
    {"$ndarray" or "$tensor": {"dtype": ..., "shape": [...], "data": base64}}    at most 1 MiB, C order, little-endian
    {"$pickle": base64}                only with allow_pickle=True on both sides

What degrades: OrderedDict and defaultdict to dict, Parameter to Tensor, numpy.str_ and numpy.bytes_ to str and bytes, a
named time zone to its offset, PurePosixPath to Path. Other subclasses and enums are refused, never silently changed.

Limits:  200 levels of nesting, 1 MiB per embedded array.
Failure: encode raises TypeError or ValueError naming the place ("optim.param_groups.0.foo") and the remedy. decode
         takes its input as hostile: what encode cannot have written is CorruptCheckpointError, names are looked up in
         fixed tables only, memory stays in proportion to the input. A refused pickle is IncompatibleCheckpointError.
"""

from __future__ import annotations

import base64
import enum
import json
import math
import pathlib
import pickle
import re
import struct
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import date, datetime, timedelta
from typing import Any, TypeAlias, cast

import numpy as np
import torch

from .errors import CheckpointError, CorruptCheckpointError, IncompatibleCheckpointError

__all__ = ["MAX_DEPTH", "MAX_EMBEDDED_BYTES", "Json", "decode", "dtype_name", "dtype_named", "encode", "show"]

Json: TypeAlias = bool | int | float | str | list["Json"] | dict[str, "Json"] | None

MAX_DEPTH = 200  # levels of nesting; at four frames a level this fits CPython's default recursion limit of 1000
MAX_EMBEDDED_BYTES = 1 << 20  # of one array inside a value; larger ones belong in the state as leaves of their own
_PLAIN_INT = 1 << 4096  # CPython refuses decimal conversion beyond 4300 digits, about 14,000 bits
_QUIET_NAN = struct.pack(">d", math.nan)

# The only names that become a torch.dtype. Quantized and sub-byte types have no portable bytes.
_TORCH_NAMES = """bool uint8 uint16 uint32 uint64 int8 int16 int32 int64 float16 bfloat16 float32 float64 complex32
    complex64 complex128 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu float4_e2m1fn_x2"""
_NUMPY_NAMES = """bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 complex64 complex128"""
STORED_DTYPES: dict[str, torch.dtype] = {  # older torch lacks some
    name: getattr(torch, name) for name in _TORCH_NAMES.split() if hasattr(torch, name)
}
_NUMPY_DTYPES: dict[str, np.dtype[Any]] = {name: np.dtype(name).newbyteorder("<") for name in _NUMPY_NAMES.split()}
_NUMPY_CODE = re.compile(  # dtype.str of what has no such name: other byte orders, long double, text, times
    r"[<>|]([iuf][248]|f16|c(8|16|32)|[SU][1-9][0-9]{0,6}|[mM]8(\[([1-9][0-9]{0,8})?(Y|M|W|D|h|m|s|ms|us|ns|ps|fs|as)\])?)"
)


class _Place:
    """Where in the value the walk stands: a chain of keys, joined only when an error needs the name."""

    __slots__ = ("depth", "key", "parent", "pickling")

    def __init__(self, parent: _Place | None, key: object, pickling: bool) -> None:
        self.parent = parent
        self.key = key
        self.pickling = pickling
        self.depth: int = 0 if parent is None else parent.depth + 1

    def at(self, key: object) -> _Place:
        return _Place(self, key, self.pickling)

    def __str__(self) -> str:
        keys: list[str] = []
        place: _Place | None = self
        while place is not None:
            keys.append(place.key[:80] if type(place.key) is str else show(place.key))
            place = place.parent
        return ".".join(key for key in reversed(keys) if key) or "value"


def show(value: object) -> str:
    """The beginning of `repr(value)`, for messages about hostile input."""
    try:
        return repr(value)[:60]
    except (ValueError, RecursionError):  # an int beyond CPython's limit of digits, or endless nesting
        return f"a huge {type(value).__name__}"


def encode(value: Any, *, name: str = "", allow_pickle: bool = False) -> Json:
    """Returns the typed JSON of `value`; `name` is where it stands in the state, for messages."""
    try:
        return cast(Json, value) if _is_plain(value) else _encode(value, _Place(None, name, allow_pickle))
    except RecursionError:
        raise ValueError(f"{name or 'value'}: nested too deeply") from None


def decode(encoded: object, *, name: str = "", allow_pickle: bool = False) -> Any:
    """Returns the value that `encode` turned into `encoded`. With `allow_pickle` the input can run code."""
    try:
        return _decode(encoded, _Place(None, name, allow_pickle))
    except RecursionError:
        raise CorruptCheckpointError(f"{name or 'value'}: nested too deeply") from None


def dtype_name(dtype: torch.dtype, where: object = "dtype") -> str:
    """`torch.bfloat16` -> "bfloat16"; ValueError for a type whose bytes are not portable (quantized, sub-byte)."""
    name = str(dtype).removeprefix("torch.")
    if name not in STORED_DTYPES:
        raise ValueError(f"{where}: {dtype} cannot be stored; convert to another dtype")
    return name


def dtype_named(name: str) -> torch.dtype:
    """The inverse of `dtype_name`; IncompatibleCheckpointError for a name this version of torch does not have."""
    try:
        return STORED_DTYPES[name]
    except (KeyError, TypeError):
        raise IncompatibleCheckpointError(f"unknown dtype {show(name)}") from None


# ---- encode ----------------------------------------------------------------------------------------------------------


def _is_plain(value: object) -> bool:
    kind = type(value)
    if kind is int:
        return -_PLAIN_INT < cast(int, value) < _PLAIN_INT
    if kind is float:
        return math.isfinite(cast(float, value))
    if kind is str:
        return cast(str, value).isascii()
    return kind is bool or value is None


def _encode(value: Any, place: _Place) -> Json:
    if place.depth > MAX_DEPTH:
        raise ValueError(f"{place}: nested more than {MAX_DEPTH} levels deep, or contains itself")
    return _ENCODERS.get(type(value), _encode_other)(value, place)


def _encode_items(items: Iterable[Any], place: _Place) -> list[Json]:
    return [item if _is_plain(item) else _encode(item, place.at(index)) for index, item in enumerate(items)]


def _encode_dict(value: Mapping[Any, Any], place: _Place) -> Json:
    plain: dict[str, Json] = {}
    for key, item in value.items():
        if type(key) is not str or key[:1] == "$" or not (key.isascii() or _is_unicode(key)):
            break
        plain[key] = item if _is_plain(item) else _encode(item, place.at(key))
    else:
        return plain
    pairs: list[Json] = []
    for key, item in value.items():
        pairs.append([_encode(key, place.at(f"key {show(key)}")), _encode(item, place.at(key))])
    return {"$dict": pairs}


def _encode_set(value: Collection[Any], place: _Place) -> Json:
    # Sorted by their text: equal sets give equal JSON, whatever the hash seed.
    items = sorted(_encode_items(value, place), key=lambda item: json.dumps(item, sort_keys=True))
    return {"$frozenset" if type(value) is frozenset else "$set": items}


def _encode_float(value: float, place: _Place) -> Json:
    if math.isfinite(value):
        return value
    bits = struct.pack(">d", value)
    return {"$float": bits.hex() if math.isnan(value) and bits != _QUIET_NAN else repr(value)}


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _encode_str(value: str, place: _Place) -> Json:
    text = str.__str__(value)  # numpy.str_ comes here too
    return text if _is_unicode(text) else {"$str": _base64(text.encode("utf-8", "surrogatepass"))}


def _base64(data: bytes | bytearray) -> str:
    return base64.b64encode(data).decode("ascii")


def _numpy_dtype_text(dtype: np.dtype[Any], place: _Place) -> str:
    text = dtype.name if dtype.isnative and dtype.name in _NUMPY_DTYPES else dtype.str
    if text not in _NUMPY_DTYPES and not _NUMPY_CODE.fullmatch(text):
        raise TypeError(f"{place}: cannot store numpy dtype {dtype}; convert it to numbers or plain values")
    return text


def _encode_numpy(value: np.generic, place: _Place) -> Json:
    return {"$numpy": {"dtype": _numpy_dtype_text(value.dtype, place), "data": _base64(value.tobytes())}}


def _check_embedded(nbytes: int, place: _Place) -> None:
    if nbytes > MAX_EMBEDDED_BYTES:
        raise ValueError(
            f"{place}: an array of {nbytes} bytes inside a tuple or set is over the limit of {MAX_EMBEDDED_BYTES}; "
            "put it into a dict or list of the state, where arrays are stored as tensors"
        )


def _encode_ndarray(value: np.ndarray[Any, Any], place: _Place) -> Json:
    text = _numpy_dtype_text(value.dtype, place)
    _check_embedded(value.nbytes, place)
    return {"$ndarray": {"dtype": text, "shape": list(value.shape), "data": _base64(value.tobytes())}}


def _encode_tensor(value: torch.Tensor, place: _Place) -> Json:
    remedy = "put it into a dict or list of the state, where tensors are stored as such"
    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        raise TypeError(f"{place}: cannot store a {type(value).__name__} inside a tuple or set; {remedy}")
    if value.layout is not torch.strided or value.is_meta or str(value.dtype)[6:] not in STORED_DTYPES:
        kind = f"{value.dtype} {value.layout} tensor on {value.device}"
        raise ValueError(f"{place}: cannot store a {kind} inside a tuple or set; {remedy}")
    _check_embedded(value.nbytes, place)
    flat = value.detach().cpu().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format).reshape(-1)
    data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return {"$tensor": {"dtype": dtype_name(value.dtype), "shape": list(value.shape), "data": _base64(data)}}


def _encode_other(value: Any, place: _Place) -> Json:
    if isinstance(value, torch.Tensor):
        return _encode_tensor(value, place)
    if place.pickling:
        try:
            return {"$pickle": _base64(pickle.dumps(value, protocol=4))}
        except Exception as error:  # pickle raises whatever the object's own hooks raise
            raise TypeError(f"{place}: cannot pickle a {type(value).__qualname__}: {error}") from error
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    remedy = "store its .value or .name" if isinstance(value, enum.Enum) else "convert it to plain values or tensors"
    raise TypeError(f"{place}: cannot store a {kind}; {remedy}, or pass allow_pickle=True to save and to load")


_ENCODERS: dict[type, Callable[[Any, _Place], Json]] = {
    type(None): lambda value, place: None,
    bool: lambda value, place: cast(Json, value),
    int: lambda value, place: value if _is_plain(value) else {"$int": hex(value)},
    float: _encode_float,
    str: _encode_str,
    np.str_: _encode_str,
    list: _encode_items,
    tuple: lambda value, place: {"$tuple": _encode_items(value, place)},
    dict: _encode_dict,
    OrderedDict: _encode_dict,
    defaultdict: _encode_dict,
    set: _encode_set,
    frozenset: _encode_set,
    bytes: lambda value, place: {"$bytes": _base64(value)},
    np.bytes_: lambda value, place: {"$bytes": _base64(value)},
    bytearray: lambda value, place: {"$bytearray": _base64(value)},
    complex: lambda value, place: {"$complex": _encode_items((value.real, value.imag), place)},
    slice: lambda value, place: {"$slice": _encode_items((value.start, value.stop, value.step), place)},
    range: lambda value, place: {"$range": _encode_items((value.start, value.stop, value.step), place)},
    type(Ellipsis): lambda value, place: {"$ellipsis": True},
    torch.Size: lambda value, place: {"$size": list(value)},
    torch.dtype: lambda value, place: {"$dtype": dtype_name(value, place)},
    torch.device: lambda value, place: {"$device": str(value)},
    torch.Tensor: _encode_tensor,
    torch.nn.Parameter: _encode_tensor,
    np.ndarray: _encode_ndarray,
    datetime: lambda value, place: {"$datetime": value.isoformat()},
    date: lambda value, place: {"$date": value.isoformat()},
    timedelta: lambda value, place: {"$timedelta": [value.days, value.seconds, value.microseconds]},
    pathlib.PosixPath: lambda value, place: {"$path": _encode_str(str(value), place)},
    pathlib.PurePosixPath: lambda value, place: {"$path": _encode_str(str(value), place)},
    **{np.dtype(code).type: _encode_numpy for code in "?bBhHiIlLqQefdgFDGmM"},
}


# ---- decode ----------------------------------------------------------------------------------------------------------


_JSON_SCALARS = frozenset((str, int, float, bool, type(None)))


def _corrupt(place: _Place, problem: str) -> CheckpointError:
    return CorruptCheckpointError(f"{place}: {problem}")


def _decode(encoded: object, place: _Place) -> Any:
    kind = type(encoded)
    if kind in _JSON_SCALARS:
        return encoded
    if place.depth > MAX_DEPTH:
        raise _corrupt(place, f"nested more than {MAX_DEPTH} levels deep")
    if kind is list:
        return _decode_items(encoded, place)
    if kind is not dict:
        raise _corrupt(place, f"{kind.__name__} is not a type of JSON")
    members = cast(dict[Any, object], encoded)
    if len(members) == 1:
        ((tag, payload),) = members.items()
        if type(tag) is str and tag[:1] == "$":
            decoder = _DECODERS.get(tag)
            if decoder is None:
                raise _corrupt(place, f"unknown tag {show(tag)}")
            return decoder(payload, place)
    for key in members:
        if type(key) is not str or key[:1] == "$":
            raise _corrupt(place, f"key {show(key)} where a plain name was expected")
    return {key: item if type(item) in _JSON_SCALARS else _decode(item, place.at(key)) for key, item in members.items()}


def _decode_items(payload: object, place: _Place, count: int | None = None) -> list[Any]:
    if type(payload) is not list or (count is not None and len(payload) != count):
        raise _corrupt(place, f"expected a list{'' if count is None else f' of {count}'}, found {show(payload)}")
    return [
        item if type(item) in _JSON_SCALARS else _decode(item, place.at(index)) for index, item in enumerate(payload)
    ]


def _text(payload: object, place: _Place) -> str:
    if type(payload) is not str:
        raise _corrupt(place, f"expected a string, found {show(payload)}")
    return payload


def _bytes(payload: object, place: _Place) -> bytes:
    try:
        return base64.b64decode(_text(payload, place), validate=True)
    except ValueError:
        raise _corrupt(place, "invalid base64") from None


def _ints(payload: object, place: _Place, count: int | None = None) -> list[int]:
    items = _decode_items(payload, place, count)
    if any(type(item) is not int for item in items):
        raise _corrupt(place, f"expected integers, found {show(payload)}")
    return items


def _shape(payload: object, place: _Place) -> list[int]:
    shape = _ints(payload, place)
    if len(shape) > 64 or any(not 0 <= dim < 1 << 63 for dim in shape):
        raise _corrupt(place, f"absurd shape {show(shape)}")
    return shape


def _call(place: _Place, what: str, build: Callable[[], Any]) -> Any:
    try:
        return build()
    except (CheckpointError, RecursionError):
        raise
    except (ValueError, TypeError, OverflowError, RuntimeError, LookupError) as error:
        raise _corrupt(place, f"invalid {what}: {error!s:.100}") from None


def _decode_dict(payload: object, place: _Place) -> dict[Any, Any]:
    if type(payload) is not list or any(type(pair) is not list or len(pair) != 2 for pair in payload):
        raise _corrupt(place, f"expected pairs of key and value, found {show(payload)}")
    keys = [_decode(key, place.at("key")) for key, _ in payload]
    result = _call(place, "dict key", lambda: dict.fromkeys(keys))
    if len(result) != len(keys):
        raise _corrupt(place, "the same key twice")
    for key, (_, item) in zip(keys, payload, strict=True):
        result[key] = _decode(item, place.at(key))
    return cast(dict[Any, Any], result)


def _decode_set(payload: object, place: _Place, kind: type[set[Any]] | type[frozenset[Any]]) -> Collection[Any]:
    items = _decode_items(payload, place)
    result: Collection[Any] = _call(place, "set element", lambda: kind(items))
    if len(result) != len(items):
        raise _corrupt(place, "the same element twice")
    return result


def _parsed(what: str, parse: Callable[[str], Any], pattern: str = ".*") -> Callable[[object, _Place], Any]:
    def decoder(payload: object, place: _Place) -> Any:
        text = _text(payload, place)
        if not re.fullmatch(pattern, text):
            raise _corrupt(place, f"invalid {what} {show(text)}")
        return _call(place, what, lambda: parse(text))

    return decoder


def _float(text: str) -> float:
    value: float = struct.unpack(">d", bytes.fromhex(text))[0] if len(text) == 16 else float(text)
    if math.isfinite(value):
        raise ValueError(f"{value} is finite")
    return value


def _decode_complex(payload: object, place: _Place) -> complex:
    parts = _decode_items(payload, place, 2)
    if [type(part) for part in parts] != [float, float]:
        raise _corrupt(place, f"expected two floats, found {show(payload)}")
    return complex(*parts)


_decode_dtype = _parsed("dtype", STORED_DTYPES.__getitem__)


def _members(payload: object, place: _Place, *names: str) -> list[object]:
    if type(payload) is not dict or payload.keys() != set(names):
        raise _corrupt(place, f"expected the members {', '.join(names)}, found {show(payload)}")
    return [payload[name] for name in names]


def _numpy_array(dtype_text: object, shape: list[int], data: bytes, place: _Place) -> np.ndarray[Any, Any]:
    text = _text(dtype_text, place)
    dtype = _NUMPY_DTYPES.get(text)
    if dtype is None:
        if not _NUMPY_CODE.fullmatch(text):
            raise _corrupt(place, f"unknown numpy dtype {show(text)}")
        dtype = cast(np.dtype[Any], _call(place, "numpy dtype", lambda: np.dtype(text)))
    _check_size(math.prod(shape) * dtype.itemsize, data, place, dtype.kind == "b")
    # Of a bytearray, so that it can be written to; frombuffer refuses to make an empty one.
    array = np.frombuffer(bytearray(data), dtype) if data else np.zeros(0, dtype)
    return cast(np.ndarray[Any, Any], _call(place, "array", lambda: array.reshape(shape)))


def _check_size(nbytes: int, data: bytes, place: _Place, is_bool: bool) -> None:
    if nbytes != len(data):
        raise _corrupt(place, f"dtype and shape say {nbytes} bytes, the data has {len(data)}")
    if is_bool and data.strip(b"\0\1"):
        raise _corrupt(place, "a bool that is neither 0 nor 1")


def _decode_numpy(payload: object, place: _Place) -> np.generic:
    dtype, data = _members(payload, place, "dtype", "data")
    array = _numpy_array(dtype, [1], _bytes(data, place), place)
    if array.dtype.kind in "SU":
        raise _corrupt(place, f"numpy scalar of dtype {array.dtype}")
    return cast(np.generic, array[0])


def _decode_ndarray(payload: object, place: _Place) -> np.ndarray[Any, Any]:
    dtype, shape, data = _members(payload, place, "dtype", "shape", "data")
    return _numpy_array(dtype, _shape(shape, place), _bytes(data, place), place)


def _decode_tensor(payload: object, place: _Place) -> torch.Tensor:
    name, dims, text = _members(payload, place, "dtype", "shape", "data")
    dtype, shape, data = _decode_dtype(name, place), _shape(dims, place), _bytes(text, place)
    _check_size(math.prod(shape) * dtype.itemsize, data, place, dtype is torch.bool)
    flat = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)
    return cast(torch.Tensor, _call(place, "tensor", lambda: flat.view(dtype).reshape(shape)))


def _decode_pickle(payload: object, place: _Place) -> Any:
    data = _bytes(payload, place)
    if not place.pickling:
        raise IncompatibleCheckpointError(
            f"{place}: holds a pickled Python object; if you trust this checkpoint, load it with allow_pickle=True"
        )
    try:
        return pickle.loads(data)
    except (ImportError, AttributeError) as error:
        raise IncompatibleCheckpointError(f"{place}: the class of a pickled object is missing: {error}") from error
    except Exception as error:
        raise _corrupt(place, f"invalid pickle: {error!s:.100}") from error


_DECODERS: dict[str, Callable[[object, _Place], Any]] = {
    "$tuple": lambda payload, place: tuple(_decode_items(payload, place)),
    "$dict": _decode_dict,
    "$set": lambda payload, place: _decode_set(payload, place, set),
    "$frozenset": lambda payload, place: _decode_set(payload, place, frozenset),
    "$float": _parsed("float", _float, "nan|-?inf|[0-9a-f]{16}"),
    "$int": _parsed("int", lambda text: int(text, 16), "-?0x[0-9a-f]+"),
    "$str": _parsed("text", lambda text: base64.b64decode(text, validate=True).decode("utf-8", "surrogatepass")),
    "$bytes": _bytes,
    "$bytearray": lambda payload, place: bytearray(_bytes(payload, place)),
    "$complex": _decode_complex,
    "$slice": lambda payload, place: slice(*_decode_items(payload, place, 3)),
    "$range": lambda payload, place: _call(place, "range", lambda: range(*_ints(payload, place, 3))),
    "$ellipsis": lambda payload, place: ...,
    "$size": lambda payload, place: _call(place, "size", lambda: torch.Size(_ints(payload, place))),
    "$dtype": _decode_dtype,
    "$device": _parsed("device", torch.device, "[a-z]{1,20}(:[0-9]{1,3})?"),
    "$path": lambda payload, place: pathlib.Path(_text(_decode(payload, place.at("path")), place)),
    "$datetime": _parsed("datetime", datetime.fromisoformat),
    "$date": _parsed("date", date.fromisoformat),
    "$timedelta": lambda payload, place: _call(place, "timedelta", lambda: timedelta(*_ints(payload, place, 3))),
    "$numpy": _decode_numpy,
    "$ndarray": _decode_ndarray,
    "$tensor": _decode_tensor,
    "$pickle": _decode_pickle,
}
