"""Reading an in-process engine's K/V by layer and position, and comparing it with plain vLLM's.

The CPU kernels pack a block in an order of their own that depends on the instruction set, so
the order is asked of the kernel: a scratch block is written with every position's own number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tests.support.engines import runner
from tests.support.stepping import scheduler

ATOL = RTOL = 1e-4  # float32; other batch shapes sum in another order


class Cache:
    """The K/V of every decoder layer of one engine (one KV cache group)."""

    def __init__(self, llm: Any):
        context = runner(llm).compilation_config.static_forward_context
        self.layers = [context[name] for name in sorted(context, key=lambda n: int(n.split(".")[2]))]
        cache = self.tensor(0)
        _, heads, self.block_size, width = cache.shape
        assert self.block_size == runner(llm).input_batch.block_table[0].block_size
        scratch = torch.full((1, heads, self.block_size, width), -1.0, dtype=cache.dtype)
        number = torch.arange(self.block_size, dtype=cache.dtype)
        rows = number[:, None, None].expand(self.block_size, heads, width // 2).contiguous()
        layer = self.layers[0]
        layer.impl.do_kv_cache_update(layer, rows, rows.clone(), scratch, torch.arange(self.block_size))
        assert torch.equal(scratch.flatten().sort().values, number.repeat_interleave(heads * width))
        # Row p lists where position p's elements lie in a flattened block: [block size, heads * 2 * head size].
        self.where = scratch.flatten().argsort(stable=True).view(self.block_size, heads * width)

    def tensor(self, layer: int) -> torch.Tensor:
        """Layer `layer`'s cache, [blocks, heads, block size, 2 * head size], as the engine holds it."""
        cache = self.layers[layer].kv_cache
        return cache[0] if isinstance(cache, list) else cache

    def read(self, blocks: Sequence[int], positions: int) -> torch.Tensor:
        """A copy of the first `positions` positions in `blocks`: [layers, positions, K and V features]."""
        return torch.stack(
            [
                torch.cat([self.tensor(layer)[b].flatten()[self.where] for b in blocks])[:positions]
                for layer in range(len(self.layers))
            ]
        )

    def corrupt(self, layer: int, blocks: Sequence[int], position: int, by: float) -> None:
        """Adds `by` to one element of the K/V at `position`."""
        block = self.tensor(layer)[blocks[position // self.block_size]]
        block.view(-1)[self.where[position % self.block_size, 0]] += by


@dataclass(frozen=True)
class Answer:
    """Plain vLLM's tokens for one request, prompt included, and its K/V for all but the last of them."""

    ids: list[int]
    kv: torch.Tensor  # [layers, len(ids) - 1, features]


def answers_with_kv(
    llm: Any, prompts: Sequence[Sequence[int]], max_tokens: int
) -> dict[tuple[int, ...], Answer]:
    """Plain vLLM's greedy answers, each with the K/V of one prefill of its tokens; by prompt."""
    from vllm import SamplingParams

    from tests.support.engines import tokens

    cache, engine = Cache(llm), llm.llm_engine
    out = {}
    for prompt, answer in zip(prompts, tokens(llm, prompts, max_tokens=max_tokens), strict=True):
        ids = [*prompt, *answer[0]]
        params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
        engine.add_request("reference", {"prompt_token_ids": ids[:-1]}, params)
        engine.step()
        (request,) = scheduler(llm).running
        assert request.num_computed_tokens == len(ids) - 1
        (blocks,) = scheduler(llm).kv_cache_manager.get_block_ids(request.request_id)
        out[tuple(prompt)] = Answer(ids, cache.read(blocks, len(ids) - 1))
        engine.abort_request(["reference"])
        engine.step()
    return out


def same(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """Whether K/V is equal within tolerance, per layer and position: [layers, positions, features] -> bool."""
    return torch.isclose(got, want, atol=ATOL, rtol=RTOL).all(dim=-1)
