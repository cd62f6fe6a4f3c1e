"""Do the generated digits look like the class asked for, and like digits at all? A small classifier's view."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tests.toy.digits.data import cut, digits


class Judge:
    """scikit-learn's MLP (64 -> 128 -> 64 -> 10), trained on the real digits; 2 s on one core."""

    def __init__(self) -> None:
        from sklearn.neural_network import MLPClassifier

        images, labels = digits()
        pixels = images.flatten(1).numpy()
        self._net = MLPClassifier((128, 64), early_stopping=True, random_state=0).fit(pixels, labels.numpy())
        self._real = _moments(self._features(pixels))

    def accuracy(self, images: Tensor, classes: list[int]) -> float:
        """Share of digits that are taken for their class, in images (n, 1, 8, 8), or in pictures of several, row by row."""
        return float((self._net.predict(_pixels(images)) == np.array(classes)).mean())

    def fid(self, images: Tensor) -> float:
        """Frechet distance between the classifier's last hidden features of the digits in `images` and of all real ones.

        |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)) with mean m and covariance C (arXiv 1706.08500).
        Not comparable with FIDs on Inception features.
        """
        return self._distance(self._features(_pixels(images)))

    def fid_behind(self, images: Tensor, others: Tensor, draws: int = 200) -> tuple[float, float]:
        """How much larger the FID of `images` is than that of `others`, which are of the same seeds; and the standard error of that.

        The error is of a bootstrap over seeds, drawn for both together.
        """
        made, other = (
            self._features(_pixels(each)).reshape(len(each), -1, self._real[0].size)
            for each in (images, others)
        )
        random = np.random.default_rng(0)
        gaps = []
        for rows in random.integers(len(made), size=(draws, len(made))):
            gaps.append(
                self._distance(made[rows].reshape(-1, made.shape[-1]))
                - self._distance(other[rows].reshape(-1, made.shape[-1]))
            )
        return self.fid(images) - self.fid(others), float(np.std(gaps))

    def _distance(self, features: NDArray) -> float:
        mean, covariance = _moments(features)
        real_mean, real_covariance = self._real
        # tr (C C')^(1/2) is that of (A C' A)^(1/2) with A = C^(1/2): symmetric, so few images do no harm.
        values, vectors = np.linalg.eigh(covariance)
        half = vectors * np.sqrt(values.clip(0)) @ vectors.T
        root = np.sqrt(np.linalg.eigvalsh(half @ real_covariance @ half).clip(0)).sum()
        distance = ((mean - real_mean) ** 2).sum() + np.trace(covariance + real_covariance) - 2 * root
        return float(distance)

    def _features(self, pixels: NDArray) -> NDArray:
        hidden = pixels
        for weights, bias in zip(self._net.coefs_[:-1], self._net.intercepts_[:-1], strict=True):
            hidden = np.maximum(hidden @ weights + bias, 0)
        return hidden


def _moments(features: NDArray) -> tuple[NDArray, NDArray]:
    return features.mean(0), np.cov(features, rowvar=False)


@cache
def judge() -> Judge:
    return Judge()


def _pixels(images: Tensor) -> NDArray:
    return cut(images).clamp(-1, 1).flatten(1).numpy()
