"""The kernels compile for NVIDIA GPUs, which needs none: Triton lowers them and its ptxas assembles.

The interpreter, under which their results are tested, accepts programs the compiler refuses.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

from sdfp_vllm.kernels import draft_begin, draft_step, embed_rms_norm, skip_residual_rms_norm  # noqa: E402

NONE = "constexpr"
INTEGERS = {
    "rows": "i32",
    "all_rows": "i32",
    "max_model_len": "i32",
    "vocab": "i32",
    "hidden": "i32",
    "chunks": "i32",
}
ROW = {
    "branch_ptr": "*bf16",
    "residual_ptr": "*bf16",
    "out_ptr": "*bf16",
    "row_scale_ptr": "*fp32",
    "weight_ptr": "*bf16",
    "table_ptr": "*bf16",
}
BATCH = {
    "idx_mapping_ptr": "*i32",
    "draft_idx_ptr": "*i64",
    "input_ids_ptr": "*i32",
    "positions_ptr": "*i64",
    "seq_lens_ptr": "*i32",
    "draft_query_start_loc_ptr": "*i32",
    "layout_ptr": "*i64",
    "slot_mapping_ptr": "*i64",
    "num_sampled_ptr": "*i32",
    "num_rejected_ptr": "*i32",
    "last_sampled_ptr": "*i64",
    "query_start_loc_ptr": "*i32",
    "target_positions_ptr": "*i64",
    "target_seq_lens_ptr": "*i32",
    "logits_ptr": "*bf16",
    "temperature_ptr": "*fp32",
    "seeds_ptr": "*i64",
    "step_ptr": "*i64",
    "draft_tokens_ptr": "*i64",
    "cache_ptr": "*bf16",
    "value_ptr": "*fp32",
    "token_ptr": "*i32",
    "arrived_ptr": "*i32",
    "ids_ptr": "*i32",
}
FLOATS = {"eps": "fp32", "scale": "fp32", "weight_offset": "fp32"}
BRIDGE = {name: "*fp32" for name in ("shift_ptr", "scale_ptr", "mean_ptr", "down_ptr", "up_ptr")}


def signature(kernel: Any, constants: dict[str, Any]) -> dict[str, str]:
    known = {**INTEGERS, **ROW, **BATCH, **FLOATS, **BRIDGE}
    known["out_ptr"] = OUT.get(constants.get("ROUND"), ROW["out_ptr"])
    return {
        name: NONE if name in constants else "i64" if "stride" in name else known[name]
        for name in inspect.signature(kernel.fn).parameters
    }


NO_BRIDGE = {**dict.fromkeys(BRIDGE), "HAS_SHIFT": False, "HAS_SCALE": False, "RANK": 0, "RANK_TILE": 1}
RANK_16 = {"scale_ptr": None, "HAS_SHIFT": True, "HAS_SCALE": False, "RANK": 16, "RANK_TILE": 4}
UNROUNDED = {"row_scale_ptr": None, "ROUND": 0, "BLOCK": 4096}
OUT = {1: "*i8", 2: "*u8"}  # by ROUND
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "draft_begin": (draft_begin, {"GROUPS": 1, "ROWS": 128}),
    "draft_begin, 3 groups": (draft_begin, {"GROUPS": 3, "ROWS": 128}),
    "draft_step, sampled": (
        draft_step,
        {"GROUPS": 2, "SAMPLE": True, "CACHE": True, "CHUNK": 4096, "CHUNKS": 64},
    ),
    "draft_step, greedy": (
        draft_step,
        {"GROUPS": 1, "SAMPLE": False, "CACHE": False, "CHUNK": 4096, "CHUNKS": 32}
        | {"temperature_ptr": None, "seeds_ptr": None, "cache_ptr": None},
    ),
    "skip_residual_rms_norm": (skip_residual_rms_norm, NO_BRIDGE | UNROUNDED),
    "skip_residual_rms_norm, rank 16": (skip_residual_rms_norm, RANK_16 | UNROUNDED),
    "skip_residual_rms_norm_rounded, int8": (skip_residual_rms_norm, NO_BRIDGE | {"ROUND": 1, "BLOCK": 4096}),
    "skip_residual_rms_norm_rounded, int8, rank 16": (
        skip_residual_rms_norm,
        RANK_16 | {"ROUND": 1, "BLOCK": 4096},
    ),
    "skip_residual_rms_norm_rounded, fp8": (skip_residual_rms_norm, NO_BRIDGE | {"ROUND": 2, "BLOCK": 4096}),
    "skip_residual_rms_norm_rounded, fp8, rank 16": (
        skip_residual_rms_norm,
        RANK_16 | {"ROUND": 2, "BLOCK": 4096},
    ),
    "embed_rms_norm": (embed_rms_norm, {"BLOCK": 8192}),
}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", CASES)
def test_compiles_to_machine_code(
    name: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # nothing compiled earlier counts
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, constants = CASES[name]
    kernel = module._kernel
    source = ASTSource(fn=kernel, signature=signature(kernel, constants), constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
    assert len(compiled.asm["cubin"]) > 1000
