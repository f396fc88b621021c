"""A batch that is back: what its engine made of it, and what the way and the reply ask of each row, of all at once.

A call of numpy takes as long for one row as for thirty, and a row's request asks several. Whoever comes first has the
whole batch judged (`fettle.points.judge`), or made scores of (`fettle.answers.probabilities`), and the others find it
done. Both are rules about single rows, and give a row the same numbers, to the bit, whatever rows are beside it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from fettle.answers import Floats, probabilities
from fettle.manifest import Step, Task
from fettle.points import judge
from fettle.rows import Outputs


@dataclass(frozen=True, slots=True)
class Answered:
    """A row's values float32 [width], and where its time went.

    `stage` answered it; `scores` float32 [stages - 1] is what the exits saw, None without exits. It is the row `index`
    of `landed`.
    """

    values: Floats
    queue_ms: float
    infer_ms: float
    batch_rows: int
    stage: int
    scores: Floats | None
    landed: Landed
    index: int


@dataclass(slots=True, eq=False)
class Landed:
    """See the module. `outputs` of the batch are not to be changed any more."""

    outputs: Outputs
    _stages: list[int] = field(init=False)
    _judged: dict[tuple[int, bool], tuple[Step, list[bool], list[float]]] = field(default_factory=dict)
    _shown: tuple[Floats, list[int]] | None = None

    def __post_init__(self) -> None:
        # As rows of their own are, whose sums are then made in the same order.
        values = np.ascontiguousarray(self.outputs.values)
        if values is not self.outputs.values:
            self.outputs = replace(self.outputs, values=values)
        stages = self.outputs.stages
        self._stages = [0] * len(self.outputs.values) if stages is None else stages.tolist()

    def answer(self, index: int, queue_ms: float) -> Answered:
        """One row's, which waited so long for the batch to leave."""
        outputs = self.outputs
        return Answered(
            values=outputs.values[index],
            queue_ms=queue_ms,
            infer_ms=outputs.infer_ms,
            batch_rows=len(self._stages),
            stage=self._stages[index],
            scores=None if outputs.scores is None else outputs.scores[index],
            landed=self,
            index=index,
        )

    def judged(self, index: int, step: Step, task: Task, *, last: bool) -> tuple[bool, float]:
        """Whether the step takes a row's answer, and its score; the batch is of the step's variant."""
        # By identity, as steps are compared field by field; the step is kept, so that no other one has its id.
        found = self._judged.get((id(step), last))
        if found is None:
            stages: NDArray[np.int8] = np.array(self._stages, np.int8)
            taken, scores = judge(self.outputs.values, stages, step, task, last=last)
            found = self._judged[id(step), last] = step, taken.tolist(), scores.tolist()
        _, accepted, scored = found
        return accepted[index], scored[index]

    def shown(self, index: int, task: Task) -> tuple[Floats, int]:
        """A row's scores as a reply shows them, float32 [width], and which of them is the highest, the first of equals.

        `task` is that of the batch's variant.
        """
        if self._shown is None:
            scores = probabilities(self.outputs.values, task)
            self._shown = scores, scores.argmax(axis=1).tolist()
        scores, best = self._shown
        return scores[index], best[index]
