"""What goes on for long, and is to stay as it began: minutes each, so only by name."""

from __future__ import annotations

from . import scale, server_speed
from .measuring import Row, Spread, at_least, at_most
from .setting import Setting


def batch(setting: Setting) -> list[Row]:
    """A batch of 20,000 jobs of a runner without processes; prints what a million would take."""
    first, last = scale.measure(*((4_000, 400) if setting.is_quick else ()))
    early, late = scale.speeds(first, last)
    print("\n".join(scale.told(first, last, scale.PROMPTS // (20 if setting.is_quick else 1))))
    jobs = f"{last.jobs:,} jobs with a checkpoint"
    return [
        _single(
            f"growth of the peak after the first {first.jobs:,} of {jobs}",
            last.high_water_mib - first.high_water_mib,
            "MiB",
            at_most(scale.ALLOWED_MIB, " MiB"),
        ),
        _single(
            f"speed after the first {first.jobs:,}, by the speed up to there",
            late / early,
            "",
            at_least(scale.ALLOWED_SLOWDOWN),
            f"{late:,.0f} jobs per s",
        ),
    ]


def server(setting: Setting) -> list[Row]:
    """2,000 prompts through servers that are recycled."""
    setting.opencode()
    has_lasted = server_speed.length(setting.workspace)
    what = f"{server_speed.LONG:,} prompts, recycled at {server_speed.LIMIT_MB} MB: none lost, flat"
    return [_single(what, float(has_lasted), "", at_least(1), "1 for yes; figures above")]


def _single(what: str, figure: float, unit: str, aim: object, note: str = "") -> Row:
    value = Spread.of([figure])
    return Row("lasting", what, unit=unit, ours=value, value=value, aim=aim, note=note)  # type: ignore[arg-type]
