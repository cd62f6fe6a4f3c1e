"""What a single request may not ask for; the engine serves the others. `docs/use/limits.md` is this for users."""

from __future__ import annotations

import functools
from typing import Any

from sdfp_vllm.engine.request_limits import refuse_wrong_limits

_MARK = "_sdfp_patched"


def refuse_requests() -> None:
    """Makes upstream's front end check requests with `refuse_unsupported_request` too, where the engine drafts.

    `InputProcessor._validate_params` is where upstream refuses fields of a request by the engine's configuration: a
    VLLMValidationError from `LLM.generate`, status 400 from a server. Checked on 0.32.0.
    """
    from vllm.v1.engine.input_processor import InputProcessor

    validate = InputProcessor._validate_params
    if hasattr(validate, _MARK):
        return

    @functools.wraps(validate)
    def _validate_params(self: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(self.speculative_config, "method", None) == "sdfp":
            refuse_unsupported_request(params, self.vllm_config)
            refuse_wrong_limits(params)
        return validate(self, params, *args, **kwargs)

    setattr(_validate_params, _MARK, True)
    InputProcessor._validate_params = _validate_params  # type: ignore[method-assign]


def refuse_unsupported_request(params: Any, vllm_config: Any) -> None:
    """Raises upstream's VLLMValidationError for a field that drafting would answer otherwise than plain decoding."""
    from vllm.exceptions import VLLMValidationError

    if getattr(params, "logprob_token_ids", None) and getattr(vllm_config, "use_v2_model_runner", False):
        raise VLLMValidationError(
            "logprob_token_ids cannot be used with SDFP on vLLM's V2 model runner: its rejection sampler ignores them. "
            "Ask for logprobs, or serve with VLLM_USE_V2_MODEL_RUNNER=0.",
            parameter="logprob_token_ids",
            value=params.logprob_token_ids,
        )
