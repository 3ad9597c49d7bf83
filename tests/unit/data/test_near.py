"""MinHash against the sets that it stands for: what is found, what is missed, and that nothing is told wrongly."""

from __future__ import annotations

import numpy as np
import pytest

from truetune.data import near


def words(generator: np.random.Generator, count: int) -> list[str]:
    return ["".join(generator.choice(list("abcdefghijklmnop"), 6)) for _ in range(count)]


def changed(text: list[str], generator: np.random.Generator, count: int) -> list[str]:
    """The text with ``count`` words in a row replaced."""
    start = int(generator.integers(0, len(text) - count))
    return [*text[:start], *words(generator, count), *text[start + count :]]


def found(texts: list[str], training: int | None = None, most: int = near.COMPARISONS) -> near.Near:
    digests = np.unique(texts, return_inverse=True)[1]
    return near.find(
        near.bands(texts), digests, training or len(texts), lambda places: map(texts.__getitem__, places), most
    )


def test_jaccard_is_that_of_the_sets() -> None:
    a, b = "the quick brown fox", "the quick  brown\nFOX jumps"
    sets = [{t[i : i + 8] for i in range(len(t) - 7)} for t in ("the quick brown fox", "the quick brown fox jumps")]
    truth = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
    assert near.jaccard(near.shingles(a), near.shingles(b)) == pytest.approx(truth)
    assert near.jaccard(near.shingles("a"), near.shingles("b")) == 0
    assert len(near.shingles("")) == 1


def test_texts_in_company_have_the_bands_that_they_have_alone() -> None:
    generator = np.random.default_rng(0)
    texts = ["", "x", "seven b", "eight by", *(" ".join(words(generator, n)) for n in (1, 2, 40, 400)), "é" * 50]
    assert np.array_equal(near.bands(texts), np.concatenate([near.bands([text]) for text in texts]))


def test_shared_bands_are_as_many_as_the_equation_says() -> None:
    """Over 400 pairs the share of pairs with no common band is within four standard errors of the equation's."""
    generator = np.random.default_rng(1)
    missed, expected = [], []
    for _ in range(400):
        text = words(generator, 40)
        pair = [" ".join(text), " ".join(changed(text, generator, 8))]
        a, b = near.bands(pair)
        missed.append(not (a == b).any())
        expected.append(near.missed(near.jaccard(*map(near.shingles, pair))))
    share = np.mean(expected)
    assert 0.05 < share < 0.5, "pairs for which the equation says something"
    assert abs(np.mean(missed) - share) < 4 * (share * (1 - share) / len(missed)) ** 0.5


def test_far_texts_share_no_band_by_chance() -> None:
    """Hashes that were less than spread over their 32 bits would: some 9 of these 100 million pairs of bands."""
    letters = np.random.default_rng(3).integers(97, 123, (5000, 400), dtype=np.uint8)
    bands = near.bands([row.tobytes().decode() for row in letters])
    assert all(len(np.unique(band)) == len(band) for band in bands.T)


def test_near_pairs_are_found_and_far_ones_are_not() -> None:
    generator = np.random.default_rng(2)
    texts = [" ".join(words(generator, 60)) for _ in range(300)]
    planted = {}
    for i in range(0, 100, 2):
        planted[len(texts)] = i
        texts.append(" ".join(changed(texts[i].split(), generator, 3)))
    for i in range(1, 100, 2):  # half of it is another: no near duplicate
        texts.append(" ".join(changed(texts[i].split(), generator, 30)))
    result = found(texts)
    told = {row: int(of) for row, of in enumerate(result.of) if of >= 0}
    assert told.items() <= planted.items(), "nothing that is not near is told"
    assert len(told) >= len(planted) - 2 and not result.left
    assert all(result.similarity[row] >= near.THRESHOLD for row in told)


def test_equal_rows_are_not_told_as_near_and_held_out_rows_are_compared_with_training_rows_alone() -> None:
    generator = np.random.default_rng(3)
    a, b = (" ".join(words(generator, 60)) for _ in range(2))
    texts = [a, b, a, a + " end", a + " end", b + " end", b + " end."]
    assert found(texts).of.tolist() == [-1, -1, -1, 0, 0, 1, 1]
    assert found(texts, training=1).of.tolist() == [-1, -1, -1, 0, 0, -1, -1]


def test_pairs_beyond_the_most_are_counted() -> None:
    generator = np.random.default_rng(4)
    a = " ".join(words(generator, 60))
    result = found([a + f" {i}" for i in range(30)], most=5)
    assert (result.of >= 0).sum() == 5 and result.left >= 24
