"""Plans with random bridges, for tests that must see a bridge at work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from sdfp_vllm.plan.bridge import Bridge
from sdfp_vllm.plan.bridge_file import Run, pack_bridges
from sdfp_vllm.plan.schema import BridgeRun, runs_skipped
from sdfp_vllm.plan.store import load_plan, save_plan
from tests.support.engines import write_plan

RANK = 5


def write_bridged_plan(
    model: Path, folder: Path, kept: Sequence[int], k: int, strength: float = 0.3
) -> tuple[str, dict[Run, Bridge]]:
    """Writes a plan with a random low-rank bridge over every run it skips; returns its folder and them."""
    write_plan(model, folder, kept, k)
    plan = load_plan(folder)
    hidden = plan.fingerprint.hidden_size
    g = torch.Generator().manual_seed(0)

    def noise(*shape: int, scale: float) -> torch.Tensor:
        return scale * torch.randn(*shape, generator=g)

    bridges = {
        run: Bridge(
            noise(hidden, scale=0.03 * strength),
            mean=noise(hidden, scale=0.1),
            down=noise(RANK, hidden, scale=strength * hidden**-0.5),
            up=noise(RANK, hidden, scale=strength),
        )
        for run in sorted(runs_skipped(kept, plan.fingerprint.num_layers))
    }
    runs = [BridgeRun(first=a, last=b, regularisation=0.0, error=0.5) for a, b in bridges]
    described, content = pack_bridges(runs, bridges)
    view = plan.view.model_copy(update={"bridges": described})
    save_plan(plan.model_copy(update={"view": view}), folder, content)
    return str(folder), bridges
