"""`make demo-ray`: a plan made on two Ray workers, then two serving replicas asked by the `openai` client."""

from __future__ import annotations

import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sdfp_vllm.demo.target import PACKAGED
from sdfp_vllm.errors import SdfpError
from sdfp_vllm.ray_cluster import RayOptions, ray_cluster
from sdfp_vllm.terminal import console

MODEL = PACKAGED / "model"
WORKERS = REPLICAS = 2
PROMPTS = [
    "import os\n\n\ndef main(",
    "class Node:\n    def __init__(self",
    "for i in range(",
    "def read(path",
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
    """Plans the embedded demo model into `out` on Ray, serves it on Ray, and prints the answers.

    Raises:
        SdfpError: If Ray is missing or the replicas do not start.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    with ray_cluster("local", where="make demo-ray", cpus=max(WORKERS, REPLICAS)):
        plan = _plan(out, console)
        port = _serve(plan, console)
        _ask(port, console)


def _plan(out: Path, console: Console) -> Path:
    from sdfp_vllm.fit.job import make_plan
    from sdfp_vllm.report import parts

    console.print(f"FIT on {WORKERS} Ray workers:")
    plan = make_plan(
        str(MODEL),
        out=out / "ray-plan",
        console=console,
        length=128,
        run_check=False,
        ray=RayOptions(workers=WORKERS),
    )
    console.print(
        f"{parts(plan.view)} of {plan.fingerprint.num_layers} layers draft "
        f"{plan.num_speculative_tokens} tokens a round."
    )
    return out / "ray-plan"


def _serve(plan: Path, console: Console) -> int:
    from ray import serve

    from sdfp_vllm.serving.application import build
    from sdfp_vllm.serving.settings import ServingArgs

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with console.status(f"Starting {REPLICAS} replicas, a vLLM engine each"):
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        args = ServingArgs(model=str(MODEL), plan=str(plan), engine=_ENGINE)
        serve.run(build(args, num_replicas=REPLICAS), name=_APP)
    console.print(f"{REPLICAS} replicas at http://127.0.0.1:{port}/v1")
    return port


def _ask(port: int, console: Console) -> None:
    from openai import OpenAI

    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")

    def stream(prompt: str) -> tuple[str, int, float]:
        began, pieces = time.perf_counter(), []
        for chunk in client.completions.create(
            model="demo", prompt=prompt, max_tokens=48, temperature=0.0, stream=True
        ):
            pieces.append(chunk.choices[0].text)
        return "".join(pieces), len(pieces), time.perf_counter() - began

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        answers = list(pool.map(stream, PROMPTS))
    table = Table(
        "Prompt", "Answer", "pieces", "seconds", title="Concurrent streams through the openai client"
    )
    for prompt, (text, pieces, seconds) in zip(PROMPTS, answers, strict=True):
        table.add_row(repr(prompt), repr(text[:60]), str(pieces), f"{seconds:.1f}")
    console.print(table)
    if not all(text for text, _, _ in answers):
        raise SdfpError("make demo-ray", "a replica answered nothing", "Look into Ray Serve's logs.")


if __name__ == "__main__":
    run_ray_demo(Path("out"), console())
