"""Metrics: what Prometheus takes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from replication.leg import LegState, MirrorState
from replication.members import LegCounters, LegStatus, MirrorStatus
from replication.membership import LegInfo
from terrace.metrics import _Families, _mirror
from tests.replication.stores import first_record


def leg(info: LegInfo, state: LegState) -> LegStatus:
    return LegStatus(info, state, 0.0, False, 0, None, None, None, LegCounters())


def test_no_two_legs_have_the_same_labels_also_where_several_are_on_nbd_servers_that_one_node_added() -> None:
    record = first_record("ab")
    servers = [LegInfo(uri, "a", f"nbd://{uri}/db", "nbd") for uri in ("one", "two")]
    legs = (*(leg(one, LegState.UP_TO_DATE) for one in record.legs), *(leg(one, LegState.STALE) for one in servers))
    membership = replace(record, legs=tuple(one.info for one in legs))
    status = MirrorStatus(membership, MirrorState.DEGRADED, legs, None, None, 1, 0, 0, None, 0.0, 0.0, 0)
    families = _Families()
    _mirror(families, "p/db", status)

    class Collector:
        def collect(self) -> list[object]:
            return list(families.all.values())

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Collector())  # type: ignore[arg-type]
    text = generate_latest(registry).decode()
    samples = [one for family in text_string_to_metric_families(text) for one in family.samples]
    counted = Counter((one.name, tuple(sorted(one.labels.items()))) for one in samples)
    assert [key for key, count in counted.items() if count > 1] == []
    assert {one.labels["node"] for one in samples if "node" in one.labels} == {"a", "b", "nbd://one/db", "nbd://two/db"}
