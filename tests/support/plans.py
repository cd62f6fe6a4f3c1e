"""Plans by hand, and their files, for tests."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from sdfp_vllm.pacing.record import CONFIDENCE_EDGES
from sdfp_vllm.plan.bridge import Bridge
from sdfp_vllm.plan.bridge_file import pack_bridges
from sdfp_vllm.plan.costs import Costs
from sdfp_vllm.plan.fingerprint import Fingerprint
from sdfp_vllm.plan.head_file import pack_head
from sdfp_vllm.plan.keep import KeepSet
from sdfp_vllm.plan.parcel import PLAN_FILE
from sdfp_vllm.plan.schema import (
    BridgeRun,
    Candidate,
    Chances,
    DraftHead,
    FitScore,
    LayerScore,
    Prediction,
    Provenance,
    SkipPlan,
    Speeds,
    StoredView,
    WindowTried,
)
from sdfp_vllm.plan.view import DraftView
from sdfp_vllm.plan.window import DraftWindow

LAYERS = 4
VIEW = DraftView.at(KeepSet((0, 3)), {("attention", 0): "int8", ("mlp", 3): "int8"})
PARTIAL = DraftView.at(KeepSet((0,), attention=(1, 2), mlp=(3,)), {("attention", 1): "int8"})


def stored(view: KeepSet, **changes) -> StoredView:
    return StoredView.of(view, LAYERS).model_copy(update=changes)


def make_plan(**changes) -> SkipPlan:
    """A plan with something in every field; its bridges and its head are beside it, so changes bring them."""
    score = FitScore(
        fisher_trace=1.0,
        perturbation_variance=0.5,
        trace_score=0.5,
        diagonal_score=0.25,
        rounding_scores={"int8": 0.01},
    )
    partial = stored(KeepSet((3,), attention=(0,), mlp=(1,)))
    plan = SkipPlan(
        model="org/model",
        fingerprint=Fingerprint(
            architecture="LlamaForCausalLM", num_layers=LAYERS, hidden_size=8, vocab_size=16, sha256="a" * 64
        ),
        view=stored(VIEW, head=DraftHead(precision="int8")),
        extra_bytes=1000,
        num_speculative_tokens=2,
        draft_tokens_by_batch=[(1, 2), (8, 1), (32, 0)],
        worthwhile=True,
        prediction=Prediction(acceptance_rate=0.8, mean_accepted_length=2.4, speedup=1.4),
        scores=[LayerScore(layer=i, total=score, attention=score, mlp=score) for i in range(LAYERS)],
        curve=[
            Candidate(
                attention=stored(VIEW).attention,
                mlp=stored(VIEW).mlp,
                acceptance=[0.8, 0.7],
                speedup=[1.0, 1.3, 1.4],
            ),
            Candidate(attention=partial.attention, mlp=partial.mlp, acceptance=[0.8], speedup=[1.0, 1.2]),
        ],
        costs=Costs(
            rows=[1, 2, 3],
            attention={"full": [0.25, 0.3, 0.35], "int8": [0.125, 0.15, 0.2]},
            mlp={"full": [0.75, 0.8, 0.85], "int8": [0.375, 0.4, 0.45]},
            head={"full": [0.1, 0.1, 0.2], "int8": [0.05, 0.05, 0.1]},
            draft_head=[0.05, 0.05, 0.1],
            num_layers=LAYERS,
            layer_overhead_ms=0.01,
            draft_overhead_ms=0.1,
            round_overhead_ms=0.2,
            device="cpu",
            dtype="float32",
            threads=2,
            engine="compiled",
        ),
        chances=Chances(acceptance=[0.8, 0.7], confidence=[0.5] * (len(CONFIDENCE_EDGES) + 1)),
        check=Speeds(
            plain=10.0,
            drafted=13.0,
            copies=14.0,
            other=9.0,
            other_dtype="bfloat16",
            acceptance_rate=0.75,
            mean_accepted_length=2.3,
            prompts=4,
            identical=4,
            engine="compiled",
        ),
        made=Provenance(
            calibration="stdlib",
            calibration_tokens=100,
            score_text="own",
            seed=0,
            selector="fit",
            created="2026-01-01",
            sdfp_version="0",
            torch_version="0",
            transformers_version="0",
        ),
    )
    return plan.model_copy(update=changes)


def bridged_and_restricted() -> tuple[SkipPlan, bytes, bytes]:
    """A plan with both files beside it, and their contents."""
    runs = [BridgeRun(first=1, last=2, regularisation=0.1, error=0.5)]
    bridges, tensors = pack_bridges(runs, {(1, 2): Bridge(torch.ones(8))})
    head, tokens = pack_head(torch.tensor([0, 3, 15]), coverage=0.75, precision="int8")
    view = stored(VIEW, bridges=bridges, head=head, window=DraftWindow(last=1024))
    tried = [
        WindowTried(context=4096, last=last, tokens_per_second=9.0, acceptance_rate=0.5)
        for last in (None, 1024)
    ]
    return make_plan(view=view, windows=tried), tensors, tokens


def edit(folder: Path, **changes) -> Path:
    path = folder / PLAN_FILE
    raw = json.loads(path.read_text())
    for dotted, value in changes.items():
        *parents, last = (int(key) if key.isdigit() else key for key in dotted.split("__"))
        node = raw
        for key in parents:
            node = node[key]
        if value is ...:
            del node[last]
        else:
            node[last] = value
    path.write_text(json.dumps(raw))
    return path


def write_model(folder: Path, weights: bytes = b"weights", **config) -> Path:
    folder.mkdir(exist_ok=True)
    base = dict(architectures=["LlamaForCausalLM"], num_hidden_layers=4, hidden_size=8, vocab_size=16)
    (folder / "config.json").write_text(json.dumps({**base, **config}))
    header = json.dumps(
        {"w": {"dtype": "U8", "shape": [len(weights)], "data_offsets": [0, len(weights)]}}
    ).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + weights)
    return folder
