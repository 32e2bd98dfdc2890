"""Two results, one after the other: what got slower past the noise of both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import msgspec

from latentrt.engines.errors import RequestError
from latentrt.runtime.bench.machine import differences
from latentrt.runtime.bench.result import Measured, Report, Variant
from latentrt.runtime.bench.samples import Ratio, drift, unpaired_ratio

TOLERANCE = 0.05
COLD = "cold start, "
CONFIDENCE = 0.99  # some ten stages are compared at once: at 95 % one in two comparisons would cry wolf
BUSY = 0.05  # of all cores: from here on others' work is named beside the figures
SMALLEST_SHARE = 0.005  # of the picture's time
RULE = (
    "a stage has regressed where the 99 % interval of its ratio (Mann-Whitney) lies above 1 + noise as a whole, and "
    f"the difference of the medians is at least {SMALLEST_SHARE:.1%} of the picture's time; noise is the largest "
    "of the tolerance and the drift of either run, the difference between the medians of its first and second half. A "
    "memory peak has regressed by more than the tolerance, an error past twice what it was or past its limit, prompt "
    "accuracy where the intervals of the two shares lie apart"
)

Verdict = Literal["slower", "faster", "the same", "worse", "better", "cannot tell"]
BAD: tuple[Verdict, ...] = ("slower", "worse")


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """One figure in both results. before and after are medians; ratio is after over before.

    noise: the part that the ratio must pass before it counts
    unit: s, B, or nothing for shares
    """

    variant: str
    figure: str
    unit: Literal["s", "B", ""]
    before: float
    after: float
    ratio: Ratio
    noise: float
    verdict: Verdict


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """All that two results have in common, and what differs in their circumstances."""

    differences: tuple[str, ...]
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]
    changes: tuple[Change, ...]

    @property
    def regressed(self) -> tuple[Change, ...]:
        """Return what got worse past the noise."""
        return tuple(change for change in self.changes if change.verdict in BAD)


def compare(before: Report, after: Report, *, tolerance: float = TOLERANCE) -> Comparison:
    """Compare the variants with equal settings. Raises RequestError if there are none."""
    old, new = ({variant.settings: variant for variant in report.variants} for report in (before, after))
    common = [settings for settings in old if settings in new]
    if not common:
        raise RequestError("the two results have no variant with equal settings; measure both with the same options")
    changes = [c for settings in common for c in _variant(old[settings], new[settings], tolerance)]
    changes += _cold(before, after, tolerance)
    changes += _errors(before, after)
    return Comparison(
        differences=tuple(_circumstances(before, after)),
        only_before=tuple(variant.name for settings, variant in old.items() if settings not in new),
        only_after=tuple(variant.name for settings, variant in new.items() if settings not in old),
        changes=tuple(changes),
    )


def _circumstances(before: Report, after: Report) -> Iterator[str]:
    yield from differences(before.machine, after.machine)
    for name in ("name", "precision", "graphs"):
        old, new = getattr(before.bundle, name), getattr(after.bundle, name)
        if old != new:
            yield f"bundle {name}: {old[:16]}, {new[:16]}"
    if before.method.prompt != after.method.prompt:
        yield f"prompt: '{before.method.prompt}', '{after.method.prompt}'"
    yield from _busy(before, after)


def _busy(before: Report, after: Report) -> Iterator[str]:
    for name, title in (
        ("others_share", "cores' time used by others"),
        ("stolen_share", "cores' time taken by the host"),
    ):
        shares = [getattr(report.conditions, name) for report in (before, after)]
        if None not in shares and max(shares) > BUSY:
            yield f"{title}: {shares[0]:.0%}, {shares[1]:.0%}"


def _variant(old: Variant, new: Variant, tolerance: float) -> Iterator[Change]:
    picture = old.seconds["end_to_end"].summary.p50
    for stage in old.seconds:
        if stage in new.seconds:
            least = SMALLEST_SHARE * picture / (len(old.denoise_stages) or 1 if stage == "step" else 1)
            yield change_of_seconds(new.name, stage, old.seconds[stage], new.seconds[stage], tolerance, least)
    if old.device_bytes and new.device_bytes:
        yield _change_of_bytes(new.name, "device memory", old.device_bytes, new.device_bytes, tolerance)
    if old.prompts and new.prompts:
        yield _change_of_share(new.name, old, new)


def change_of_seconds(
    variant: str, stage: str, old: Measured, new: Measured, tolerance: float, least_s: float
) -> Change:
    """Compare one stage: see RULE. least_s: a difference of fewer seconds is none."""
    ratio = unpaired_ratio(old.samples, new.samples, CONFIDENCE)
    noise = max(tolerance, drift(old.samples), drift(new.samples))
    before, after = old.summary.p50, new.summary.p50
    verdict: Verdict = "the same"
    if ratio.low is None or ratio.high is None:
        verdict = "cannot tell"
    elif ratio.low > 1 + noise and after - before >= least_s:
        verdict = "slower"
    elif ratio.high < 1 / (1 + noise) and before - after >= least_s:
        verdict = "faster"
    return Change(
        variant=variant, figure=stage, unit="s", before=before, after=after, ratio=ratio, noise=noise, verdict=verdict
    )


def _change_of_bytes(variant: str, figure: str, before: float, after: float, tolerance: float) -> Change:
    quotient = after / before
    worse: Verdict = "worse" if quotient > 1 + tolerance else "better" if quotient < 1 / (1 + tolerance) else "the same"
    ratio = Ratio(estimate=quotient, low=None, high=None)
    return Change(
        variant=variant,
        figure=figure,
        unit="B",
        before=before,
        after=after,
        ratio=ratio,
        noise=tolerance,
        verdict=worse,
    )


def _change_of_share(variant: str, old: Variant, new: Variant) -> Change:
    assert old.prompts is not None and new.prompts is not None
    fell, rose = new.prompts.high < old.prompts.low, new.prompts.low > old.prompts.high
    return Change(
        variant=variant,
        figure="prompt accuracy",
        unit="",
        before=old.prompts.share,
        after=new.prompts.share,
        ratio=Ratio(estimate=new.prompts.share / (old.prompts.share or 1.0), low=None, high=None),
        noise=old.prompts.share - old.prompts.low,
        verdict="worse" if fell else "better" if rose else "the same",
    )


def _cold(before: Report, after: Report, tolerance: float) -> Iterator[Change]:
    old = {start.settings: start for start in before.cold_starts}
    for start in after.cold_starts:
        earlier = old.get(start.settings)
        if earlier is None:
            continue
        name, least = f"{COLD}{start.name}", SMALLEST_SHARE * earlier.seconds["total"].summary.p50
        for part in ("import", "load", "first", "total"):
            yield change_of_seconds(name, part, earlier.seconds[part], start.seconds[part], tolerance, least)
        peaks = (earlier.peak_rss_bytes.summary.p50, start.peak_rss_bytes.summary.p50)
        yield _change_of_bytes(name, "host memory", *peaks, tolerance)


def _errors(before: Report, after: Report) -> Iterator[Change]:
    old = {(error.backend, error.component): error for error in before.errors}
    for new in after.errors:
        earlier = old.get((new.backend, new.component))
        if earlier is None:
            continue
        grown = new.error > max(2 * earlier.error, 1e-6)  # 1e-6: float32's own rounding moves freely below that
        yield Change(
            variant=f"error, {new.backend}",
            figure=new.component,
            unit="",
            before=earlier.error,
            after=new.error,
            ratio=Ratio(estimate=new.error / max(earlier.error, 1e-12), low=None, high=None),
            noise=1.0,
            verdict="worse" if grown or new.error > new.limit else "the same",
        )


def undecided(changes: Sequence[Change]) -> bool:
    """Tell whether no time in the comparison could be judged: too few rounds on both sides."""
    times = [change for change in changes if change.unit == "s" and not change.variant.startswith(COLD)]
    return bool(times) and all(change.verdict == "cannot tell" for change in times)
