"""Connecting to Ray: one way for every command that scales out, with errors a user can act on."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from sdfp_vllm.errors import SdfpError

_REACH_SECONDS = 5.0


@dataclass(frozen=True)
class RayOptions:
    """Where and how widely the job runs.

    Attributes:
        address: See `ray_cluster`.
        workers: Actors with a copy of the model; None for as many as the GPUs allow, on a
            cluster without GPUs one per node.
        gpus_per_worker: GPUs that a copy of the model is split over.
    """

    address: str | None = None
    workers: int | None = None
    gpus_per_worker: int = 1

    @classmethod
    def from_flags(cls, ray: bool, **flags: Any) -> RayOptions | None:
        """None without --ray; `flags` are the fields, None where the user gave none.

        Raises:
            SdfpError: If a flag is given that means nothing without --ray.
        """
        given = {name: value for name, value in flags.items() if value is not None}
        if ray:
            return cls(**given)
        if given:
            flag = "--" + next(iter(given)).replace("_", "-")
            raise SdfpError(flag, "is for a Ray cluster", "Add --ray, or leave it out.")
        return None


def require_ray(where: str) -> ModuleType:
    """Returns Ray.

    Args:
        where: The flag or command that needs it, for the error.

    Raises:
        SdfpError: If it is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise SdfpError(where, "needs Ray, which is not installed", 'Run `pip install "sdfp-vllm[ray]"`.')
    # Ray's coming default; without it, every start prints a notice that it is to come.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    return ray


@contextlib.contextmanager
def ray_cluster(address: str | None, *, where: str, cpus: int | None = None) -> Iterator[ModuleType]:
    """Connects to a cluster for the length of the block; a connection that stood before is used and kept.

    Args:
        address: "host:port" or "ray://host:port" of a cluster, "auto" for the one this machine
            belongs to, "local" for a new one in this process, None for RAY_ADDRESS or else "local".
        where: The flag or command that needs Ray, for errors.
        cpus: CPUs of a new local cluster; None for the machine's.

    Raises:
        SdfpError: If Ray is not installed or the cluster cannot be reached.
    """
    ray = require_ray(where)
    if ray.is_initialized():
        yield ray
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    settings: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if address == "local":
        settings |= {"num_cpus": cpus, "include_dashboard": False}
    else:
        _check_reachable(address)
    try:
        ray.init(address=address, **settings)
    except Exception as e:  # Ray raises ConnectionError, RuntimeError, ValueError and its own
        raise _unreachable(address, f"{type(e).__name__}: {e}") from e
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Knocks at the port: Ray itself tries for a minute, then aborts the process without an exception."""
    if address == "auto":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise SdfpError("--address", f"{address!r} is not a cluster's address", "Give HOST:PORT, or auto.")
    try:
        socket.create_connection((host, int(port)), timeout=_REACH_SECONDS).close()
    except (OSError, OverflowError) as e:
        raise _unreachable(address, str(e)) from e


def _unreachable(address: str, why: str) -> SdfpError:
    return SdfpError(
        "--address",
        f"no Ray cluster can be reached at {address!r} ({why})",
        "Check it with `ray status --address HOST:PORT`; without --address a local cluster is started.",
    )


def layout(nodes: list[dict[str, Any]], options: RayOptions) -> tuple[int, dict[str, float]]:
    """How many workers, and what each asks Ray for: whole GPUs, or an equal share of the nodes' CPUs.

    Ray gives a worker as many OpenMP threads as it asks CPUs.

    Args:
        nodes: As `ray.nodes()` lists them.

    Returns:
        The number of workers, and options of an actor.

    Raises:
        SdfpError: If no node has the GPUs that one worker needs.
    """
    resources = [n["Resources"] for n in nodes if n["Alive"]]
    gpus = [int(r.get("GPU", 0)) for r in resources]
    if any(gpus):
        per_worker = options.gpus_per_worker
        if max(gpus) < per_worker:
            raise SdfpError(
                "--gpus-per-worker",
                f"is {per_worker}, the cluster's largest node has {max(gpus)}",
                "Ask for fewer, or add a larger node.",
            )
        return options.workers or sum(g // per_worker for g in gpus), {"num_gpus": per_worker, "num_cpus": 1}
    cpus = [c for r in resources if (c := int(r.get("CPU", 0)))]
    workers = options.workers or max(len(cpus), 1)
    fitting = [c for c in range(1, max(cpus, default=1) + 1) if sum(n // c for n in cpus) >= workers]
    return workers, {"num_cpus": max(fitting, default=1)}
