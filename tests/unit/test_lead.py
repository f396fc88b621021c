"""How early the next batch leaves: few come too late whatever is predicted wrong, none leaves earlier than needed."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from deployments.flights import Flights
from fettle.lead import LEAST, MOST, Lead

CALL_S = 0.004


def late_share(lead: Lead, errors_s: np.ndarray) -> float:
    """Batches one after the other, each free so much later than predicted; the share of those that came too late."""
    late, now = 0, 0.0
    for error in errors_s:
        now += 1.0
        predicted, free = now, now + error
        leaves = predicted - lead.seconds(CALL_S)
        if free < leaves:
            lead.landed(free, CALL_S, held=True)
        else:
            lead.left(leaves)
            lead.landed(free, CALL_S, held=False)
        late += free - leaves < CALL_S
    return late / len(errors_s)


def test_where_predictions_hold_it_stays_at_what_a_call_takes():
    lead = Lead()
    assert late_share(lead, np.zeros(500)) == 0
    assert lead.calls == LEAST


@pytest.mark.parametrize("spread_s", [0.004, 0.01, 0.02])
def test_one_in_forty_comes_too_late_however_wrong_predictions_are(spread_s):
    lead = Lead()
    errors = np.random.default_rng(0).uniform(-spread_s, spread_s, 4000)
    late_share(lead, errors[:1000])
    assert late_share(lead, errors[1000:]) == pytest.approx(1 / 40, abs=0.012)
    # No earlier than the worst one needs, but for what the last late one has added.
    assert CALL_S <= lead.seconds(CALL_S) < 1.6 * (spread_s + CALL_S)


def test_it_has_an_end_and_comes_back():
    lead = Lead()
    late_share(lead, np.full(20, -1.0))
    assert lead.calls == MOST
    late_share(lead, np.zeros(400))
    assert lead.calls == LEAST


def test_what_left_because_it_was_asked_for_says_nothing():
    lead = Lead(calls=4.0)
    lead.landed(1.0, CALL_S, held=False)
    assert lead.calls == 4.0


async def held(flights: Flights, takes_s: float) -> tuple[list, asyncio.Task[None]]:
    batch: list = []
    flights.depart(batch, takes_s, 1)
    waiting = asyncio.create_task(flights.nearly_free(1, CALL_S))
    await asyncio.sleep(0.01)
    return batch, waiting


def test_a_batch_that_is_back_early_lets_the_next_one_go_and_was_too_long_waited_for():
    async def early() -> Flights:
        flights = Flights()
        batch, waiting = await held(flights, takes_s=30.0)
        assert not waiting.done()
        flights.land(batch)
        await asyncio.wait_for(waiting, 1.0)
        return flights

    assert asyncio.run(early()).lead.calls > LEAST


def test_one_that_is_back_when_it_was_predicted_found_the_next_one_there():
    async def in_time() -> Flights:
        flights = Flights()
        batch, waiting = await held(flights, takes_s=0.05)
        await asyncio.wait_for(waiting, 1.0)
        await asyncio.sleep(2 * CALL_S)
        flights.land(batch)
        return flights

    assert asyncio.run(in_time()).lead.calls == LEAST
