"""What the table says of figures."""

from __future__ import annotations

from tests.benchmarks.measuring import Spread, at_least, at_most, compare, interleave, table


def test_each_contender_is_the_first_of_a_round_in_turn() -> None:
    order: list[str] = []
    contenders = {name: (lambda name=name: order.append(name)) for name in "abc"}

    interleave(contenders, 3)

    assert "".join(order) == "abcbcacab"


def test_a_ratio_is_that_of_two_of_the_same_round() -> None:
    row = compare("b", "w", "them", [1.0, 20.0, 3.0], [2.0, 10.0, 6.0], "s", "time")

    assert row.value == Spread(0.5, 0.5, 2.0, 3)


def test_speed_is_theirs_by_ours() -> None:
    row = compare("b", "w", "them", [2.0], [5.0], "s", "speed", at_least(2))

    assert row.verdict == "yes"


def test_an_aim_that_is_missed_says_by_how_much() -> None:
    row = compare("b", "w", "them", [9.0], [0.5], "ms", "difference", at_most(8, " ms"))

    assert row.verdict == "**missed by 0.5 ms**"


def test_a_line_of_the_table_has_the_medians_and_the_spread() -> None:
    row = compare("b", "w", "them", [2.0, 1.0, 3.0], [4.0, 4.0, 4.0], "s", "time", at_most(1))

    line = table([row]).splitlines()[2]

    assert line == "| b | w | 2 (1 to 3) s | them | 4 (4 to 4) s | 0.5 (0.25 to 0.75) of theirs | at most 1 | yes |  |"  # fmt: skip  # noqa: E501
