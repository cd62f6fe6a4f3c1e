"""An engine as a node starts it that has nothing in its caches yet; run in a process of its own.

Usage: python fresh_node.py '{"model": ..., "prompts": [...], "speculative_config": {...}, ...}'
"""

from __future__ import annotations

import json
import sys

from tests.support.engines import engine, spec_counters, tokens

if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    prompts = settings.pop("prompts")
    with engine(settings.pop("model"), settings.pop("speculative_config", None), **settings) as llm:
        answers = tokens(llm, prompts)
        print(json.dumps({"answers": answers, "drafted": spec_counters(llm)["num_draft_tokens"]}))
