"""CUDA-graph drafting without a GPU: what is recorded, and that replaying it drafts as eagerly.

A stand-in keeps the recorded call in place of a CUDA graph and repeats it on replay, so that all
it can read is what a graph can: the arguments it was recorded with and the persistent buffers.
Attention metadata is the one exception: this platform's attention cannot refresh its own on the
device, so it is rebuilt from the buffers at each draft forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.engines import engine, runner, tokens

pytestmark = pytest.mark.engine

SIZES = [1, 2, 4, 8]
LENGTH = 16


class Recorded:
    """A call to be repeated; counts its replays."""

    def __init__(self, call: Callable[[Any], None]):
        self.call, self.replays = call, 0

    def replay(self) -> None:
        from vllm.config import CUDAGraphMode

        self.replays += 1
        self.call(CUDAGraphMode.NONE)


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from vllm.config import CUDAGraphMode
    from vllm.v1.worker.gpu import cudagraph_utils

    def capture(self: Any, create_forward_fn: Any, progress_bar_desc: str = "") -> None:
        for descs in self._capture_descs.values():
            for desc in descs:
                create_forward_fn(desc, warmup=True)(CUDAGraphMode.NONE)
                self.graphs[desc] = Recorded(create_forward_fn(desc, warmup=False))
                self.graphs[desc].call(CUDAGraphMode.NONE)
        self._graphs_captured = True

    monkeypatch.setattr(cudagraph_utils.CudaGraphManager, "capture", capture)
    monkeypatch.setattr(
        type(cudagraph_utils.current_platform), "get_global_graph_pool", lambda self: None, raising=False
    )
    yield


def with_graphs(llm: Any, fused: bool) -> Any:
    """Makes an eager engine's speculator draft through recorded graphs; returns the speculator."""
    from vllm.config import CUDAGraphMode

    made = runner(llm)
    speculator = made.speculator
    settings = made.vllm_config.compilation_config
    settings.cudagraph_capture_sizes, settings.max_cudagraph_capture_size = SIZES, SIZES[-1]
    speculator.supports_decode_metadata_update = fused
    speculator._update_draft_decode_metadata = lambda metadata, num_reqs: None
    run_model = speculator._run_model

    def with_fresh_metadata(num_tokens: int, metadata: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor

        if metadata is not None:
            metadata = speculator._build_uniform_attn_metadata(
                num_reqs=num_tokens,
                batch_desc=BatchExecutionDescriptor(CUDAGraphMode.FULL, num_tokens, num_tokens, 1),
                num_query_per_req=1,
                seq_lens_cpu_upper_bound=speculator.input_buffers.seq_lens[:num_tokens].clone(),
                step=0,
            )
        return run_model(num_tokens, metadata, *args, **kwargs)

    speculator._run_model = with_fresh_metadata
    speculator.init_cudagraph_manager(CUDAGraphMode.FULL_DECODE_ONLY)
    speculator.capture()
    return speculator


@pytest.fixture(scope="module")
def some(prompts: list[list[int]]) -> list[list[int]]:
    return [p[:50] for p in prompts[:5]]


@pytest.fixture(scope="module")
def expected(target: Path, some: list[list[int]]) -> list[list[list[int]]]:
    with engine(target) as llm:
        return tokens(llm, some, max_tokens=LENGTH)


@pytest.mark.parametrize("fused", [True, False], ids=["one graph a round", "one graph a step"])
def test_replayed_rounds_draft_as_eager_ones(
    target: Path, plan: str, some: list[list[int]], expected: Any, recording: None, fused: bool
):
    drafts: dict[str, list[list[int]]] = {}
    with engine(target, {"method": "sdfp", "model": plan}) as llm:
        for mode in ("eager", "graphs"):
            speculator = runner(llm).speculator if mode == "eager" else with_graphs(llm, fused)
            propose, seen = speculator.propose, drafts.setdefault(mode, [])

            def spy(*args: Any, propose: Any = propose, seen: Any = seen, **kwargs: Any) -> Any:
                out = propose(*args, **kwargs)
                seen.extend(out.tolist())
                return out

            llm.reset_prefix_cache()
            speculator.propose = spy
            assert tokens(llm, some, batch=3, max_tokens=LENGTH) == expected  # 3 run in the graph for 4
            speculator.propose = propose
        graphs = speculator.decode_cudagraph_manager.graphs
        assert sorted(desc.num_reqs for desc in graphs) == SIZES
        replays = {desc.num_reqs: graph.replays for desc, graph in graphs.items()}
    assert drafts["graphs"] == drafts["eager"]
    rounds = replays[4] if fused else replays[4] // 3
    assert rounds > 3, replays


def test_a_graph_for_every_draft_length_of_the_table(
    target: Path, plan: str, some: list[list[int]], expected: Any, recording: None
):
    table = [[1, 1, 3], [2, 2, 1], [3, 8, 0]]
    settings = {"method": "sdfp", "model": plan, "num_speculative_tokens_per_batch_size": table}
    with engine(target, settings) as llm:
        speculator = with_graphs(llm, fused=True)
        for batch in (1, 2, 5):
            assert tokens(llm, some, batch=batch, max_tokens=LENGTH) == expected
        graphs = speculator.decode_cudagraph_manager.graphs
        replays = {(d.num_reqs, d.num_speculative_tokens): graph.replays for d, graph in graphs.items()}
    assert sorted(replays) == [(size, k) for size in SIZES for k in (1, 3)]
    assert replays[1, 3] > 0 and replays[2, 1] > 0, replays
