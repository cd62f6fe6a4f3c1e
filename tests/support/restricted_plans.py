"""Plans whose draft head is restricted to given tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from sdfp_vllm.plan.head_file import pack_head
from sdfp_vllm.plan.store import load_plan, save_plan
from tests.support.engines import write_plan


def write_restricted_plan(
    model: Path, folder: Path, kept: Sequence[int], k: int, tokens: Sequence[int]
) -> str:
    """Writes a plan that drafts with `tokens` only; returns its folder."""
    write_plan(model, folder, kept, k)
    described, content = pack_head(torch.tensor(sorted(tokens)), coverage=0.5)
    plan = load_plan(folder)
    view = plan.view.model_copy(update={"head": described})
    save_plan(plan.model_copy(update={"view": view}), folder, head_tokens=content)
    return str(folder)
