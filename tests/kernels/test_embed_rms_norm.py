"""embed_rms_norm: the Triton kernel and the torch reference against float64."""

from __future__ import annotations

import pytest
import torch

from sdfp_vllm.kernels.embed_rms_norm import embed_rms_norm, reference
from tests.support.tolerance import close, random_like, strided, unharmed

EPS, VOCAB = 1e-5, 50
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 64), (3, 96), (5, 96), (123, 96), (1, 4096), (3, 5120)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "hidden"), SHAPES)
@pytest.mark.parametrize("gemma", [False, True])
def test_against_float64(rows, hidden, dtype, gemma):
    table, _ = strided(VOCAB, hidden, dtype, 1)
    weight = random_like(hidden, dtype=dtype, seed=4)
    scale = float(torch.tensor(hidden**0.5).to(dtype)) if gemma else 1.0
    offset = 1.0 if gemma else 0.0
    ids = torch.randint(0, VOCAB, (rows,), generator=torch.Generator().manual_seed(0))
    ids = ids.int() if gemma else ids
    ids[0] = VOCAB - 1
    (residual, around), (out, around_out) = strided(rows, hidden, dtype, 2), strided(rows, hidden, dtype, 3)
    residual.fill_(float("nan"))
    out.fill_(float("nan"))
    got, stream = embed_rms_norm(
        ids, table, weight, EPS, scale=scale, weight_offset=offset, residual=residual, out=out
    )
    assert got.data_ptr() == out.data_ptr() and stream.data_ptr() == residual.data_ptr()
    exact = table[ids.long()].double() * scale

    def normed(h: torch.Tensor) -> torch.Tensor:
        return h / (h.pow(2).mean(1, keepdim=True) + EPS).sqrt() * (weight.double() + offset)

    close(residual, exact)
    close(out, normed(residual.double()))
    assert unharmed(around, hidden) and unharmed(around_out, hidden)
    mine, stream = reference(ids, table, weight, EPS, scale=scale, weight_offset=offset)
    close(stream, exact)
    close(mine, normed(stream.double()))


def test_an_id_outside_the_table_reads_nothing():
    table = torch.ones(VOCAB, 96)
    ids = torch.tensor([-1, VOCAB, 3, 1 << 30], dtype=torch.int32)
    for op in (embed_rms_norm, reference):
        out, residual = op(ids, table, torch.ones(96), EPS)
        assert residual.sum(1).tolist() == [0, 0, 96, 0]
        assert out.isfinite().all() and (out[[0, 1, 3]] == 0).all()


def test_an_empty_batch_is_nothing():
    out, residual = embed_rms_norm(torch.empty(0, dtype=torch.int32), torch.ones(4, 96), torch.ones(96), EPS)
    assert out.shape == residual.shape == (0, 96)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(ids=torch.zeros(3)), "ids is torch.float32"),
        (dict(table=torch.zeros(96, 7).T), "table must be contiguous"),
        (dict(weight=torch.zeros(95)), "weight has shape"),
        (dict(residual=torch.zeros(2, 96)), "residual has shape"),
        (dict(out=torch.zeros(3, 96, dtype=torch.float16)), "out is torch.float16"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    fits = dict(
        ids=torch.zeros(3, dtype=torch.int32), table=torch.zeros(7, 96), weight=torch.zeros(96), eps=EPS
    )
    with pytest.raises(ValueError, match=message):
        embed_rms_norm(**(fits | change))
