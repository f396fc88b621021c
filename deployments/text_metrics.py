"""What a replica that generates text tells Prometheus: its slots, its cache, what was fed and decoded."""

from __future__ import annotations

from deployments import metrics
from deployments.exporter import Exporter
from workers.generator import Generator


def tell_generator(family: str, variant: str, generator: Generator, to: Exporter) -> None:
    """Reads plain numbers while the engine's thread writes them: each is right, all of one moment they need not be."""
    labels, stats = (family, variant), generator.stats
    to.level(metrics.SLOTS, labels, float(generator.max_slots))
    to.level(metrics.ALIVE, labels, float(generator.alive))
    to.level(metrics.WAITING, labels, float(generator.waiting))
    to.level(metrics.CACHE_TOKENS, labels, float(generator.cached_tokens))
    to.level(metrics.CACHE_SIZE, labels, float(generator.cache_size))
    to.total(metrics.FED_TOKENS, labels, stats.fed_tokens)
    to.total(metrics.REUSED_TOKENS, labels, stats.reused_tokens)
    to.total(metrics.FEED_SECONDS, labels, stats.feed_s)
    to.total(metrics.DECODE_STEPS, labels, stats.decode_steps)
    to.total(metrics.DECODED_TOKENS, labels, stats.decode_rows)
    to.total(metrics.DECODE_SECONDS, labels, stats.decode_s)
    to.total(metrics.PREEMPTIONS, labels, stats.preempted)
    to.total(metrics.DRAFTED, labels, stats.drafted)
    to.total(metrics.ACCEPTED, labels, stats.accepted)
