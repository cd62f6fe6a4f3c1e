from tests.support.bigram import bigram, exact  # noqa: F401
from tests.support.fixtures import kept, plain_tokens, plan, prompts, target  # noqa: F401
