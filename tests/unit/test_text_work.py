"""What travels between router and replica arrives as it was."""

from __future__ import annotations

import math
import pickle

import pytest

from deployments.text_work import Bit
from fettle.errors import EngineError
from fettle.generation import Finish, Token


@pytest.mark.parametrize(
    "bit",
    [
        Bit(3),
        Bit(
            0,
            "text",
            (Token(1, -0.5, ((1, -0.5), (2, -1.0)), 0.25), Token(2, -0.1)),
            Finish.STOP,
            None,
            "end",
            (),
            7,
            0.5,
        ),
        Bit(1, error=EngineError("gone"), votes=(3, 2), score=1.0),
    ],
)
def test_a_bit_survives_its_way(bit: Bit) -> None:
    arrived = pickle.loads(pickle.dumps(bit))  # noqa: S301 - our own
    assert (arrived.choice, arrived.text, arrived.finish) == (bit.choice, bit.text, bit.finish)
    assert (arrived.stopped_by, arrived.prompt, arrived.cached, arrived.votes) == (
        bit.stopped_by,
        bit.prompt,
        bit.cached,
        bit.votes,
    )
    assert arrived.score == bit.score or math.isnan(bit.score)
    assert str(arrived.error) == str(bit.error)
    assert [repr(token) for token in arrived.tokens] == [repr(token) for token in bit.tokens]
