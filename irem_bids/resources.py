# SPDX-License-Identifier: Apache-2.0
"""What this process may use: processors, memory and GPUs.

The limits of affinity, control groups and Slurm are honoured, not the totals of
the machine.  GPUs are counted in a child process, because CUDA that was started
once does not survive in the workers.  Standard library only, but for a step's GPU memory.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .exitcodes import ExitCode, UserError
from .settings import Run

TOO_MUCH = 10.0  # times the memory that there is: --mem was meant in another unit
GIGABYTE = 1e9
MOST_THREADS = 8
LOCK_POLL = 0.5  # s
UNITS = {"": 1e9, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}


@dataclass(frozen=True)
class Resources:
    """Limits of a run.

    Attributes
    ----------
    nprocs
        Processors in all.
    threads
        Threads of one step.
    memory_gb
        Memory in all, 10^9 bytes.
    devices
        Torch devices that training may use: ``("cpu",)`` or one entry per GPU.
    gpus
        Names of these GPUs that every process of the machine knows them by.
    """

    nprocs: int
    threads: int
    memory_gb: float
    devices: tuple[str, ...]
    gpus: tuple[str, ...] = ()

    @property
    def claims(self) -> tuple[str, ...]:
        """What :func:`claimed_device` chooses from: devices, with their names behind '@'."""
        if not self.gpus:
            return self.devices
        return tuple(f"{d}@{name}" for d, name in zip(self.devices, self.gpus, strict=True))

    @property
    def gpu(self) -> bool:
        """Training happens on a GPU."""
        return self.devices != ("cpu",)


def _cgroup_folders() -> Iterator[Path]:
    """Folders of this process's control group and of its ancestors."""
    root = Path("/sys/fs/cgroup")
    names = {"", "cpu", "cpu,cpuacct", "memory"}
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for name in names:
        yield root / name
    for line in lines:
        _, controllers, path = line.split(":", 2)
        folder = root / controllers / path.lstrip("/")
        while folder != root and root in folder.parents:
            yield folder
            folder = folder.parent


def _read_numbers(path: Path) -> list[float] | None:
    try:
        return [float(word) for word in path.read_text().split() if word != "max"]
    except (OSError, ValueError):
        return None


def available_cpus() -> int:
    """Processors this process may use: affinity, control group, Slurm."""
    counts = [float(len(os.sched_getaffinity(0)))]
    for folder in _cgroup_folders():
        quota = _read_numbers(folder / "cpu.max")
        if quota and len(quota) == 2:
            counts.append(quota[0] / quota[1])
        old, period = (_read_numbers(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        if old and period and old[0] > 0 and period[0] > 0:
            counts.append(old[0] / period[0])
    slurm = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if slurm.isdigit() and int(slurm) > 0:
        counts.append(float(slurm))
    return max(1, int(min(counts)))


def available_memory_gb() -> float:
    """Memory this process may use, 10^9 bytes: machine, control group, Slurm."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIGABYTE]
    for folder in _cgroup_folders():
        for name in ("memory.max", "memory.limit_in_bytes"):
            limit = _read_numbers(folder / name)
            if limit:
                sizes.append(limit[0] / GIGABYTE)
    node = os.environ.get("SLURM_MEM_PER_NODE", "")
    each = os.environ.get("SLURM_MEM_PER_CPU", "")
    if node.isdigit() and int(node) > 0:
        sizes.append(int(node) * 2**20 / GIGABYTE)
    elif each.isdigit() and int(each) > 0:
        sizes.append(int(each) * available_cpus() * 2**20 / GIGABYTE)
    return min(sizes)


def parse_memory(text: str) -> float:
    """A size such as ``16G``, ``16GB``, ``16000M`` in 10^9 bytes; a bare number is GB.

    >>> parse_memory("16000M"), parse_memory("16 GB"), parse_memory("0.5")
    (16.0, 16.0, 0.5)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([kmgt]?)(i?b)?\s*", text.lower())
    if not match or float(match[1]) <= 0:
        raise UserError(
            f"--mem is {text!r}; expected a size such as 16G, 16GB or 16000M", ExitCode.USAGE
        )
    factor = UNITS[match[2]]
    if (match[3] or "").startswith("i"):
        factor = 1024.0 ** (" kmgt".index(match[2]))
    return float(match[1]) * factor / GIGABYTE


def asked_memory_gb(run: Run) -> float:
    """Memory in all, 10^9 bytes: what is asked for, else most of what there is.

    Raises
    ------
    UserError
        No size, or ``TOO_MUCH`` times what there is: it was meant in another unit.
    """
    there = available_memory_gb()
    if run.mem is None:
        return 0.9 * there
    asked = parse_memory(run.mem)
    if asked > TOO_MUCH * there and run.use_plugin is None:  # a plugin's nodes may have more
        hint = f"; did you mean {run.mem.strip()}M?" if run.mem.strip().isdigit() else ""
        raise UserError(
            f"--mem is {run.mem}, that is {asked:g} GB (a bare number is GB), and this process "
            f"may use {there:.1f} GB{hint}",
            ExitCode.USAGE,
        )
    return asked


def visible_gpus() -> str | None:
    """The GPUs that this process may use, as in CUDA_VISIBLE_DEVICES: indices, UUIDs, MIG.

    A Slurm that hands out GPUs without hiding the others names them in other variables.
    """
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS"):
        if name in os.environ:
            return os.environ[name]
    return None


def gpu_names() -> tuple[str, ...]:
    """Names of the CUDA devices that torch sees in a child process, the same for every process.

    The name is the UUID of the GPU or of its MIG instance.
    """
    nodes = [Path("/dev/nvidiactl"), Path("/dev/nvidia0"), Path("/dev/dxg")]
    visible = visible_gpus()
    if visible == "" or not any(node.exists() for node in nodes):
        return ()
    return _ask_torch(visible)


@functools.cache
def _ask_torch(visible: str | None) -> tuple[str, ...]:
    code = (
        "import torch; c = torch.cuda\n"
        "for i in range(c.device_count()):\n"
        "    print('gpu', getattr(c.get_device_properties(i), 'uuid', i))"
    )
    environment = {**os.environ, **({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
    )
    return tuple(re.findall(r"^gpu (\S+)$", done.stdout, re.MULTILINE))


def count_gpus() -> int:
    """CUDA devices that torch sees in a child process."""
    return len(gpu_names())


def choose_devices(
    device: str, gpu_counter: Callable[[], int] | None = None, most: int | None = None
) -> tuple[str, ...]:
    """Torch devices for ``--device`` (auto, cpu, cuda or cuda:N) and ``--gpus`` (``most``).

    Raises
    ------
    UserError
        The spelling is unknown (64), or a GPU is asked for and absent (75).
    """
    match = re.fullmatch(r"auto|cpu|cuda(?::(\d+))?", device)
    if not match:
        raise UserError(
            f"--device is {device!r}; expected auto, cpu, cuda or cuda:N", ExitCode.USAGE
        )
    if device == "cpu" or most == 0:
        return ("cpu",)
    count = (gpu_counter or count_gpus)()
    if match[1] is not None and int(match[1]) < count:
        return (device,)
    if count and match[1] is None and (most or 1) <= count:
        return tuple(f"cuda:{index}" for index in range(most or count))
    if device == "auto" and most is None:
        return ("cpu",)
    asked = f"--gpus is {most}" if device == "auto" else f"--device is {device!r}"
    if most is not None and device != "auto":
        asked += f" and --gpus {most}"
    raise UserError(
        f"{asked}, and torch sees {count} CUDA device(s) here; check nvidia-smi "
        "and CUDA_VISIBLE_DEVICES, or use --device cpu",
        ExitCode.TEMPORARY,
    )


def resolve(run: Run) -> Resources:
    """Limits of a run from its settings and from what this process may use.

    Each training on a GPU keeps one processor; the steps beside it share the others.
    """
    nprocs = run.nprocs or available_cpus()
    memory = asked_memory_gb(run)
    devices = choose_devices(run.device, most=run.gpus)
    names: tuple[str, ...] = ()
    free = nprocs
    if devices != ("cpu",):
        known = gpu_names()
        names = tuple(known[int(device.partition(":")[2])] for device in devices)
        free = max(1, nprocs - len(devices))
    threads = min(run.omp_nthreads or min(free, MOST_THREADS), nprocs)
    return Resources(nprocs, threads, memory, devices, names)


def limit_threads(run: Run) -> None:
    """Tell libraries that are loaded later how many threads a step has.

    BLAS and OpenMP read it when they are loaded, so it is said before numpy is imported.
    """
    nprocs = run.nprocs or available_cpus()
    set_thread_variables(min(run.omp_nthreads or min(nprocs, MOST_THREADS), nprocs))


def set_thread_variables(count: int) -> None:
    """The variables by which libraries learn their number of threads."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(count)
    os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = str(count)


@contextlib.contextmanager
def claimed_device(devices: Sequence[str], locks: Path) -> Iterator[str]:
    """Hold one of ``devices`` (:attr:`Resources.claims`), alone; waits while all are taken.

    The CPU is never locked.  The lock is the operating system's and goes with
    the process, however it ends.
    """
    import fcntl

    if list(devices) == ["cpu"]:
        yield "cpu"
        return
    locks.mkdir(parents=True, exist_ok=True)
    while True:
        for claim in devices:
            device, _, name = claim.partition("@")
            name = re.sub(r"[^\w.-]", "_", name or device)
            lock = locks / f"{socket.gethostname()}-gpu-{name}.lock"
            with lock.open("a") as handle:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                yield device
                return
        time.sleep(LOCK_POLL)


class Meter:
    """Seconds and peak memory of a step, as its ``step.json`` has them."""

    def __init__(self) -> None:
        """Start; the peak that this process had before is forgotten, where Linux lets us."""
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self.started = time.monotonic()

    def read(self, name: str, device: str = "cpu") -> dict[str, dict[str, float]]:
        """Seconds, and peak memory in 10^9 bytes, since the start."""
        found = {"seconds": {name: round(time.monotonic() - self.started, 2)}}
        with contextlib.suppress(OSError):
            peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
            if peak:
                found["memory_gb"] = {name: round(int(peak[1]) * 1024 / GIGABYTE, 3)}
        if device.startswith("cuda"):
            import torch

            most = torch.cuda.max_memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)  # for the next step of this process
            found["gpu_memory_gb"] = {name: round(most / GIGABYTE, 3)}
        return found
