"""Teaches vLLM's argument handling the method "sdfp": command line, LLM(), AsyncLLM, Ray."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

from sdfp_vllm.errors import SdfpError
from sdfp_vllm.plan.model_files import has_plan_beside, is_same_model
from sdfp_vllm.plan.parcel import PLAN_FILE

METHOD = "sdfp"
_MARK = "_sdfp_patched"


def patch_arguments() -> None:
    """Wraps `EngineArgs.add_cli_args`, `create_speculative_config` and `create_engine_config`, once.

    Upstream accepts a closed list of method names and keeps `--speculative-model`, the flag
    users know, under the name `--spec-model`. Which model runner serves is known once the whole
    configuration is made. Where the functions are gone, vLLM keeps working and "sdfp" stays
    unknown to it.
    """
    from vllm.engine.arg_utils import EngineArgs

    if getattr(EngineArgs, _MARK, False):
        return
    add_cli_args = EngineArgs.add_cli_args
    create = EngineArgs.create_speculative_config
    create_all = EngineArgs.create_engine_config

    @functools.wraps(add_cli_args)
    def with_sdfp_flags(parser: Any) -> Any:
        parser = add_cli_args(parser)
        _add_flags(parser)
        return parser

    @functools.wraps(create)
    def with_sdfp_config(self: Any, target_model_config: Any, target_parallel_config: Any) -> Any:
        settings = sdfp_settings(self)
        if settings is None:
            return create(self, target_model_config, target_parallel_config)
        from sdfp_vllm.engine.upstream.releases import check_release

        check_release()
        from sdfp_vllm.engine.config import build_config

        return build_config(self, settings, target_model_config, target_parallel_config)

    @functools.wraps(create_all)
    def with_checked_runner(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = create_all(self, *args, **kwargs)
        if getattr(config.speculative_config, "method", None) == METHOD and config.use_v2_model_runner:
            from sdfp_vllm.engine.upstream.releases import check_v2_release

            check_v2_release(adapters=config.lora_config is not None)
        return config

    for name, function in (
        ("add_cli_args", staticmethod(with_sdfp_flags)),
        ("create_speculative_config", with_sdfp_config),
        ("create_engine_config", with_checked_runner),
        (_MARK, True),
    ):
        setattr(EngineArgs, name, function)


def _add_flags(parser: Any) -> None:
    known = parser._option_string_actions
    group = parser.add_argument_group("SDFP", "Self-speculative decoding with layers of the target.")
    if "--speculative-model" not in known:
        group.add_argument(
            "--speculative-model",
            dest="spec_model",
            default=None,
            help='"sdfp" (plan found by the model\'s fingerprint, or beside its files), a plan folder, or what --spec-model '
            "takes.",
        )
    if "--num-speculative-tokens" not in known:
        group.add_argument(
            "--num-speculative-tokens",
            dest="spec_tokens",
            type=int,
            default=None,
            help="Draft tokens a round.",
        )
    method = known.get("--spec-method")
    if method is not None and method.choices is not None and METHOD not in method.choices:
        method.choices = [*method.choices, METHOD]


def sdfp_settings(args: Any) -> dict[str, Any] | None:
    """Returns the merged speculative settings if they ask for SDFP, else None.

    SDFP is asked for by method "sdfp", by model "sdfp", by a model that is a plan folder, or by the served model itself
    where a plan lies beside its files. Another model with a plan beside it stays what it is to vLLM: a draft model.

    Raises:
        SdfpError: If a flag and --speculative-config say the same thing twice, or an SDFP model is
            given to another method.
    """
    settings = {k.replace("-", "_"): v for k, v in (args.speculative_config or {}).items()}
    flags = {
        "method": ("--spec-method", args.spec_method),
        "model": ("--speculative-model", args.spec_model),
        "num_speculative_tokens": ("--num-speculative-tokens", args.spec_tokens),
    }
    merged = {**settings, **{key: value for key, (_, value) in flags.items() if value is not None}}
    method, model = merged.get("method"), merged.get("model")
    ours = model == METHOD or _is_plan(model)
    served = str(getattr(args, "model", ""))
    if not ours and method is None and isinstance(model, str) and is_same_model(model, served):
        where = (getattr(args, name, None) for name in ("revision", "download_dir"))
        ours = has_plan_beside(served, PLAN_FILE, *where)
    if method not in (None, METHOD) and ours:
        raise SdfpError(
            f"speculative method {method!r}",
            f"cannot draft with {model!r}, which asks for SDFP",
            f"Leave the method out, or give {method!r} a model of its own.",
        )
    if method != METHOD and not ours:
        return None
    for key, (flag, value) in flags.items():
        if value is not None and key in settings:
            raise SdfpError(flag, f"is also given as --speculative-config's {key!r}", "Give it once.")
    merged["method"] = METHOD
    if model == METHOD:
        merged.pop("model")
    return merged


def _is_plan(model: Any) -> bool:
    return isinstance(model, str) and os.path.isfile(Path(model) / PLAN_FILE)
