"""The tokens of a restricted draft head as they are stored: `head.safetensors` beside plan.json.

One int32 tensor `tokens`, [M]: the ids, ascending, that a draft can propose.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sdfp_vllm.plan.schema import DraftHead, SkipPlan
from sdfp_vllm.plan.tensor_file import damaged, pack_tensors, unpack_tensors
from sdfp_vllm.plan.view import Precision


def pack_head(tokens: Tensor, coverage: float, precision: Precision = "full") -> tuple[DraftHead, bytes]:
    """Returns the plan's description of a head over `tokens` (int64 [M], ascending) and its file's content."""
    content, sha256 = pack_tensors({"tokens": tokens.detach().cpu().to(torch.int32).contiguous()})
    head = DraftHead(tokens=len(tokens), precision=precision, coverage=coverage, sha256=sha256)
    return head, content


def unpack_head(plan: SkipPlan, content: bytes, path: Path) -> Tensor:
    """The tokens that `plan` drafts with, from their file's content: int64 [M].

    Raises:
        PlanError: If it holds anything else, or its ids do not ascend within the vocabulary.
    """
    head = plan.view.head
    assert head.tokens is not None
    found = unpack_tensors(content, {"tokens": (head.tokens,)}, torch.int32, path)
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
