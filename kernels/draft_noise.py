"""The random stream of draft sampling: Gumbel noise by (seed, position, token), for Triton and torch alike.

    u     = (murmur3(seed, position + SALT, token) + 1/2) / 2^32
    noise = -log(-log(1 - u))

Adding noise to logits / temperature and taking the argmax samples from their softmax (Gumbel-max,
Maddison et al., arXiv 1411.0030, section 2). The hash is MurmurHash3_x86_32 over the seed's two words,
the position and the token. Hash, salt and key are those of vLLM 0.32's draft sampling
(`vllm/v1/worker/gpu/sample/gumbel.py`), so that a draw here can replace one there: the salt keeps the
draft's noise apart from the target's, and verification, a ratio test, needs the two independent.
"""

import torch
from torch import Tensor

from sdfp_vllm.kernels.triton_support import tl, triton

SALT = 1 << 30
_SALT = tl.constexpr(SALT)
_LARGEST = tl.constexpr(1.0 - 2.0**-24)  # u rounds to 1 above it, and the noise to -inf


@triton.jit
def _mix(h, word):
    word *= 0xCC9E2D51
    word = (word << 15) | (word >> 17)
    word *= 0x1B873593
    h ^= word
    h = (h << 13) | (h >> 19)
    return h * 5 + 0xE6546B64


@triton.jit
def gumbel_noise(seed, position, token):
    """float32 noise for int64 scalars `seed`, `position` and a block of int32 `token`."""
    position = position.to(tl.int64) + _SALT
    h = _mix((seed ^ seed).to(tl.uint32), (seed & 0xFFFFFFFF).to(tl.uint32))
    h = _mix(h, ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32))
    h = _mix(h, (position & 0xFFFFFFFF).to(tl.uint32))
    h = _mix(h, token.to(tl.uint32))
    h ^= 16  # bytes hashed
    h ^= h >> 16
    h *= 0x85EBCA6B
    h ^= h >> 13
    h *= 0xC2B2AE35
    h ^= h >> 16
    u = (h.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    u = tl.minimum(u, _LARGEST)
    # log1p(-u), accurate at small u where the winning noise lies: with w = 1 - u as rounded, the error
    # of log(w) is that of w, and -u / (w - 1) takes it out (Kahan).
    w = 1.0 - u
    log1p = tl.where(w == 1.0, -u, tl.log(w) * (u / tl.where(w == 1.0, 1.0, 1.0 - w)))
    return -tl.log(-log1p)


def gumbel_noise_reference(seeds: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """Noise float32 [T, V] for int64 `seeds` [T], `positions` [T] and `tokens` [V]."""
    word = 0xFFFFFFFF

    def mix(h: Tensor, k: Tensor) -> Tensor:
        k = (k * 0xCC9E2D51) & word
        k = ((k << 15) | (k >> 17)) & word
        h = h ^ ((k * 0x1B873593) & word)
        h = ((h << 13) | (h >> 19)) & word
        return (h * 5 + 0xE6546B64) & word

    h = mix(torch.zeros_like(seeds), seeds & word)
    h = mix(h, (seeds >> 32) & word)
    h = mix(h, (positions + SALT) & word)
    h = mix(h[:, None], tokens & word) ^ 16
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & word
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & word
    h = h ^ (h >> 16)
    u = ((h.float() + 0.5) * 2.0**-32).clamp_max(1.0 - 2.0**-24)
    return -torch.log(-torch.log1p(-u))
