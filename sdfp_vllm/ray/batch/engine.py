"""The engine of a batch run, in an actor of Ray Data's pool: a block of requests in, as many answers out."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from sdfp_vllm.plan.parcel import PlanParcel
from sdfp_vllm.ray.batch.last_words import last_words

# The one field of what stands for all answers of a block, where there is no engine to give them.
BROKEN = "broken"
# Renewals of the engine, one after the other without an answer between: then it isn't the requests.
_MOST_RENEWALS = 16

Answer = dict[str, Any]


class BatchEngine:
    """One vLLM engine with SDFP. Whatever happens in it is answered: Ray Data would end the job, and not say why."""

    def __init__(self, model: str, plan: PlanParcel, engine: dict[str, Any]):
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # this process has nothing else to do
        self._folder = tempfile.TemporaryDirectory(prefix="sdfp-plan-")
        self._renewals, self._broken = 0, ""
        try:
            speculative = {"method": "sdfp", "model": str(plan.write(Path(self._folder.name)))}
            self._arguments = {"model": model, "speculative_config": speculative, **engine}
            self._start()
        except Exception as e:
            self._broken = last_words(e)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """Answers a block of {"index", "prompt_token_ids", "sampling"} columns; JSON out, in the same order.

        An answer is {"index"} and text and counts, or an "error"; or the block's only one is {BROKEN: why}.
        """
        asked = [
            {"index": int(index), "prompt_token_ids": list(map(int, ids)), "sampling": json.loads(sampling)}
            for index, ids, sampling in zip(
                batch["index"], batch["prompt_token_ids"], batch["sampling"], strict=True
            )
        ]
        try:
            answers = [] if self._broken else self._answers(asked)
        except Exception as e:  # of an engine that cannot be started again
            self._broken = last_words(e)
        return {"answer": [json.dumps(a) for a in ([{BROKEN: self._broken}] if self._broken else answers)]}

    def _answers(self, asked: list[dict[str, Any]]) -> list[Answer]:
        """Answers all; where one fails, halves find it, so that it alone is answered with an error."""
        try:
            outputs = self._generate(asked)
            self._renewals = 0
            return [
                {
                    "index": a["index"],
                    "text": o.outputs[0].text,
                    "finish_reason": o.outputs[0].finish_reason,
                    "prompt_tokens": len(o.prompt_token_ids or ()),
                    "completion_tokens": len(o.outputs[0].token_ids),
                }
                for a, o in zip(asked, outputs, strict=True)
            ]
        except Exception as e:
            why = last_words(e)  # not the exception itself: its frames hold the engine
        self._renew(why)
        if len(asked) == 1:
            return [{"index": asked[0]["index"], "error": why}]
        half = len(asked) // 2
        return self._answers(asked[:half]) + self._answers(asked[half:])

    def _generate(self, asked: list[dict[str, Any]]) -> list[Any]:
        from vllm import SamplingParams

        prompts: Any = [{"prompt_token_ids": a["prompt_token_ids"]} for a in asked]
        return self._llm.generate(prompts, [SamplingParams(**a["sampling"]) for a in asked], use_tqdm=False)

    def _start(self) -> None:
        from vllm import LLM

        self._llm = LLM(**self._arguments)

    def _renew(self, why: str) -> None:
        """Replaces an engine that failed at work; one that only refused a request goes on."""
        from sdfp_vllm.engine.engine_end import end_engine, free_engine, has_unfinished

        if not has_unfinished(self._llm):
            return
        self._renewals += 1
        if self._renewals > _MOST_RENEWALS:
            raise RuntimeError(why)
        end_engine(self._llm)
        del self._llm
        free_engine()
        self._start()
