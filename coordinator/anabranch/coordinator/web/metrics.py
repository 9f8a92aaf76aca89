"""A federation's numbers for Prometheus, read from its store at each scrape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from anabranch.coordinator.federation import FederationConfig
from anabranch.coordinator.rounds.control import Want
from anabranch.coordinator.rounds.standing import standing
from anabranch.coordinator.store import Store

LABELS = ("federation", "run")


class FederationCollector:
    """A collector for ``prometheus_client``: what the store says, and nothing kept beside it.

    Args:
        config: The federation.
        store: Its store.
    """

    def __init__(self, config: FederationConfig, store: Store) -> None:
        self._config, self._store = config, store
        self._of = (config.name, config.run)

    def collect(self) -> Iterator[Metric]:
        """Every metric; names end as Prometheus asks, and units are seconds and bytes."""
        now, over = standing(self._config, self._store), self._store.notes("round")
        yield self._gauge("round", "Round under way; 0 between rounds.", now.round or 0)
        yield self._gauge("rounds_planned", "Rounds the run plans.", now.rounds)
        yield self._gauge("paused", "1 while the operator pauses it.", now.want == Want.PAUSE.value)
        yield self._gauge("round_asked", "Clients asked in the round under way.", len(now.asked))
        yield self._gauge("round_admitted", "Updates admitted to it.", len(now.admitted))
        rounds = {"published": now.published, "abandoned": now.abandoned}
        yield self._counter("rounds", "Rounds that are over, by how they ended.", "status", rounds)
        refused = Counter(row.code for row in self._store.refusals())
        yield self._counter(
            "refusals", "Replies that were not admitted, by reason.", "code", refused
        )
        admitted = {"": len(self._store.contributions())}
        yield self._counter("updates", "Updates admitted.", None, admitted)
        moved = {
            way: sum(row[f"bytes_{way}"] for row in over if f"bytes_{way}" in row)
            for way in ("up", "down")
        }
        yield self._counter("bytes", "Bytes of rounds that are over, by way.", "way", moved)
        for name, key, told in (
            ("last_round_seconds", "seconds", "How long the last round took."),
            ("last_merge_seconds", "merge_seconds", "How long its merge took."),
            ("last_truncation_ratio", "truncation_error", "What going back to rank r lost of it."),
            ("epsilon", "epsilon", "What its published rounds have spent of privacy."),
        ):
            values = [row[key] for row in over if row.get(key) is not None]
            if values:
                yield self._gauge(name, told, values[-1])

    def _gauge(self, name: str, told: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"anabranch_{name}", told, labels=LABELS)
        family.add_metric(self._of, float(value))
        return family

    def _counter(self, name: str, told: str, by: str | None, values: dict[str, int]) -> Metric:
        labels = LABELS if by is None else (*LABELS, by)
        family = CounterMetricFamily(f"anabranch_{name}", told, labels=labels)
        for label, value in sorted(values.items()):
            family.add_metric(self._of if by is None else (*self._of, label), float(value))
        return family
