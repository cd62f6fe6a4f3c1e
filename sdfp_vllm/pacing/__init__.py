"""How many tokens to draft, and from where, decided anew in every round from what drafts cost and how often they are right.

Pure Python over numbers: nothing here knows vLLM. `docs/concepts/pacing.md` has the rules and their reasons.
"""
