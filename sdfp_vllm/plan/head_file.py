"""The tokens of a restricted draft head as they are stored: `head.safetensors` beside plan.json.

One int32 tensor `tokens`, [M]: the ids, ascending, that a draft can propose.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sdfp_vllm.errors import PlanError
from sdfp_vllm.plan import HEAD_FILE, DraftHead, SkipPlan, load_plan
from sdfp_vllm.tensor_file import damaged, pack_tensors, read_tensors


def pack_head(tokens: Tensor, coverage: float) -> tuple[DraftHead, bytes]:
    """Returns the plan's description of a head over `tokens` (int64 [M], ascending) and its file's content."""
    content, sha256 = pack_tensors({"tokens": tokens.detach().cpu().to(torch.int32).contiguous()})
    return DraftHead(tokens=len(tokens), coverage=coverage, sha256=sha256), content


def load_head(folder: Path, plan: SkipPlan) -> Tensor | None:
    """Reads and checks the tokens that `plan`, read from `folder`, drafts with: int64 [M]; None for all.

    Raises:
        PlanError: If the file is missing or not the plan's, or its ids do not ascend within the vocabulary.
    """
    if plan.head == "full":
        return None
    path = folder / HEAD_FILE
    found = read_tensors(
        path, {"tokens": (plan.head.tokens,)}, torch.int32, plan.head.sha256, "a restricted draft head"
    )
    tokens = found["tokens"].long()
    if not (tokens[1:] > tokens[:-1]).all():
        raise damaged(path, "holds token ids that do not ascend without repeats")
    if tokens[0] < 0 or tokens[-1] >= plan.fingerprint.vocab_size:
        raise damaged(
            path,
            f"holds token ids from {int(tokens[0])} to {int(tokens[-1])}, but the model's are "
            f"0 to {plan.fingerprint.vocab_size - 1}",
        )
    return tokens


def head_at(path: str | Path, sha256: str) -> Tensor | None:
    """The tokens of the plan at `path`, which a worker reads for itself; None where `sha256` is empty.

    Raises:
        PlanError: If the plan or its tokens are no longer those with this hash.
    """
    if not sha256:
        return None
    path = Path(path)
    plan = load_plan(path)
    if plan.head == "full" or plan.head.sha256 != sha256:
        raise PlanError(str(path), "was replaced while the engine started", "Start the engine again.")
    return load_head(path if path.is_dir() else path.parent, plan)
