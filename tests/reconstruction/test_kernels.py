# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels against plain PyTorch: their very source compiled for the CPU, and on a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import subprocess
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from irem_bids.reconstruction import cuda, operator_cuda, operator_torch, solver_cuda, solver_torch
from irem_bids.reconstruction.acquisition import StackModel
from irem_bids.reconstruction.geometry import Grid
from irem_bids.reconstruction.metrics import psnr
from irem_bids.reconstruction.operator_torch import DeviceRows
from irem_bids.reconstruction.optimise import fit
from irem_bids.reconstruction.prepare import output_grid, prepare
from irem_bids.reconstruction.protocol import Protocol
from irem_bids.reconstruction.sharpening import add_sharpened
from irem_bids.reconstruction.simulate import simulate
from irem_bids.settings import Acquisition, Settings
from tests.phantom import head
from tests.reconstruction.test_acquisition import blob_stack, cube, slice_poses

# What the kernels' source needs to be C++ for the CPU.
SHIM = """
#include <algorithm>
#include <cmath>
#include <cstring>
#define __global__
#define __device__
struct Three { unsigned x; };
static Three blockIdx, blockDim, threadIdx;
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline void atomicAdd(float* at, float value) { *at += value; }
inline float fmaxf(float a, float b) { return std::fmax(a, b); }
inline float fminf(float a, float b) { return std::fmin(a, b); }
inline float floorf(float a) { return std::floor(a); }
"""
# The part of the driver's interface that is used (cuda.h), for the CPU: a launch calls the kernel
# for each thread in turn, its arguments read from where the pointers say.
DRIVER = """
typedef void (*Function)(void** arguments);
extern "C" {
int cuDeviceGet(int* device, int ordinal) { *device = ordinal; return ordinal ? 101 : 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) {
    *context = (void*)0x700000001;
    return device;
}
int cuCtxSetCurrent(void* context) { return context == (void*)0x700000001 ? 0 : 201; }
int cuModuleLoadData(void** module, const void* image) {
    *module = (void*)0x800000002;
    return std::strcmp((const char*)image, "code for sm_90") ? 209 : 0;
}
int cuModuleGetFunction(Function* function, void* module, const char* name) {
    if (module != (void*)0x800000002) return 400;
    @FIND@
    return 500;
}
int cuGetErrorString(int status, const char** text) {
    *text = status == 500 ? "named symbol not found" : "some other error";
    return 0;
}
int cuLaunchKernel(
    Function function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
    unsigned shared, void* stream, void** arguments, void** extra
) {
    if (gy != 1 || gz != 1 || by != 1 || bz != 1 || shared || stream || extra) return 1;
    blockDim.x = bx;
    for (blockIdx.x = 0; blockIdx.x < gx; ++blockIdx.x)
        for (threadIdx.x = 0; threadIdx.x < bx; ++threadIdx.x) function(arguments);
    return 0;
}
}
"""


def source_for_the_cpu() -> str:
    """The kernels' source, unchanged, with a driver that runs it on the CPU."""
    text = cuda.SOURCE.read_text()
    calls, find = [], []
    for piece in text.split('extern "C" __global__ void ')[1:]:
        name, rest = piece.split("(", 1)
        types = [p.strip().rsplit(" ", 1)[0] for p in rest.split(")", 1)[0].split(",")]
        given = ", ".join(f"*({kind}*)arguments[{n}]" for n, kind in enumerate(types))
        calls.append(f"static void call_{name}(void** arguments) {{ {name}({given}); }}")
        find.append(f'if (!std::strcmp(name, "{name}")) {{ *function = call_{name}; return 0; }}')
    return SHIM + text + "\n".join(calls) + DRIVER.replace("@FIND@", "\n    ".join(find))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    if not shutil.which("g++"):
        pytest.skip("no g++ on this machine")
    folder = tmp_path_factory.mktemp("kernels")
    source, library = folder / "kernels.cpp", folder / "kernels.so"
    source.write_text(source_for_the_cpu())
    command = ["g++", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-o", library, source]
    subprocess.run(command, check=True)
    return str(library)


class _NullStream:
    cuda_stream = 0

    def synchronize(self) -> None:
        """Nothing to wait for."""


@pytest.fixture
def built(library: str, monkeypatch: pytest.MonkeyPatch) -> cuda.Kernels:
    """The kernels as they are launched on a GPU, with a driver for the CPU."""
    monkeypatch.setattr(cuda, "DRIVER", library)
    monkeypatch.setattr(
        cuda, "compiled", lambda _, architecture: b"code for " + architecture.encode()
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: _NullStream())
    return cuda.Kernels(torch.device("cpu", 0))


@pytest.fixture(params=["source", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the kernels run: the CPU, from the same source, or a GPU."""
    if request.param == "gpu":
        device: str = request.getfixturevalue("cuda")
        assert cuda.kernels(torch.device(device)) is not None  # else nothing is compared here
        return device
    stand_in = request.getfixturevalue("built")
    for module in (operator_cuda, solver_cuda):
        monkeypatch.setattr(module, "kernels", lambda _: stand_in)
    return "cpu"


def rows_and_volume(device: str) -> tuple[StackModel, DeviceRows, Tensor]:
    """Slices of every pose, many of them partly outside the volume."""
    stack, grid = blob_stack(), Grid((26, 28, 30), cube(28).affine)
    model = StackModel(stack, stack.mask, grid, Acquisition())
    model.set_poses(slice_poses(model.slices, 1), 1.1)
    volume = torch.randn(*grid.shape, generator=torch.Generator().manual_seed(1))
    return model, DeviceRows(model.rows, torch.device(device)), volume.to(device)


def test_forward(device: str) -> None:
    _, rows, volume = rows_and_volume(device)
    expected = operator_torch.forward(volume, rows)
    assert float(expected.abs().max()) > 0.1 and int((expected == 0).sum()) > 10
    torch.testing.assert_close(operator_cuda.forward(volume, rows), expected, atol=1e-4, rtol=1e-4)


def test_adjoint(device: str) -> None:
    model, rows, volume = rows_and_volume(device)
    random = torch.Generator().manual_seed(2)
    values = torch.randn(len(rows.index), generator=random).to(device)
    found = operator_cuda.adjoint(values, rows, tuple(volume.shape))
    expected = operator_torch.adjoint(values, rows, tuple(volume.shape))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)
    one = torch.sum(values.double() * operator_cuda.forward(volume, rows).double())
    other = torch.sum(volume.double() * found.double())
    assert float(one) == pytest.approx(float(other), rel=1e-4)
    assert len(model.values) == len(values)


def test_derivatives(device: str) -> None:
    model, rows, volume = rows_and_volume(device)
    pivot = model.grid.to_index(model.pivot)
    found = operator_cuda.derivatives(volume, rows, model.grid.affine, pivot)
    expected = operator_torch.derivatives(volume, rows, model.grid.affine, pivot)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)


def test_a_point_far_away_is_outside(device: str) -> None:
    model, _, volume = rows_and_volume(device)
    far = np.array(model.poses)
    far[:, :3, 3] += 1e12
    model.set_poses(far)
    rows = DeviceRows(model.rows, torch.device(device))
    assert not operator_cuda.forward(volume, rows).any()
    assert not operator_cuda.adjoint(
        torch.ones(len(rows.index), device=device), rows, (5, 6, 7)
    ).any()


def vectors(device: str, count: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(3)
    return [torch.randn(9, 11, 13, generator=random).to(device) for _ in range(count)]


def test_reweight(device: str) -> None:
    volume, diagonal = vectors(device, 2)
    where = (diagonal > 0).float()
    found, expected = ([torch.empty_like(volume) for _ in range(2)] for _ in range(2))
    given = (volume, diagonal.abs(), where, (0.3, 0.02))
    solver_cuda.reweight(*given, *found)
    solver_torch.reweight(*given, *expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_normal(device: str) -> None:
    direction, edges, parts, where = vectors(device, 4)
    where = (where > 0).float()
    one, other = parts[None].clone(), parts[None].clone()
    found = solver_cuda.normal(direction, edges.abs(), one, where)
    expected = solver_torch.normal(direction, edges.abs(), other, where)
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert found == pytest.approx(expected, rel=1e-5)


def test_descend(device: str) -> None:
    given, again = vectors(device, 5), vectors(device, 5)
    found = solver_cuda.descend(*given, given[0], (0.7, -0.3))  # type: ignore[misc]
    expected = solver_torch.descend(*again, again[0], (0.7, -0.3))  # type: ignore[misc]
    for a, b in zip(given, again, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
    assert not given[3].any()
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("afresh", [False, True])
def test_sharpen(device: str, afresh: bool, request: pytest.FixtureRequest) -> None:
    volume, start = vectors("cpu", 2)
    each = np.array([0.08, 0.0, 0.06], np.float32)
    expected = start.clone()
    add_sharpened(volume[None], each, expected, afresh=afresh)
    found, parts = start.to(device), volume[None].to(device)
    if device == "cpu":  # where the compiled loops are in use: the kernel itself
        kernels = request.getfixturevalue("built")
        numbers = (*map(float, each), int(afresh))
        kernels.launch("voxels_sharpen", found.numel(), parts, found, *numbers, *found.shape)
    else:
        add_sharpened(parts, each, found, afresh=afresh)
    torch.testing.assert_close(found.cpu(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("motion", "ours"), [("slice", True), ("stack", False)])
def test_a_whole_fit_the_way_of_a_gpu(
    motion: str, ours: bool, built: cuda.Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU's tensors, by our kernels or in plain PyTorch, against the CPU's own way."""
    moved = {"slice_degrees": 0.7, "slice_mm": 0.7} if motion == "slice" else {}
    protocol = Protocol(thickness=6.0, motion_degrees=4, motion_mm=3, snr=60, seed=3, **moved)
    settings = Settings.from_dict(
        {
            "acquisition": {"profile_width": "learned"},
            "irem": {"steps": 4, "batch_size": 2, "hidden": 8, "motion": motion},
        }
    )
    stacks = simulate(*head((27, 30, 24), 3.0), protocol)
    prepared = prepare([s.stack for s in stacks], settings)
    grid = output_grid(prepared, settings.output)
    expected = fit("irem", prepared, grid, settings)
    launched = set[str]()

    def launch(name: str, count: int, *arguments: Any) -> None:
        launched.add(name)
        cuda.Kernels.launch(built, name, count, *arguments)

    if ours:
        stand_in = SimpleNamespace(launch=launch)
        for module in (operator_cuda, solver_cuda):
            monkeypatch.setattr(module, "kernels", lambda _: stand_in)
    monkeypatch.setattr(StackModel, "compiled", False)
    found = fit("irem", prepared, grid, settings)
    image, same = found.image(), expected.image()
    assert psnr(image, same, same > 0.1) > 45
    for label, pose in expected.poses.items():
        assert np.allclose(found.poses[label].matrix, pose.matrix, atol=2e-3)
        assert found.widths[label] == pytest.approx(expected.widths[label], abs=5e-3)
    if ours:
        assert len(launched) == 6  # all but the sharpening, which the CPU does its own way


def test_a_kernel_that_is_not_there(built: cuda.Kernels) -> None:
    with pytest.raises(RuntimeError, match="cuModuleGetFunction: named symbol not found"):
        built.launch("rows_backward", 3)


def test_kernels_that_compute_wrongly_are_not_used(
    built: cuda.Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda.Kernels, "launch", lambda *_: None)
    with pytest.raises(RuntimeError, match="a kernel computes wrongly"):
        cuda.Kernels(built.device)


def test_without_a_compiler_plain_torch_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none() -> ctypes.CDLL:
        raise OSError("no NVRTC")

    monkeypatch.setattr(cuda, "_nvrtc", none)
    monkeypatch.setattr(cuda, "DRIVER", None)  # this process itself, which no driver is missing in
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert cuda._kernels.__wrapped__(0) is None
    assert "going on in plain PyTorch: no NVRTC" in caplog.text
    assert cuda.kernels(torch.device("cpu")) is None


def test_a_strided_tensor_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a contiguous one"):
        cuda._argument(torch.zeros(3, 4).T)
