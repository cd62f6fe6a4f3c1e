"""What the Serve application takes."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class ServingArgs(BaseModel):
    """`args` of the application in a Serve config file, or `serve run sdfp_vllm.ray.serving:app model=...`.

    Attributes:
        model: Folder or Hugging Face id, as every node knows it.
        plan: Plan folder where the application is built; None for the default place of the model.
        engine: Flags of `vllm serve`, {"max_model_len": 4096}; `speculative_config` adds to the plan.
    """

    model_config = ConfigDict(extra="forbid")

    model: str
    plan: str | None = None
    engine: dict[str, Any] = Field(default_factory=dict)
