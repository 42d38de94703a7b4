"""How many CPUs this process may use, and how OpenMP runs on them.

Nothing here needs torch: its OpenMP library (libgomp) reads the environment once, when it is loaded, so
`import leanseek` writes there what the user has left open.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, MutableMapping
from pathlib import Path

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # any of them: the user has chosen
SPINS = "5000"  # spins of a waiting thread before it sleeps: about 0.1 ms (docs/kernels.md, Threads)
_PROC, _CPUS = Path("/proc/self"), Path("/sys/devices/system/cpu")


def cpus() -> int:
    """CPUs that this process may use: those of its affinity mask, at most its control group's quota, rounded up."""
    return _within_quota(len(_allowed()))


def threads() -> int:
    """Threads to compute with: one a physical core of the allowed CPUs, at most the quota, rounded up."""
    return _within_quota(len({_siblings(cpu) for cpu in _allowed()}))


def quota() -> float:
    """CPU time per time that the control groups of this process allow (`docker --cpus`); infinity without a limit."""
    return min((share for folder in groups("cpu") if (share := _share(folder))), default=math.inf)


def set_openmp(environment: MutableMapping[str, str]) -> None:
    """Say how many threads OpenMP has and how they wait, unless `environment` says so already."""
    environment.setdefault("OMP_NUM_THREADS", str(threads()))
    if not any(name in environment for name in WAITING):
        environment["GOMP_SPINCOUNT"] = SPINS


def waiting() -> str:
    """One line for `leanseek doctor`: how OpenMP's threads wait for work."""
    said = {name: os.environ[name] for name in WAITING if name in os.environ}
    if not said:
        return "as libgomp does by itself: torch was imported before leanseek"
    if said == {"GOMP_SPINCOUNT": SPINS}:
        return f"{SPINS} spins, then asleep"
    return ", ".join(f"{name}={value}" for name, value in said.items()) + " in the environment"


def _within_quota(count: int) -> int:
    return max(1, math.ceil(min(count, quota())))


def _allowed() -> set[int]:
    if sys.platform != "linux":
        return set(range(os.cpu_count() or 1))
    return os.sched_getaffinity(0)


def _siblings(cpu: int) -> str:
    """The CPUs on the core of this one, as Linux writes them: "0,16"."""
    try:
        return (_CPUS / f"cpu{cpu}/topology/thread_siblings_list").read_text(encoding="ascii")
    except OSError:
        return str(cpu)


def groups(controller: str) -> Iterator[Path]:
    """The folders of the control groups that this process is in, of both versions, each with those above it.

    controller: what they divide, "cpu" or "memory"
    """
    try:
        own = [line.split(":", 2) for line in (_PROC / "cgroup").read_text(encoding="ascii").splitlines()]
        mounts = [line.split() for line in (_PROC / "mountinfo").read_text(encoding="ascii").splitlines()]
    except OSError:  # not Linux, or no /proc
        return
    for mount in mounts:
        # number, parent, device, root, mount point, options, ..., "-", kind, source, options of the kind
        kind, _, options = mount[mount.index("-") + 1 :][:3]
        if kind not in ("cgroup", "cgroup2") or (kind == "cgroup" and controller not in options.split(",")):
            continue
        for _, controllers, path in own:
            if controllers == "" if kind == "cgroup2" else controller in controllers.split(","):
                # inside a container the path may be the host's: then the mount's root is the container's own group
                inside = os.path.relpath(path, mount[3]) if Path(path).is_relative_to(mount[3]) else "."
                folder = Path(mount[4], inside)
                yield from (f for f in (folder, *folder.parents) if f.is_relative_to(mount[4]))


def _share(folder: Path) -> float | None:
    """The quota of one control group, in CPUs; None without one."""
    try:
        if (limit := folder / "cpu.max").is_file():  # version 2
            used, period = limit.read_text(encoding="ascii").split()
        else:
            used, period = ((folder / f"cpu.cfs_{name}_us").read_text(encoding="ascii") for name in ("quota", "period"))
        return int(used) / int(period) if int(used) > 0 else None
    except (OSError, ValueError):  # no such files, or "max"
        return None
