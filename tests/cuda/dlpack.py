"""The structures of DLPack by which torch takes memory of others: https://dmlc.github.io/dlpack/latest/c_api.html"""

from __future__ import annotations

import ctypes

__all__ = ["COMPLEX", "CUDA", "INTEGER", "DataType", "Deleter", "Device", "Managed", "Tensor", "new_capsule"]

CUDA = 2
INTEGER = 0
COMPLEX = 5


class Device(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int), ("ordinal", ctypes.c_int))


class DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", Device),
        ("dimensions", ctypes.c_int),
        ("dtype", DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class Managed(ctypes.Structure):
    """DLManagedTensor."""


Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(Managed))
Managed._fields_ = (("tensor", Tensor), ("context", ctypes.c_void_p), ("deleter", Deleter))

new_capsule = ctypes.pythonapi.PyCapsule_New
new_capsule.restype = ctypes.py_object
new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
