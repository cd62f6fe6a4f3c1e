"""Where the vLLM releases that were tried differ from each other, seen as one."""

from __future__ import annotations

from typing import Any


def drafting_metadata(group: Any, common: Any, index: int) -> Any:
    """Builds what the attention of draft step `index` (from 1) is run with in an AttentionGroup.

    Since 0.32 the group does it, which may split its blocks for the kernel; before, block tables came split.
    """
    build = getattr(group, "build_metadata_for_drafting", None)
    build = build or group.get_metadata_builder().build_for_drafting
    return build(common_attn_metadata=common, draft_index=index)


def make_arg_parser(parser: Any) -> Any:
    """Adds the flags of `vllm serve` to a FlexibleArgumentParser; their module moved in 0.33."""
    try:
        from vllm.entrypoints.common.cli_args import make_arg_parser as make
    except ImportError:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser as make
    return make(parser)
