"""One draft length for a whole batch."""

from __future__ import annotations

import random

from sdfp_vllm.pacing.batch import BatchPolicy
from tests.support.pacing_traffic import costs


def in_batches(policy: BatchPolicy, chance: float, steps: int, batch: int, seed: int = 0) -> list[int]:
    rng, chosen = random.Random(seed), []
    for _ in range(steps):
        k = policy[batch]
        chosen.append(k)
        for _ in range(batch if k else 0):
            policy.observe(k, next((j for j in range(k) if rng.random() > chance), k))
    return chosen


def test_a_batch_gets_the_length_that_is_fastest_for_it():
    policy = BatchPolicy(costs(), [0, 1, 2, 4, 8])
    for chance, batch in ((0.95, 1), (0.6, 4), (0.8, 64)):
        chosen = in_batches(policy, chance, 600, batch)[-100:]
        true = BatchPolicy(costs(acceptance=[chance] * 8), [0, 1, 2, 4, 8])
        rates = {k: true.rate(batch, k) for k in (0, 1, 2, 4, 8)}
        assert sum(rates[k] for k in chosen) / 100 > 0.97 * max(rates.values())


def test_a_batch_that_accepts_nothing_is_hardly_ever_drafted_for_until_it_pays_again():
    policy = BatchPolicy(costs(), [0, 5])
    assert sum(k > 0 for k in in_batches(policy, 0.0, 3000, 2)[-1000:]) in range(1, 20)
    assert min(in_batches(policy, 0.95, 8000, 2)[-100:]) == 5
