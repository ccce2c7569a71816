"""What the oracle accepts of a refused operation."""

from __future__ import annotations

import pytest

from tests.simulation.oracle import BLOCK, LOST, Model, Op, OracleError, lost_blocks

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


def test_a_lost_block_may_be_what_it_was_or_lost_after_a_crash_and_nothing_else() -> None:
    lose = Op("lose", [(0, LOST)])

    def judged(found: bytes, *, everything: bool = False) -> None:
        model = Model(SIZE)
        model.returned(Op("write", [(0, b"x" * BLOCK)]))
        model.flushed(1)
        model.returned(lose)
        model.judge(found, everything=everything)

    rest = bytes(SIZE - BLOCK)
    judged(b"x" * BLOCK + rest)
    judged(LOST + rest, everything=True)
    for found, everything in (
        (bytes(SIZE), False),
        (b"lost".ljust(BLOCK, b"\0") + rest, False),
        (b"x" * BLOCK + rest, True),
    ):
        with pytest.raises(OracleError):
            judged(found, everything=everything)


def test_what_a_volume_grows_by_in_a_lost_block_is_lost_as_well() -> None:
    model = Model.holding(bytes(BLOCK) + LOST[:512])
    model.returned(Op("resize", size=3 * BLOCK))
    assert model.content == bytes(BLOCK) + LOST + bytes(BLOCK) and lost_blocks(model.content) == {1}


def test_of_several_refused_operations_only_the_first_may_come_true() -> None:
    model = Model(SIZE)
    model.refused(Op("one", policy="one"), log_is_broken=True)
    model.refused(Op("two", policy="two"), log_is_broken=True)
    with pytest.raises(OracleError):
        model.judge(bytes(SIZE), everything=True, policy="two")
