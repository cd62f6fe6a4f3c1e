"""The plugin and the plan in vLLM's Ray workers.

vLLM's Ray executor refuses the CPU platform, so an executor of ours stands in for its scheduling of
GPUs and compiled graphs. The workers are vLLM's own `RayWorkerWrapper`, in real Ray actors.
"""

from __future__ import annotations

import shutil
import sys
from typing import Any

import pytest
import torch
from vllm.platforms import current_platform
from vllm.utils.network_utils import get_distributed_init_method, get_open_port
from vllm.v1.executor.abstract import Executor

from sdfp_vllm.plan.head_file import pack_head
from sdfp_vllm.plan.parcel import BRIDGE_FILE
from sdfp_vllm.plan.store import load_plan, save_plan
from sdfp_vllm.ray.cluster import ray_cluster
from tests.support.bridged_plans import write_bridged_plan
from tests.support.engines import engine, spec_counters, tokens

ray = pytest.importorskip("ray")
from vllm.v1.executor.ray_utils import RayWorkerWrapper  # noqa: E402  # needs Ray

pytestmark = [pytest.mark.engine, pytest.mark.more]
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file


class RayActorExecutor(Executor):
    """One `RayWorkerWrapper` actor a rank, every call sent to all of them."""

    def _init_executor(self) -> None:
        ranks = range(self.parallel_config.world_size)
        meeting = get_distributed_init_method("127.0.0.1", get_open_port())
        actor = ray.remote(num_cpus=0)(RayWorkerWrapper)
        self.workers = [actor.remote(rpc_rank=rank) for rank in ranks]
        arguments = [
            {
                "vllm_config": self.vllm_config,
                "local_rank": rank,
                "rank": rank,
                "distributed_init_method": meeting,
                "is_driver_worker": rank == 0,
            }
            for rank in ranks
        ]
        self.collective_rpc("init_worker", args=(arguments,))
        self.collective_rpc("init_device")
        self.collective_rpc("load_model")
        current_platform.update_block_size_for_backend(self.vllm_config)

    def collective_rpc(  # type: ignore[override]
        self,
        method: Any,
        timeout: float | None = None,
        args: tuple = (),
        kwargs: dict | None = None,
        non_block: bool = False,
    ) -> list[Any]:
        calls = [w.execute_method.remote(method, *args, **(kwargs or {})) for w in self.workers]
        return [call.future() for call in calls] if non_block else ray.get(calls, timeout=timeout)

    def check_health(self) -> None:
        self.collective_rpc("check_health")

    def shutdown(self) -> None:
        for worker in self.workers:
            ray.kill(worker)


def found_in(worker: Any) -> tuple[str, list[int], bool]:
    """What a worker drafts with, and whether vLLM's plugin loader brought our argument patch there."""
    from vllm.engine.arg_utils import EngineArgs

    config = worker.vllm_config.speculative_config
    drafter = type(worker.model_runner.drafter).__name__
    return drafter, list(config.view.layers), getattr(EngineArgs, "_sdfp_patched", False)


def test_plan_and_patches_reach_every_ray_worker(target, plan, kept, prompts, plain_tokens):
    settings = dict(
        distributed_executor_backend=RayActorExecutor, tensor_parallel_size=2, async_scheduling=False
    )
    with (
        ray_cluster("local", where="test", cpus=2),
        engine(target, {"method": "sdfp", "model": plan}, **settings) as llm,
    ):
        assert llm.collective_rpc(found_in) == [("SdfpProposer", kept, True)] * 2
        assert tokens(llm, prompts[:8]) == plain_tokens[:8]
        assert spec_counters(llm)["num_accepted_tokens"] > 0


def test_no_worker_opens_a_file_of_the_plan(target, kept, prompts, plain_tokens, tmp_path):
    """Its folder is gone before a worker starts: bridges and the head's tokens come with the configuration."""
    folder, _ = write_bridged_plan(target, tmp_path / "plan", kept, 3)
    plan = load_plan(folder)
    part = sorted({t for answer in plain_tokens for t in answer[0]})[1:]
    head, content = pack_head(torch.tensor(part), coverage=0.5)
    view = plan.view.model_copy(update={"head": head})
    bridges = (tmp_path / "plan" / BRIDGE_FILE).read_bytes()
    save_plan(plan.model_copy(update={"view": view}), folder, bridges, content)

    class WithoutFolder(RayActorExecutor):
        def _init_executor(self) -> None:
            shutil.rmtree(folder)
            super()._init_executor()

    def held_by(worker: Any) -> tuple[int, int]:
        config = worker.vllm_config.speculative_config
        return len(config.parcel.bridges()), len(worker.model_runner.drafter.model._head.tokens)

    with (
        ray_cluster("local", where="test", cpus=2),
        engine(
            target,
            {"method": "sdfp", "model": folder},
            distributed_executor_backend=WithoutFolder,
            async_scheduling=False,
        ) as llm,
    ):
        assert llm.collective_rpc(held_by) == [(len(plan.view.bridges.runs), len(part))]
        assert tokens(llm, prompts[:8]) == plain_tokens[:8]
        assert spec_counters(llm)["num_draft_tokens"] > 0
