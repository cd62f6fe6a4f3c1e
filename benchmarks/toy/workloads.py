"""What the suite asks: prompts of four kinds, in batches, greedy and sampled."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from sdfp_vllm.measure.spec import Turn
from tests.toy.held_out import held_out_prompts

CODE, PROSE, COPY, NOISE = "code completion", "free text", "copy-heavy", "noise"
QUEUE = "code, others waiting"
KINDS = (CODE, PROSE, COPY)
PLACES = 16  # of an engine
# A few requests say little: texts differ in how easily they are foreseen, above all where they repeat themselves.
PROMPTS = {1: 3, 2: 4}

# Not what the demo target was trained on, and unlike code hard to foresee.
_PROSE = """
The ferry left the island an hour late, and nobody on deck seemed to mind. A woman was selling coffee from a flask,
two boys were counting gulls, and the captain, when he finally came, apologised by ringing the bell three times.
Bread rises because yeast feeds on sugar and breathes out gas, and because flour, once wetted and worked, holds on to
it. Everything else a baker does is a way of making either of the two happen sooner, later, or more evenly.
When the river froze, the village held its market on the ice. Old people remembered years when carts and horses
crossed; the young ones did not believe it until they saw the photographs that hung in the back of the inn.
A telescope does not bring the stars nearer, it only gathers more of their light. What astronomers call resolution is
the patience of a large mirror, and what they call noise is often a cloud, a lamp, or a car with its lights on.
The committee met on Thursdays to decide what should be decided. Minutes were taken, read out, corrected and approved,
and in eleven years not one of its members could recall a vote, although everybody agreed that there must have been.
Glass is made of sand, soda and lime, and of heat. The sand gives it body, the soda lets it melt sooner, the lime keeps
it from dissolving in the rain, and the heat is what one pays for; so glassmakers settled where forests were.
My grandmother kept her recipes in her head and her accounts in a recipe book. After the funeral we found the price of
eggs for every month since the war, two pressed flowers, and nowhere at all how she had made the plum cake.
Maps of the sea are mostly empty, and sailors like them that way. A crowded chart means rocks, wrecks and shoals, each
of them written down because somebody once met it without knowing, and a clean one means that one may sleep.
"""


@dataclass(frozen=True)
class Cell:
    """One point of the suite: `prompts` of one kind, `batch` at a time; those of QUEUE all at once, and the engine has
    `batch` places."""

    kind: str
    batch: int
    temperature: float
    prompts: int

    @property
    def name(self) -> str:
        sampled = f", T={self.temperature}" if self.temperature else ""
        return f"{self.kind}, batch {self.batch}{sampled}"


def cells(batches: list[int], temperature: float = 0.7) -> list[Cell]:
    """Every kind at every batch size greedily; code also sampled, and with a queue; noise, the worst there is, at the
    ends."""
    ends = sorted({batches[0], batches[-1]})
    found = [Cell(kind, b, 0.0, PROMPTS.get(b, b)) for kind in KINDS for b in batches]
    found += [Cell(CODE, b, temperature, PROMPTS.get(b, b)) for b in batches if b in (1, 8)]
    found += [Cell(QUEUE, b, 0.0, 2 * b) for b in batches if b == PLACES]
    return found + [Cell(NOISE, b, 0.0, max(b, 2)) for b in ends]


def turn(cell: Cell, target: Path, prompt_tokens: int, new_tokens: int, seed: int) -> Turn:
    """The requests of `cell`; other ones for every cell and seed, for suffix decoding remembers what it was asked."""
    own = 1000 * seed + 10 * cell.batch + (cell.temperature > 0) + 5 * (cell.kind == QUEUE)
    return Turn(
        prompts=list(_prompts(cell.kind, target, cell.prompts, prompt_tokens, own)),
        batch=cell.prompts if cell.kind == QUEUE else cell.batch,
        max_tokens=new_tokens,
        temperature=cell.temperature,
    )


def _prompts(kind: str, target: Path, count: int, tokens: int, seed: int) -> list[list[int]]:
    if kind in (CODE, QUEUE):
        return held_out_prompts(target, count=count, tokens=tokens, seed=seed)
    if kind == COPY:  # a passage, and again its beginning: what follows stands in the prompt
        passage = 2 * tokens // 3
        said = held_out_prompts(target, count=count, tokens=passage, seed=500 + seed)
        return [p + p[: tokens - passage] for p in said]
    rng = random.Random(f"{kind} {seed}")
    if kind == PROSE:
        ids = _tokenizer(target).encode(" ".join(_PROSE.split())).ids
        starts = rng.sample(range(len(ids) - tokens), count)
        return [ids[s : s + tokens] for s in starts]
    return [[rng.randrange(256, 2048) for _ in range(tokens)] for _ in range(count)]


def _tokenizer(target: Path):
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(target / "tokenizer.json"))
