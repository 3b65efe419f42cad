"""The learning rate against a table made step by step, and the restarts against counting."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relora import lr_multiplier
from relora.method.schedule import Schedule


@dataclass(frozen=True)
class Shape:
    max_steps: int = 40
    warmup_steps: int = 5
    restart_every: int | None = 8
    restart_warmup_steps: int = 3
    min_lr_ratio: float = 0.1
    warm_start_steps: int = 0


SHAPES = {
    "plain": Shape(),
    "warm start": Shape(warm_start_steps=10),
    "no warm-up": Shape(warmup_steps=0),
    "no warm-up at all": Shape(warmup_steps=0, restart_warmup_steps=0),
    "no re-warm-up": Shape(restart_warmup_steps=0, warm_start_steps=6),
    "re-warm-up of one": Shape(restart_warmup_steps=1, warm_start_steps=6),
    "switch during the warm-up": Shape(warmup_steps=12, warm_start_steps=4, restart_every=5),
    "re-warm-up ends where the warm-up ends": Shape(warmup_steps=12, warm_start_steps=9),
    "switch at the end of the warm-up": Shape(warmup_steps=10, warm_start_steps=10),
    "warm start of one": Shape(warm_start_steps=1),
    "restart in the last update": Shape(max_steps=41, restart_every=10, restart_warmup_steps=10),
    "restart at the end does not come": Shape(max_steps=40, restart_every=10),
    "re-warm-up past the end": Shape(max_steps=39, restart_every=12, restart_warmup_steps=7),
    "re-warm-up all the time": Shape(restart_every=6, restart_warmup_steps=6, warm_start_steps=3),
    "restart every update": Shape(restart_every=1, restart_warmup_steps=1, warm_start_steps=2),
    "restart every update, no re-warm-up": Shape(restart_every=1, restart_warmup_steps=0),
    "no restarts": Shape(restart_every=None),
    "lora: a switch and no restarts": Shape(restart_every=None, warm_start_steps=10),
    "first restart past the end": Shape(restart_every=100, restart_warmup_steps=50, warm_start_steps=3),
    "warm start to the last update": Shape(warm_start_steps=39),
    "to zero": Shape(min_lr_ratio=0.0),
    "constant": Shape(min_lr_ratio=1.0, warm_start_steps=7),
    "warm-up until the last update": Shape(warmup_steps=39, restart_every=None),
    "one update": Shape(max_steps=1, warmup_steps=0, restart_every=None),
    "the paper's": Shape(20_000, 500, 5000, 100, 0.1, 5000),
    "odd numbers": Shape(997, 13, 101, 17, 0.037, 211),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def base(t: int, shape: Shape) -> float:
    """base(t) of DESIGN section 4."""
    T, W, q = shape.max_steps, shape.warmup_steps, shape.min_lr_ratio
    if t < W:
        return (t + 1) / W
    if t < T:
        return q + (1 - q) * (1 + math.cos(math.pi * (t - W) / (T - W))) / 2
    return q


def starts(shape: Shape) -> list[int]:
    """The steps that are followed by a re-warm-up: the switch, and every restart before the end."""
    ws, every = shape.warm_start_steps, shape.restart_every
    restarts = list(range(ws + every, shape.max_steps, every)) if every else []
    return [ws, *restarts] if ws else restarts


def table(shape: Shape, num_steps: int) -> list[float]:
    """m(t) for t < num_steps: the base, overwritten from each start on by its climb."""
    R = shape.restart_warmup_steps
    m = {t: base(t, shape) for t in range(num_steps)}
    for s in starts(shape):
        for climbed in range(R):
            m[s + climbed] = base(s + R, shape) * (climbed + 1) / R
    return [m[t] for t in range(num_steps)]


@every_shape
def test_lr_multiplier_is_the_pinned_formula(shape: Shape) -> None:
    num_steps = shape.max_steps + 20
    computed = [lr_multiplier(t, **asdict(shape)) for t in range(num_steps)]
    assert computed == pytest.approx(table(shape, num_steps), rel=1e-12, abs=1e-15)


def test_lr_multiplier_by_hand() -> None:
    shape = Shape(12, 2, 4, 2, 0.2, 2)
    # Warm-up to 1/2, 1; the switch at 2; restarts at 6 and 10.
    b = [0.2 + 0.4 * (1 + math.cos(math.pi * k / 10)) for k in range(11)]
    expected = [0.5, 1.0, b[2] / 2, b[2], b[2], b[3], b[6] / 2, b[6], b[6], b[7], 0.1, 0.2, 0.2, 0.2]
    assert [lr_multiplier(t, **asdict(shape)) for t in range(14)] == pytest.approx(expected, abs=1e-15)


@every_shape
def test_the_climb_joins_the_base_without_a_step(shape: Shape) -> None:
    R = shape.restart_warmup_steps
    for s in starts(shape):
        if R:
            peak = lr_multiplier(s + R - 1, **asdict(shape))
            assert peak == pytest.approx(base(s + R, shape))
            assert lr_multiplier(s, **asdict(shape)) == pytest.approx(peak / R)


@every_shape
def test_restarts_counted_step_by_step(shape: Shape) -> None:
    schedule = Schedule(**asdict(shape))
    ws = shape.warm_start_steps
    expected = [s for s in starts(shape) if s != ws]
    steps = range(shape.max_steps + 20)
    assert [t for t in steps if schedule.restart_due(t)] == expected
    for t in steps:
        assert schedule.restarts_done(t) == sum(s <= t for s in expected)
        assert schedule.last_restart(t) == max((s for s in starts(shape) if s <= t), default=None)


@every_shape
def test_stages_and_restarts_agree(shape: Shape) -> None:
    schedule, ws = Schedule(**asdict(shape)), shape.warm_start_steps
    names = [schedule.stage(t) for t in range(shape.max_steps)]
    assert names == ["full_rank"] * ws + ["low_rank"] * (shape.max_steps - ws)
    for t, name in enumerate(names):
        assert not (schedule.restart_due(t) and name == "full_rank")


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    """Any shape that is allowed."""
    max_steps, rewarm = draw(st.integers(1, 120)), draw(st.integers(0, 20))
    return Shape(
        max_steps=max_steps,
        warmup_steps=draw(st.integers(0, max_steps - 1)),
        restart_every=draw(st.none() | st.integers(max(1, rewarm), 60)),
        restart_warmup_steps=rewarm,
        min_lr_ratio=draw(st.floats(0, 1)),
        warm_start_steps=draw(st.integers(0, max_steps - 1)),
    )


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(shapes())
def test_any_schedule_is_the_pinned_formula_and_trains_at_every_step(shape: Shape) -> None:
    schedule = Schedule(**asdict(shape))
    expected = table(shape, shape.max_steps + 20)
    # Asked in any order, as by runs that resume.
    computed = {t: schedule.multiplier(t) for t in reversed(range(shape.max_steps))}
    for t, value in computed.items():
        assert value == pytest.approx(expected[t], rel=1e-12, abs=1e-15)
        assert 0 < value <= 1
    restarts = [s for s in starts(shape) if s != shape.warm_start_steps]
    assert [t for t in range(shape.max_steps + 20) if schedule.restart_due(t)] == restarts
    for s in starts(shape):
        climb = [schedule.multiplier(t) for t in range(s, min(s + shape.restart_warmup_steps, shape.max_steps))]
        assert climb == sorted(climb)


def test_a_run_without_restarts_never_restarts() -> None:
    schedule = Schedule(max_steps=50)
    assert not any(schedule.restart_due(t) for t in range(60))
    assert schedule.restarts_done(49) == 0


def test_a_restart_at_the_end_takes_place_where_asked_for_and_re_warms_nothing() -> None:
    schedule = Schedule(max_steps=40, restart_every=10, restart_warmup_steps=5, restart_at_end=True)
    assert [t for t in range(60) if schedule.restart_due(t)] == [10, 20, 30, 40]
    assert schedule.multiplier(41) == schedule.min_lr_ratio


def test_the_warm_start_has_a_peak_rate_of_its_own() -> None:
    schedule = Schedule(max_steps=40, warm_start_steps=10, learning_rate=2.0, warm_start_learning_rate=1.0)
    assert schedule.rate(9) == schedule.multiplier(9)
    assert schedule.rate(10) == 2 * schedule.multiplier(10)
    full = Schedule(max_steps=40, warm_start_steps=40, learning_rate=2.0, warm_start_learning_rate=1.0)
    assert full.rate(9) == 2 * full.multiplier(9), "a run of full rank alone has no warm start"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"restart_every": 2}, "restart_every must be .* restart_warmup_steps=3, not 2"),
        ({"restart_every": 0, "restart_warmup_steps": 0}, "restart_every must be >= 1 .*, not 0"),
        ({"restart_every": -1, "restart_warmup_steps": 0}, "restart_every .* not -1"),
        ({"warmup_steps": 40}, r"warmup_steps must be in \[0, max_steps=40\), not 40"),
        ({"warmup_steps": -1}, "warmup_steps .* not -1"),
        ({"max_steps": 0, "warmup_steps": 0}, "max_steps=0"),
        ({"restart_warmup_steps": -1}, "restart_warmup_steps must be >= 0, not -1"),
        ({"min_lr_ratio": 1.01}, "min_lr_ratio .* not 1.01"),
        ({"min_lr_ratio": -0.1}, "min_lr_ratio .* not -0.1"),
        ({"min_lr_ratio": math.nan}, "min_lr_ratio .* not nan"),
        ({"warm_start_steps": -1}, "warm_start_steps must be >= 0, not -1"),
    ],
)
def test_impossible_shapes_are_refused_at_every_step(changes: dict[str, Any], message: str) -> None:
    for t in (0, 7, 39, 50):
        with pytest.raises(ValueError, match=message):
            lr_multiplier(t, **{**asdict(Shape()), **changes})


def test_a_negative_step_is_refused() -> None:
    with pytest.raises(ValueError, match="step must be >= 0, not -1"):
        lr_multiplier(-1, **asdict(Shape()))


def test_all_that_is_wrong_is_told_at_once() -> None:
    with pytest.raises(ValueError, match=r"(?s)warmup_steps.*min_lr_ratio.*restart_every"):
        lr_multiplier(0, **{**asdict(Shape()), "warmup_steps": -1, "min_lr_ratio": 2, "restart_every": 1})


def test_a_group_may_have_a_peak_of_its_own_and_the_schedule_of_the_run() -> None:
    schedule = Schedule(
        max_steps=20, warmup_steps=4, warm_start_steps=8, learning_rate=3.0, warm_start_learning_rate=7.0
    )
    for step in range(20):
        assert schedule.rate(step, peak=0.5) == schedule.multiplier(step) * 0.5
        assert schedule.rate(step, peak=None) == schedule.rate(step) == schedule.multiplier(step) * (7, 3)[step >= 8]
