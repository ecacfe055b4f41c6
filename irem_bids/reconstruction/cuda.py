# SPDX-License-Identifier: Apache-2.0
"""Our CUDA kernels (``kernels.cu``), compiled when first used.

By NVRTC, the compiler that comes with torch's CUDA wheels; no toolkit, no C compiler is needed.
Where that fails, plain PyTorch does the same, several times slower; a warning says so.
"""

from __future__ import annotations

import ctypes
import glob
import logging
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LOGGER = logging.getLogger(__name__)
SOURCE = Path(__file__).with_name("kernels.cu")
DRIVER = "libcuda.so.1"
THREADS = 256  # of a block
OPTIONS = ("--std=c++17", "--extra-device-vectorization")


class Kernels:
    """The kernels on one device.

    Raises
    ------
    OSError, RuntimeError
        No NVRTC, no driver, a device that they do not know, or one where they compute wrongly.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._driver = ctypes.CDLL(DRIVER)
        major, minor = torch.cuda.get_device_capability(device)
        code = compiled(SOURCE.read_text(), f"sm_{major}{minor}")
        place, self._context = ctypes.c_int(), ctypes.c_void_p()
        self._module, self._functions = ctypes.c_void_p(), dict[str, ctypes.c_void_p]()
        with torch.cuda.device(device):
            torch.cuda.current_stream(device).synchronize()  # torch's context is there
            self._call("cuDeviceGet", ctypes.byref(place), device.index)
            self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), place)
            self._call("cuCtxSetCurrent", self._context)
            self._call("cuModuleLoadData", ctypes.byref(self._module), code)
        self._try_out()

    def launch(self, name: str, count: int, *arguments: Tensor | int | float) -> None:
        """Run a kernel on ``count`` threads: tensors, which must be contiguous, go as pointers,
        numbers as int, float or, a :class:`Long`, as long long."""
        if not count:
            return
        values = [_argument(value) for value in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        with torch.cuda.device(self.device):
            self._call("cuCtxSetCurrent", self._context)  # a thread of its own may have none yet
            if name not in self._functions:
                found = ctypes.c_void_p()
                self._call("cuModuleGetFunction", ctypes.byref(found), self._module, name.encode())
                self._functions[name] = found
            stream = ctypes.c_void_p(torch.cuda.current_stream(self.device).cuda_stream)
            shape = (-(-count // THREADS), 1, 1, THREADS, 1, 1)
            self._call("cuLaunchKernel", self._functions[name], *shape, 0, stream, pointers, None)

    def _call(self, name: str, *arguments: Any) -> None:
        if status := getattr(self._driver, name)(*arguments):
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(status, ctypes.byref(text))
            raise RuntimeError(f"{name}: {(text.value or b'unknown error').decode()}")

    def _try_out(self) -> None:
        """One kernel on numbers of which the result is known."""
        a, b, c, d = (torch.full((2, 3, 5), v, device=self.device) for v in (1.0, 2.0, 3.0, 4.0))
        self.launch("voxels_descend", a.numel(), a, b, c, d, 0.5, 0.25, *a.shape)
        if not all(bool((t == v).all()) for t, v in ((a, 2.0), (b, 2.0), (c, 2.0), (d, 0.0))):
            raise RuntimeError("a kernel computes wrongly")


class Long(int):
    """An argument that a kernel takes as a 64 bit integer."""


def _argument(value: Tensor | int | float) -> Any:
    if isinstance(value, Tensor):
        if not value.is_contiguous():
            raise ValueError(f"a tensor of strides {value.stride()}; expected a contiguous one")
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, Long):
        return ctypes.c_longlong(value)
    return ctypes.c_int(value) if isinstance(value, int) else ctypes.c_float(value)


def compiled(source: str, architecture: str) -> bytes:
    """Machine code for an architecture, say ``sm_90``.

    Raises
    ------
    OSError
        There is no NVRTC.
    RuntimeError
        It refuses; with its log.
    """
    library = _nvrtc()
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    given = (ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None)
    if status := library.nvrtcCreateProgram(*given):
        raise RuntimeError(f"NVRTC: error {status}")
    try:
        texts = [o.encode() for o in (f"--gpu-architecture={architecture}", *OPTIONS)]
        options = (ctypes.c_char_p * len(texts))(*texts)
        if library.nvrtcCompileProgram(program, len(texts), options):
            library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            library.nvrtcGetProgramLog(program, log)
            raise RuntimeError(f"NVRTC: {log.value.decode(errors='replace')}")
        library.nvrtcGetCUBINSize(program, ctypes.byref(size))
        code = ctypes.create_string_buffer(size.value)
        library.nvrtcGetCUBIN(program, code)
        return code.raw
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _nvrtc() -> ctypes.CDLL:
    """NVRTC of torch's CUDA version: on the loader's path, or in the wheel that torch asks for."""
    major = (torch.version.cuda or "").split(".")[0]
    names = [f"libnvrtc.so.{major}", "libnvrtc.so"]
    site = Path(torch.__file__).parents[1]
    names += sorted(glob.glob(str(site / "nvidia" / "*" / "lib" / f"libnvrtc.so.{major or '*'}")))
    for name in names:
        try:
            return ctypes.CDLL(name, mode=os.RTLD_LOCAL)
        except OSError:
            continue
    raise OSError(f"no NVRTC among {', '.join(names)}")


@cache
def _kernels(index: int) -> Kernels | None:
    try:
        return Kernels(torch.device("cuda", index))
    except (OSError, RuntimeError, AttributeError) as error:
        LOGGER.warning("our CUDA kernels cannot be used, going on in plain PyTorch: %s", error)
        return None


def kernels(device: torch.device) -> Kernels | None:
    """Those of a device; None where it is no CUDA device or they cannot be compiled."""
    if device.type != "cuda" or torch.version.hip:
        return None
    return _kernels(torch.cuda.current_device() if device.index is None else device.index)
