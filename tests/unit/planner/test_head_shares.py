"""Each tensor-parallel rank computes the rows in its stretch of the vocabulary; together they are the tokens', in order."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sdfp_vllm.engine.draft.head import DraftHead, _shares

VOCAB, HIDDEN = 50, 8


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("tokens", [[0, 3, 13, 14, 30, 49], [1, 2, 5], [49], list(range(0, 50, 2))], ids=str)
def test_what_the_ranks_gather_is_the_heads_logits(ranks, tokens):
    g = torch.Generator().manual_seed(0)
    weight, hidden = torch.randn(VOCAB, HIDDEN, generator=g), torch.randn(3, HIDDEN, generator=g)
    stretch = -(-VOCAB // ranks)
    padded = torch.cat([weight, torch.zeros(stretch * ranks - VOCAB, HIDDEN)])
    wanted = torch.tensor(tokens)
    parts, widths = [], set()
    for rank in range(ranks):
        head = SimpleNamespace(
            tp_size=ranks,
            shard_indices=SimpleNamespace(
                num_org_elements_padded=stretch, padded_org_vocab_start_index=rank * stretch
            ),
        )
        rows, columns, width = _shares(head, wanted)
        parts.append(hidden @ padded[rank * stretch :][rows].T)
        widths.add(width)
    gathered = torch.cat(parts, dim=1)
    assert widths == {gathered.shape[1]} and len({p.shape for p in parts}) == 1
    logits = DraftHead(lambda h: gathered, columns, wanted, VOCAB, rows=None)(hidden)  # type: ignore[arg-type]
    want = torch.full((3, VOCAB), -torch.inf)
    want[:, wanted] = (hidden @ weight.T)[:, wanted]
    torch.testing.assert_close(logits, want)
