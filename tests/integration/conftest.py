from bigram import bigram, exact  # noqa: F401
from fixtures import kept, plain_tokens, plan, prompts, target  # noqa: F401
