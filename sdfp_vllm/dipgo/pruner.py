"""The network that learns which gates to close (DiP-GO's pruner network)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Pruner(nn.Module):
    """One learnable query per (call, unit); self-attention over all of them; a two-way head for each.

    At the start every gate is kept: the head's weights are 0 and its bias is [0, 1] for
    (close, keep). The gates of call 0 are not learned: there is nothing to reuse yet.

    Args:
        calls, units: T and N of the paper; T x N queries.
        width: D; 512 in the paper.
    """

    def __init__(self, calls: int, units: int, width: int = 512, heads: int = 8, layers: int = 1):
        super().__init__()
        self.calls, self.units = calls, units
        self.queries = nn.Parameter(torch.randn(calls * units, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.fc = nn.Linear(width, width)
        # A head of its own for each gate: weights (gates, 2, width).
        self.head = nn.Parameter(torch.zeros(calls * units, 2, width))
        self.bias = nn.Parameter(torch.tensor([0.0, 1.0]).repeat(calls * units, 1))

    def forward(self) -> Tensor:
        """The chance that each gate is kept: (calls, units), in [0, 1], row 0 all 1."""
        # Batch of one, a sequence of T x N: attention is between queries.
        hidden = F.relu(self.fc(self.encoder(self.queries[None])[0]))
        logits = torch.einsum("qcd,qd->qc", self.head, hidden) + self.bias
        keep = logits.softmax(-1)[:, 1].view(self.calls, self.units)
        return torch.cat([torch.ones_like(keep[:1]), keep[1:]])


def straight_through(keep: Tensor) -> Tensor:
    """Gates that are 0 or 1 going forward (kept where the chance is at least one half), and `keep` going backward."""
    hard = (keep >= 0.5).to(keep.dtype)
    return hard + keep - keep.detach()
