"""`make demo-ray`: a plan made on two Ray workers, then two serving replicas asked by the `openai` client."""

from __future__ import annotations

import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sdfp_vllm.common.terminal import console
from sdfp_vllm.demo.smollm2 import smollm2
from sdfp_vllm.errors import SdfpError
from sdfp_vllm.ray.cluster import RayOptions, ray_cluster

WORKERS = REPLICAS = 2
QUESTIONS = [
    "Why is the sky blue?",
    "Name three rivers of Europe.",
    "Write a Python function that reverses a list.",
    "What is 17 times 6?",
]
_APP = "sdfp"
# Small engines of one thread: the machine may have two cores, and nothing here is measured.
_ENGINE = {
    "served_model_name": "demo",
    "dtype": "float32",
    "max_model_len": 512,
    "enforce_eager": True,
    "kv_cache_memory_bytes": 256 << 20,
    # On a CPU, vLLM would give the worker a process of its own, to bind its threads; here is one thread.
    "distributed_executor_backend": "vllm.v1.executor.uniproc_executor.UniProcExecutor",
}
_SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


def run_ray_demo(out: Path, console: Console) -> None:
    """Plans SmolLM2-135M-Instruct into `out` on Ray, serves it on Ray, and prints the answers.

    Raises:
        SdfpError: If Ray is missing or the replicas do not start.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    with ray_cluster("local", where="make demo-ray", cpus=max(WORKERS, REPLICAS)):
        model = str(smollm2())
        plan = _plan(model, out, console)
        port = _serve(model, plan, console)
        _ask(port, console)


def _plan(model: str, out: Path, console: Console) -> Path:
    from sdfp_vllm.plan.show import parts
    from sdfp_vllm.planner.job import make_plan

    console.print(f"FIT on {WORKERS} Ray workers:")
    plan = make_plan(
        model,
        out=out / "ray-plan",
        console=console,
        dtype="float32",
        sequences=4,
        length=128,
        text_sequences=4,
        new_tokens=32,
        run_check=False,
        ray=RayOptions(workers=WORKERS),
    )
    console.print(
        f"{parts(plan.view)} of {plan.fingerprint.num_layers} layers draft "
        f"{plan.num_speculative_tokens} tokens a round."
    )
    return out / "ray-plan"


def _serve(model: str, plan: Path, console: Console) -> int:
    from ray import serve

    from sdfp_vllm.ray.serving.application import build
    from sdfp_vllm.ray.serving.settings import ServingArgs

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with console.status(f"Starting {REPLICAS} replicas, a vLLM engine each"):
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        args = ServingArgs(model=model, plan=str(plan), engine=_ENGINE)
        serve.run(build(args, num_replicas=REPLICAS), name=_APP)
    console.print(f"{REPLICAS} replicas at http://127.0.0.1:{port}/v1")
    return port


def _ask(port: int, console: Console) -> None:
    from openai import OpenAI

    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")

    def stream(question: str) -> tuple[str, int, float]:
        began, pieces = time.perf_counter(), []
        for chunk in client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": question}],
            max_tokens=48,
            temperature=0.0,
            stream=True,
        ):
            pieces.append(chunk.choices[0].delta.content or "")
        return "".join(pieces), len(pieces), time.perf_counter() - began

    with ThreadPoolExecutor(len(QUESTIONS)) as pool:
        answers = list(pool.map(stream, QUESTIONS))
    table = Table(
        "Question", "Answer", "pieces", "seconds", title="Concurrent streams through the openai client"
    )
    for question, (text, pieces, seconds) in zip(QUESTIONS, answers, strict=True):
        table.add_row(question, repr(text[:60]), str(pieces), f"{seconds:.1f}")
    console.print(table)
    if not all(text for text, _, _ in answers):
        raise SdfpError("make demo-ray", "a replica answered nothing", "Look into Ray Serve's logs.")


if __name__ == "__main__":
    run_ray_demo(Path("out"), console())
