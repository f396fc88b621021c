"""Votes among sampled answers to one prompt: when enough of them have been drawn to know the winner. Pure.

The winner has the most votes, and of several such answers the one whose first vote has the lowest choice number; so it
depends on the choices and not on the order in which they are ready. A text without an answer in it votes for none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fettle.errors import UsageError
from fettle.extract import Answer
from fettle.findings import VotePoint
from fettle.generation import Finish, Sampling

# Candidates by answer: how many votes, and the lowest choice number among them.
_Counts = dict[Answer, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class VoteRule:
    """`choices` may be drawn at most. `confidence` None ends the vote only where nothing left can change the winner.

    With a confidence C it also ends where P(Bin(a + b + 1, 1/2) <= a) >= C for the leader's a votes and the runner-up's
    b: the posterior, from a flat prior, that the leader beats the runner-up (Aggarwal et al., "Let's sample step by
    step: adaptive-consistency", 2023). How often that changes the winner of all choices is for data to say
    (`optimize.vote_calibration`).
    """

    choices: int
    confidence: float | None = None

    def __post_init__(self) -> None:
        if self.choices < 1:
            raise UsageError(f"a vote takes at least one choice, not {self.choices}", param="n")
        if self.confidence is not None and not 0.5 < self.confidence < 1:
            raise UsageError(f"the confidence of a vote lies between 0.5 and 1, not {self.confidence}")


def certified(points: Sequence[VotePoint], tolerance: float, sampling: Sampling, choices: int) -> VotePoint | None:
    """The one that ends a vote soonest of those that are certified at `tolerance` for such draws; None for none.

    A certificate is about so many choices, drawn at one temperature, with nothing else that changes a draw.
    """
    plain = Sampling(sampling.temperature, sampling.top_p, seed=sampling.seed)
    if replace(sampling, logprobs=None) != plain:
        return None
    fitting = [
        point
        for point in points
        if point.certificate is not None
        and point.certificate.alpha <= tolerance
        and (point.choices, point.temperature, point.top_p) == (choices, sampling.temperature, sampling.top_p)
    ]
    return min(fitting, key=lambda point: point.drawn, default=None)


class Votes:
    """One vote under way. Choices are numbered from 0.

    Without a confidence every answer counts when it comes. With one they count in the order of their numbers, so an
    answer waits for those before it: short texts are ready first, and would otherwise be given more weight by chance of
    the batch.
    """

    def __init__(self, rule: VoteRule) -> None:
        self.rule = rule
        self.settled = False
        self._answers: dict[int, Answer] = {}
        self._counts: _Counts = {}
        # Up to here the choices count, where they count in order.
        self._next = 0

    def see(self, choice: int, answer: Answer) -> Finish | None:
        """A choice is ready. EARLY_VOTE, for the choices that are not, once the winner is settled.

        Raises:
            UsageError: no such choice, or it has voted already.
        """
        if not 0 <= choice < self.rule.choices or choice in self._answers:
            raise UsageError(f"choice {choice} cannot vote among {self.rule.choices}, or has done so")
        self._answers[choice] = answer
        if self.rule.confidence is None:
            self._count(choice)
            self.settled = self._known(self._counts, self._outstanding())
        while self.rule.confidence is not None and not self.settled and self._next in self._answers:
            self._count(self._next)
            self._next += 1
            self.settled = self._known(self._counts, self._outstanding())
        return Finish.EARLY_VOTE if self.settled and len(self._answers) < self.rule.choices else None

    @property
    def winner(self) -> Answer | None:
        """The leader of the counted votes; the winner once it is settled. None where no text had an answer."""
        return min(self._counts, key=lambda answer: _rank(self._counts[answer]), default=None)

    @property
    def support(self) -> tuple[int, ...]:
        """The choices that are known to answer as the winner does; the first one's text is the one to give back."""
        winner = self.winner
        return tuple(sorted(choice for choice, answer in self._answers.items() if answer.found and answer == winner))

    @property
    def wanted(self) -> int:
        """How many choices should have been begun by now: as many as may settle it if all to come agree.

        None of them can turn out to have been needless, and more at a time would be no more than a guess.
        """
        outstanding = self._outstanding()
        counted = self.rule.choices - len(outstanding)
        if self.settled:
            return counted
        counts = dict(self._counts)
        leader = self.winner or Answer("")
        for number, choice in enumerate(outstanding):
            votes, first = counts.get(leader, (0, choice))
            counts[leader] = (votes + 1, min(first, choice))
            if self._known(counts, outstanding[number + 1 :]):
                return counted + number + 1
        return self.rule.choices

    def _outstanding(self) -> list[int]:
        """Choices that do not count yet, in order."""
        if self.rule.confidence is not None:
            return list(range(self._next, self.rule.choices))
        return [choice for choice in range(self.rule.choices) if choice not in self._answers]

    def _count(self, choice: int) -> None:
        answer = self._answers[choice]
        if answer.found:
            votes, first = self._counts.get(answer, (0, choice))
            self._counts[answer] = (votes + 1, min(first, choice))

    def _known(self, counts: _Counts, outstanding: list[int]) -> bool:
        if not outstanding:
            return True
        ranked = sorted(counts.values(), key=_rank)
        if not ranked:
            return False
        left, earliest = len(outstanding), outstanding[0]
        # Whoever is behind, or not there yet, may still get all that is left.
        rivals = [(votes + left, min(first, earliest)) for votes, first in (*ranked[1:], (0, earliest))]
        if all(_rank(ranked[0]) < _rank(rival) for rival in rivals):
            return True
        if self.rule.confidence is None:
            return False
        ahead, behind = ranked[0][0], ranked[1][0] if len(ranked) > 1 else 0
        from scipy.special import bdtr

        return float(bdtr(ahead, ahead + behind + 1, 0.5)) >= self.rule.confidence


def _rank(candidate: tuple[int, int]) -> tuple[int, int]:
    """Smaller is better: more votes, then the earlier first vote."""
    votes, first = candidate
    return -votes, first
