from fixtures import kept, plain_tokens, plan, prompts, target  # noqa: F401
