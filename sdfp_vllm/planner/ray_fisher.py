"""Fisher sums on a Ray cluster: every calibration window is a shard, every worker an actor with the model loaded.

A window's sums do not depend on the others, so the only coupling is the final addition, which is
done here, in float64 and in the windows' own order: the result is the one process's, bit for bit
where workers compute alike, whatever their number and whoever finishes first.
"""

from __future__ import annotations

import platform
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sdfp_vllm.errors import SdfpError
from sdfp_vllm.plan.fingerprint import Fingerprint, fingerprint, resolve_model_dir
from sdfp_vllm.planner.fisher import fisher_sums
from sdfp_vllm.planner.fisher_sums import Checkpoint, FisherSums, OrderedSums, checkpoint_key
from sdfp_vllm.planner.stack import DecoderStack, load_target
from sdfp_vllm.ray.cluster import RayOptions, layout, ray_cluster

# A shard that has brought down this many workers would bring down the next as well.
MAX_DEATHS = 3
_POLL_SECONDS = 1.0

Advance = Callable[..., None]


@dataclass(frozen=True)
class FisherJob:
    """What the sums are computed of.

    Attributes:
        model: Folder or Hugging Face id, as every worker's node knows it.
        target: Fingerprint that the model must have there.
        ids: int64 [N, T] calibration windows.
        dtype: None for the checkpoint's.
        identity: What else the sums depend on; part of the checkpoint's key.
        trust_remote_code: Whether workers may run code that comes with the checkpoint.
        revision: Of an id; None for the hub's default.
    """

    model: str
    target: Fingerprint
    ids: Tensor
    dtype: torch.dtype | None
    identity: str
    trust_remote_code: bool = False
    revision: str | None = None


def ray_fisher_sums(
    job: FisherJob,
    options: RayOptions,
    *,
    checkpoint: Path,
    resume: bool = False,
    advance: Advance = lambda count, title=None: None,
) -> FisherSums:
    """Sums squared gradients over all windows, on the workers of a Ray cluster.

    A shard whose worker dies goes to another, and a new worker is asked for. The finished shards
    are in `checkpoint` at any moment, in the form `fisher_sums` resumes from too.

    Args:
        advance: Called as (windows done since the last call, title of the stage or None).

    Raises:
        SdfpError: If Ray is missing or out of reach, a worker cannot read or run the model, a
            shard brings down `MAX_DEATHS` workers, or the checkpoint is of another run.
    """
    with ray_cluster(options.address, where="--ray") as ray:
        pool = _Pool(ray, job, options)
        try:
            return _gather(pool, job, checkpoint, resume, advance)
        finally:
            pool.close()


def _gather(pool: _Pool, job: FisherJob, checkpoint: Path, resume: bool, advance: Advance) -> FisherSums:
    windows, layers = len(job.ids), job.target.num_layers
    sums: OrderedSums | None = None
    file: Checkpoint | None = None
    while sums is None or sums.finished < windows:
        for event in pool.wait():
            if isinstance(event, _Loaded) and file is None:
                # Only a loaded model knows its dtype, on which the checkpoint depends.
                file = Checkpoint(checkpoint, checkpoint_key(job.ids, layers, event.dtype, job.identity))
                sums = (resume and file.load()) or OrderedSums(FisherSums.zero(layers))
                pool.todo.extend(sums.missing(windows))
                advance(sums.finished)
            elif isinstance(event, _Done):
                assert sums is not None and file is not None
                sums.add(event.window, event.sums)
                file.save(sums.total, sums.ahead)
                advance(1)
        pool.hand_out()
        advance(0, f"Fisher traces ({pool.ready} of {pool.size} Ray workers)")
    return sums.total


@dataclass(frozen=True)
class _Loaded:
    dtype: str


@dataclass(frozen=True)
class _Done:
    window: int
    sums: FisherSums


class _Pool:
    """Actors, each with one call outstanding at most: the loading of the model, or one window."""

    def __init__(self, ray: ModuleType, job: FisherJob, options: RayOptions):
        self._ray, self._job = ray, job
        self.size, resources = layout(ray.nodes(), options)
        self._actor = ray.remote(**resources)(FisherWorker)
        self.todo: deque[int] = deque()
        self._calls: dict[Any, tuple[Any, int | None]] = {}  # result -> (actor, window; None: loading)
        self._idle: list[Any] = []
        self._loading: set[Any] = set()
        self._deaths: Counter[int | None] = Counter()
        for _ in range(self.size):
            self._start()

    @property
    def ready(self) -> int:
        return len(self._idle) + len(self._calls) - len(self._loading)

    def wait(self) -> list[_Loaded | _Done]:
        """What has finished within a second; shards of dead workers go back to `todo`."""
        done, _ = self._ray.wait(list(self._calls), num_returns=1, timeout=_POLL_SECONDS)
        return [event for call in done if (event := self._collect(call)) is not None]

    def hand_out(self) -> None:
        while self._idle and self.todo:
            actor, window = self._idle.pop(), self.todo.popleft()
            self._calls[actor.window.remote(self._job.ids[window : window + 1])] = (actor, window)

    def close(self) -> None:
        for actor in [*self._idle, *(actor for actor, _ in self._calls.values())]:
            self._ray.kill(actor)

    def _start(self) -> None:
        job = self._job
        actor = self._actor.remote(job.model, job.target, job.dtype, job.trust_remote_code, job.revision)
        call = actor.load.remote()
        self._loading.add(call)
        self._calls[call] = (actor, None)

    def _collect(self, call: Any) -> _Loaded | _Done | None:
        actor, window = self._calls.pop(call)
        self._loading.discard(call)
        try:
            result = self._ray.get(call)
        except self._ray.exceptions.RayTaskError as e:
            raise _worker_failed(e) from e
        except self._ray.exceptions.RayError as e:  # the actor, its process or its node is gone
            self._bury(actor, window, e)
            return None
        self._deaths[None] = 0  # a worker that does something: whoever died before died by chance
        self._idle.append(actor)
        return _Loaded(result) if window is None else _Done(window, result)

    def _bury(self, actor: Any, window: int | None, why: Exception) -> None:
        self._ray.kill(actor)  # it may only be out of reach
        self._deaths[window] += 1
        if self._deaths[window] >= MAX_DEATHS:
            work = "loading the model" if window is None else f"window {window}"
            raise SdfpError(
                "--ray",
                f"{MAX_DEATHS} workers in turn died at {work} ({str(why).strip().splitlines()[-1].strip()})",
                "Look into Ray's logs of the worker; out of memory, give --gpus-per-worker or fewer --workers. "
                "--resume goes on from the windows that are finished.",
            ) from why
        if window is not None:
            self.todo.appendleft(window)
        self._start()


class FisherWorker:
    """A worker's copy of the model. Lives in a Ray actor, but knows nothing of Ray."""

    def __init__(
        self,
        model: str,
        target: Fingerprint,
        dtype: torch.dtype | None,
        trust_remote_code: bool = False,
        revision: str | None = None,
    ):
        self._model, self._target, self._dtype = model, target, dtype
        self._trusted, self._revision = trust_remote_code, revision

    def load(self) -> str:
        """Loads the model and returns the dtype of its layers.

        Raises:
            SdfpError: If this node cannot read the model, or reads another one.
        """
        here = f"worker on {platform.node()}"
        try:
            folder = resolve_model_dir(self._model, self._revision)
            found = fingerprint(folder)
        except SdfpError as e:
            raise SdfpError(
                f"{here}: {e.where}", e.what, "Put the model where every node reads it under the same name."
            ) from e
        if found != self._target:
            raise SdfpError(
                f"{here}: model {self._model}",
                "is not the same there: " + "; ".join(self._target.differences(found)),
                "Put the same files on every node.",
            )
        # device_map="auto" puts layers one after the other on the devices that the worker was given.
        device = (
            "cpu" if not torch.cuda.is_available() else "auto" if torch.cuda.device_count() > 1 else "cuda"
        )
        self._stack = DecoderStack(load_target(folder, self._dtype, device, self._trusted))
        return str(next(p for _, p in self._stack.layer_parameters(0)).dtype)

    def window(self, ids: Tensor) -> FisherSums:
        """Sums of one window, int64 [1, T]."""
        return fisher_sums(self._stack, ids)


def _worker_failed(error: Any) -> SdfpError:
    cause = error.cause
    if isinstance(cause, SdfpError):
        return cause
    return SdfpError(
        "--ray",
        f"a worker failed ({type(cause).__name__}: {cause})",
        "--resume goes on from the windows that are finished.",
    )
