"""What a key may take: a bucket of tokens that flows off, and a number of requests at a time."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fettle.limits import BURST_S, KeyLimits


def test_without_limits_everybody_enters():
    limits = KeyLimits()
    for _ in range(1000):
        assert limits.wait_s(0.0) is None
        limits.enter()
        limits.charge(10**9, 0.0)


def test_so_many_requests_at_a_time():
    limits = KeyLimits(max_concurrent=2)
    limits.enter()
    assert limits.wait_s(0.0) is None
    limits.enter()
    assert limits.wait_s(0.0) == 1
    assert limits.wait_s(1e9) == 1, "time alone frees no place"
    limits.leave()
    assert limits.wait_s(0.0) is None


def test_a_client_that_was_silent_may_send_a_burst():
    limits = KeyLimits(tokens_per_second=100.0)
    for _ in range(4):
        assert limits.wait_s(50.0) is None
        limits.charge(100, 50.0)
    assert limits.wait_s(50.0) is None, "400 of the 500 tokens that fit into five seconds"
    limits.charge(100, 50.0)
    assert limits.wait_s(50.0) == 1


def test_the_wait_is_what_the_debt_takes_to_flow_off():
    limits = KeyLimits(tokens_per_second=100.0)
    limits.charge(1500, 0.0)
    # 1000 tokens over the burst.
    assert limits.wait_s(0.0) == 10
    assert limits.wait_s(4.5) == 6
    assert limits.wait_s(9.99) == 1
    assert limits.wait_s(10.01) is None


def test_nothing_is_saved_up_beyond_a_burst():
    limits = KeyLimits(tokens_per_second=100.0)
    assert limits.wait_s(1e6) is None
    limits.charge(501, 1e6)
    assert limits.wait_s(1e6) == 1


def test_both_limits_hold():
    limits = KeyLimits(max_concurrent=1, tokens_per_second=10.0)
    limits.charge(1000, 0.0)
    assert limits.wait_s(0.0) == 95
    limits.enter()
    assert limits.wait_s(0.0) == 1


@given(
    st.floats(1, 1000),
    st.lists(st.tuples(st.floats(0, 10), st.integers(1, 5000)), min_size=1, max_size=60),
)
def test_over_any_time_the_rate_is_kept_but_for_a_burst_and_one_request(rate, requests):
    limits = KeyLimits(tokens_per_second=rate)
    now, entered, largest = 0.0, 0, 0
    for pause, tokens in requests:
        now += pause
        wait = limits.wait_s(now)
        if wait is None:
            limits.charge(tokens, now)
            entered += tokens
            largest = max(largest, tokens)
        else:
            assert wait >= 1
            # Who comes back when told to is let in.
            assert limits.wait_s(now + wait + 1e-6) is None
            assert wait == 1 or limits.wait_s(now + wait - 1.001) is not None
        assert entered <= rate * (now + BURST_S) + largest + 1e-6


@pytest.mark.parametrize("rate", [0.5, 3.0, 1e6])
def test_the_wait_is_whole_seconds(rate):
    limits = KeyLimits(tokens_per_second=rate)
    limits.charge(math.ceil(rate * BURST_S) + 1, 0.0)
    assert isinstance(limits.wait_s(0.0), int)
