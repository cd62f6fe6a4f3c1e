"""The DiP-GO search: trains the pruner through whole generations of the SuperNet."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdfp_vllm.dipgo.layout import Layout
from sdfp_vllm.dipgo.macs import MacCount
from sdfp_vllm.dipgo.objective import Consistency, consistency, sparsity
from sdfp_vllm.dipgo.pruner import Pruner, straight_through
from sdfp_vllm.dipgo.rhythm import Rhythm
from sdfp_vllm.dipgo.sampling import Sampler
from sdfp_vllm.dipgo.supernet import SuperNet
from sdfp_vllm.errors import SdfpError

_SAVE_EVERY = 10
_POOL_BATCH = 8


@dataclass(frozen=True)
class LearnSettings:
    """Settings of the search; defaults are the paper's, except for `iterations` (about 1000 there) and `pool`.

    Attributes:
        budget: tau, the share of MACs at which the sparsity term is dropped.
        learning_rate: Of SGD; the paper takes 0.1 for U-Nets and 10 for DiT.
        alpha: Weight of the sparsity term.
        width: Of the pruner's queries.
        images: Per iteration.
        pool: Seeds that training draws from; their full runs are computed once.
    """

    iterations: int = 200
    budget: float = 0.2
    learning_rate: float = 0.1
    alpha: float = 1.0
    width: int = 512
    images: int = 1
    pool: int = 16
    consistency: Consistency = "ssim"
    seed: int = 0


def learn_scores(
    sampler: Sampler,
    layout: Layout,
    macs: MacCount,
    reuse: str,
    settings: LearnSettings,
    state_file: Path | None = None,
    resume: bool = False,
    advance: Callable[..., None] = lambda count, title=None: None,
) -> NDArray[np.float64]:
    """Learns the chance that each gate is kept: (calls, units), row 0 all 1.

    Args:
        state_file: Where an interrupted search is kept; removed at the end.
        resume: Go on from `state_file`; the result is that of an uninterrupted search.
        advance: Called with 1 after each iteration, and a new title.

    Raises:
        SdfpError: If `resume` finds no state, or one of another search.
    """
    torch.manual_seed(settings.seed)
    pruner = Pruner(sampler.calls, len(layout.units), settings.width)
    optimizer = torch.optim.SGD(pruner.parameters(), lr=settings.learning_rate)
    done = 0
    identity = json.dumps(
        [
            asdict(settings),
            reuse,
            [u.name for u in layout.units],
            sampler.scheduler.model_dump(),
            sampler.rhythm.model_dump(),
        ]
    )
    if resume:
        state = _load(state_file, identity)
        pruner.load_state_dict(state["pruner"])
        done = state["done"]
        advance(done)
    gamma = macs.cascade(layout, reuse)
    seeds = [settings.seed * 100_003 + i for i in range(settings.pool)]
    with torch.no_grad():
        full = torch.cat(
            [sampler.latents(seeds[i : i + _POOL_BATCH]) for i in range(0, len(seeds), _POOL_BATCH)]
        )
    with SuperNet(sampler, layout, reuse) as net:
        for iteration in range(done, settings.iterations):
            # Which images an iteration sees depends on its number alone, so that resuming changes nothing.
            draw = torch.Generator().manual_seed(settings.seed * 7919 + iteration)
            rows = torch.randperm(len(seeds), generator=draw)[: settings.images].tolist()
            gates = straight_through(_first_steps_kept(pruner(), sampler.rhythm))
            latents = net.latents([seeds[r] for r in rows], gates)
            loss = distance = consistency(settings.consistency, sampler, latents, full[rows])
            share = macs.share(layout.closure(gates.detach().numpy() > 0.5, reuse))
            if share > settings.budget:
                loss = loss + settings.alpha * sparsity(gates, gamma)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if state_file and (iteration + 1) % _SAVE_EVERY == 0:
                _save(
                    state_file, {"identity": identity, "done": iteration + 1, "pruner": pruner.state_dict()}
                )
            advance(1, f"Learning gates: {share:.0%} compute, distance {distance.item():.3f}")
    with torch.no_grad():
        scores = _first_steps_kept(pruner(), sampler.rhythm).double().numpy()
    if state_file:
        state_file.unlink(missing_ok=True)
    return scores


def _first_steps_kept(keep: Tensor, rhythm: Rhythm) -> Tensor:
    """The chances with 1 where a denoiser takes over and has nothing to reuse: (steps, units)."""
    first = torch.zeros(len(keep), 1, dtype=torch.bool)
    first[list(rhythm.stages)] = True
    return torch.where(first, torch.ones_like(keep), keep)


def _save(path: Path, state: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    torch.save(state, new)
    os.replace(new, path)


def _load(path: Path | None, identity: str) -> dict[str, Any]:
    if path is None or not path.exists():
        raise SdfpError("--resume", "no interrupted search there", "Leave --resume out to start one.")
    try:
        state = torch.load(path, weights_only=True)
        known = state["identity"]
    except Exception as e:
        raise SdfpError(str(path), f"cannot be read ({e})", "Delete it and search again.") from e
    if known != identity:
        raise SdfpError(
            "--resume",
            f"{path} is of a search with other settings",
            "Give the settings of the first run, or leave --resume out.",
        )
    return state
