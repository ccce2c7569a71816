"""What the oracle accepts of a refused operation."""

from __future__ import annotations

import pytest

from tests.simulation.oracle import Model, Op, OracleError

SIZE = 8192


@pytest.mark.parametrize(
    ("op", "after"),
    [
        (Op("policy 'p'", policy="p"), (bytes(SIZE), "p", False)),
        (Op("filling", filling=True), (bytes(SIZE), "", True)),
        (Op("resize", size=2 * SIZE), (bytes(2 * SIZE), "", False)),
    ],
    ids=lambda value: getattr(value, "what", ""),
)
def test_a_refused_operation_may_come_true_only_where_nothing_could_be_put_over_its_record(
    op: Op, after: tuple[bytes, str, bool]
) -> None:
    found, policy, filling = after

    def judged(model: Model) -> Model:
        model.judge(found, everything=True, policy=policy, filling=filling)
        return model

    broken = Model(SIZE)
    broken.refused(op, log_is_broken=True)
    assert judged(broken).policy == policy

    unhappened = Model(SIZE)
    unhappened.refused(op, log_is_broken=True)
    unhappened.judge(bytes(SIZE), everything=True, policy="", filling=False)

    sound = Model(SIZE)
    sound.refused(op, log_is_broken=False)
    with pytest.raises(OracleError):
        judged(sound)

    # The log has gone on elsewhere since.
    gone_on = Model(SIZE)
    gone_on.refused(op, log_is_broken=True)
    gone_on.returned(Op("write", [(0, b"x")]))
    with pytest.raises(OracleError):
        judged(gone_on)


def test_of_several_refused_operations_only_the_first_may_come_true() -> None:
    model = Model(SIZE)
    model.refused(Op("one", policy="one"), log_is_broken=True)
    model.refused(Op("two", policy="two"), log_is_broken=True)
    with pytest.raises(OracleError):
        model.judge(bytes(SIZE), everything=True, policy="two")
