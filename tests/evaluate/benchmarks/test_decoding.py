"""How answers are decoded: the released sampling, and random numbers that belong to a question."""

from __future__ import annotations

import torch

from echox.evaluate.benchmarks.decoding import Decoding, decodings


def test_greedy_comes_first_and_the_released_sampling_by_seeds() -> None:
    assert decodings(None, 3, 512) == [Decoding(max_new=512)]
    found = decodings("release", 3, 100)
    assert [each.stem for each in found] == ["greedy-0", "release-17", "release-18", "release-19"]
    assert {(each.temperature, each.top_p, each.max_new) for each in found[1:]} == {(0.2, 0.9, 100)}
    identities = [str(each.identity()) for each in found]
    assert len(set(identities)) == 4 and "top_p" not in found[0].identity()


def test_a_question_is_sampled_the_same_in_every_batch_and_unlike_others() -> None:
    decoding = Decoding(name="release", seed=17, temperature=1.0)
    logits_BV = torch.zeros(1, 1000)

    def tokens(numbers: list[int], seed: int = 17) -> list[list[int]]:
        choose = Decoding(name="release", seed=seed, temperature=1.0).of(numbers).choose(6)
        picked = [choose(logits_BV.expand(len(numbers), -1), place) for place in range(6)]
        return torch.stack(picked, dim=1).tolist()

    three = tokens([4, 5, 6])
    assert tokens([6]) == [three[2]] and tokens([5, 4]) == [three[1], three[0]]
    assert len({tuple(row) for row in three + tokens([4, 5, 6], 18)}) == 6
    assert len(set(three[0])) > 1 and decoding.of([1]).top_p == 1.0


def test_greedy_takes_the_most_probable_token() -> None:
    logits_BV = torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    assert Decoding().of([0, 1]).choose(4)(logits_BV, 0).tolist() == [1, 0]
