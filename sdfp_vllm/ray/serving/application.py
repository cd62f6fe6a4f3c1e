"""`sdfp_vllm.ray.serving:app`: a Ray Serve application of engine replicas behind one gateway."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError
from ray import cluster_resources, serve
from ray.serve import Application

from sdfp_vllm.errors import SdfpError
from sdfp_vllm.plan.store import find_plan
from sdfp_vllm.ray.serving.engine import Engine
from sdfp_vllm.ray.serving.gateway import Gateway
from sdfp_vllm.ray.serving.settings import ServingArgs

# Any of it can be set otherwise under `deployments` of a Serve config file.
_SCALING: dict[str, Any] = {"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 16}
_HEALTH: dict[str, Any] = {"health_check_period_s": 5, "health_check_timeout_s": 30}


def app(args: dict[str, Any]) -> Application:
    """Builds the application, with replicas that follow the load; what `import_path` names.

    Args:
        args: Fields of `ServingArgs`, from a Serve config file or `serve run` as name=value.

    Raises:
        SdfpError: If a field is missing or unknown, there is no usable plan, or vLLM does not
            know an engine setting.
    """
    try:
        return build(ServingArgs.model_validate(args))
    except ValidationError as e:
        first = e.errors()[0]
        field = ".".join(str(p) for p in first["loc"])
        raise SdfpError(
            f"application argument {field!r}",
            first["msg"],
            f"The arguments are {', '.join(ServingArgs.model_fields)}.",
        ) from e


def build(args: ServingArgs, num_replicas: int | None = None) -> Application:
    """Builds the application; the plan is read here, once, and travels in the replicas' arguments.

    Args:
        num_replicas: A fixed number; None scales with the requests in flight.

    Raises:
        SdfpError: As `app`.
    """
    from sdfp_vllm.engine.openai_app import serve_arguments

    flags = serve_arguments(args.model, args.engine)
    plan = find_plan(args.model, args.plan or None, flags.revision, flags.download_dir)
    gpus = flags.tensor_parallel_size
    scaling: dict[str, Any] = (
        {"num_replicas": num_replicas} if num_replicas else {"autoscaling_config": _SCALING}
    )
    engines: Any = serve.deployment(
        Engine,
        name="Engine",
        ray_actor_options=_resources(gpus),
        max_ongoing_requests=256,  # vLLM batches and queues by itself
        **scaling,
        **_HEALTH,
    )
    gateway: Any = serve.deployment(
        Gateway, name="Gateway", max_ongoing_requests=4096, ray_actor_options={"num_cpus": 0}, **_HEALTH
    )
    return gateway.bind(engines.bind(args, plan))


def _resources(gpus: int) -> dict[str, Any]:
    """What a replica asks Ray for: a GPU for each rank, or a CPU where the cluster has no GPU."""
    return {"num_gpus": gpus, "num_cpus": 1} if cluster_resources().get("GPU") else {"num_cpus": 1}
