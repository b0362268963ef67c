"""What has failed in a federate stage: clients by name where public, else counts with noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fedpress.federation import RoundRecord
from fedpress.federation.failures import Tally
from fedpress.stages.federate.server import ServerSide

PRIVATE = "kept private"
SHOWN = 3
"""Clients that are named in one line of the terminal; the report names them all."""
REPORTED_FROM = 4.0
"""Standard deviations of the noise from which failures are reported (chance: 1 in 30,000)."""
STOPS_FROM = 5.0
"""Standard deviations of the noise from which a run stops (chance: 1 in 3 million)."""
ALL = 0.9
"""Share of failed units from which a run stops."""
MANY = 1 / 3
"""Share of failed units from which a run warns."""
RECENT = 32
"""Most rounds whose counts are added up before a run stops: the sum stands out of the noise."""
PUBLIC_ERRORS = frozenset(
    {
        "DivergedError",
        "WireError",
        "SecureError",
        "RunError",
        "OSError",
        *(kind.__name__ for kind in OSError.__subclasses__()),
    }
)
"""Errors whose text is about messages, keys, files or noised numbers, never about examples."""
UNITS = {"client": "clients", "sample": "examples"}


@dataclass(frozen=True)
class Failures:
    """What failed in all rounds so far.

    Attributes:
        asked: number of answers that were asked for in all rounds.
        refused: client -> in how many rounds its answer did not count, and the last reason.
        counted: protected units that gave nothing, with noise; None without privacy.
        of: expected number of protected units in all rounds.
        variance: of the noise in each count.
        recent: a row for each of the last rounds, newest last: not_finite, failed, of, and the
            variance of noise and sampling together.
    """

    asked: int = 0
    refused: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    counted: Tally | None = None
    of: float = 0.0
    variance: float = 0.0
    recent: tuple[tuple[float, float, float, float], ...] = ()

    def with_round(self, record: RoundRecord, drawn: Sequence[str], server: ServerSide) -> Failures:
        """Returns the failures after one more round.

        Args:
            record: of the round, as far as it is public.
            drawn: clients that were asked.
            server: the server's half.
        """
        refused = dict(self.refused)
        for name, reason in public_reasons(record.refused, server).items():
            before, _ = refused.get(name, (0, ""))
            refused[name] = (before + 1, reason)
        # Where only the server may know who takes part, the planned number stands for the real one.
        asked = server.uplink.cohort.size if server.hides_cohort else len(drawn)
        now = replace(self, asked=self.asked + asked, refused=refused)
        if record.failures is None:
            return now
        of, variance = server.failure_noise(drawn)
        counted = Tally.sum([self.counted or Tally(), record.failures])
        # The number of sampled units varies, too (binomially): a count near `of` may come from a
        # round with many units, of which only a part failed.
        assert server.uplink.privacy is not None
        sampling = of * (1 - server.uplink.privacy.sampling_prob)
        latest = (record.failures.not_finite, record.failures.failed, of, variance + sampling)
        return replace(
            now,
            counted=counted,
            of=self.of + of,
            variance=self.variance + variance,
            recent=(*self.recent, latest)[-RECENT:],
        )

    @property
    def noise(self) -> float:
        """Standard deviation of the noise in the total of both counts."""
        return math.sqrt(2 * self.variance)

    @property
    def significant(self) -> bool:
        """Whether the counts are too large to be noise alone: something did fail."""
        # Less than 1% is not worth a report, however precise the count is.
        if self.counted is None or self.counted.total < 0.01 * self.of:
            return False
        larger = max(self.counted.not_finite, self.counted.failed)
        by_cause = larger > REPORTED_FROM * math.sqrt(self.variance)
        return by_cause or self.counted.total > REPORTED_FROM * self.noise

    @property
    def all_failing(self) -> bool:
        """Whether the counts say that all units fail, in the last round or the last few together.

        Only the newest rounds are added up, because a run may have gone well at first.
        """
        not_finite = 0.0
        failed = 0.0
        of = 0.0
        variance = 0.0
        for row in reversed(self.recent):
            not_finite += row[0]
            failed += row[1]
            of += row[2]
            variance += row[3]
            noise = math.sqrt(variance)
            # One cause alone has less noise than both together.
            if _all(max(not_finite, failed), of, noise):
                return True
            if _all(not_finite + failed, of, math.sqrt(2) * noise):
                return True
        return False

    def warning(self, unit: str | None) -> str:
        """Returns a sentence if a third or more failed, else nothing."""
        lost = sum(rounds for rounds, _ in self.refused.values())
        if lost and lost >= MANY * self.asked:
            return (
                f"{lost} of {self.asked} answers of clients did not count; see “failed” in the "
                "report"
            )
        if self.significant and self.counted is not None and self.counted.total >= MANY * self.of:
            return f"{self.estimate(unit)} gave nothing"
        return ""

    def estimate(self, unit: str | None) -> str:
        """Returns the noised count, as "about 4 of 6 clients (counted with noise of 0.4)"."""
        assert self.counted is not None
        # Noise may make the count negative, or larger than there are units.
        count = min(max(self.counted.total, 0.0), self.of)
        units = UNITS[unit or "client"]
        noise = f"counted with noise of {self.noise:.2g}"
        return f"about {count:.0f} of {self.of:.0f} {units} ({noise})"

    def cause(self, lr: str) -> str:
        """Returns the cause of most failures, and the cure; `lr` names the learning rate's key."""
        assert self.counted is not None
        if self.counted.not_finite > self.counted.failed:
            return f"their numbers were not finite; lower {lr}, or look for NaN in the examples"
        return (
            "the model could not run on them; look for values that the public examples do not "
            "have, such as tokens beyond the vocabulary or labels beyond the classes"
        )

    def facts(self, unit: str | None) -> dict[str, Any]:
        """Returns the facts of the result: clients by name, and the noised count by cause."""
        lost = sum(rounds for rounds, _ in self.refused.values())
        out: dict[str, Any] = {"asked": self.asked, "refused": lost}
        out["clients"] = {
            name: {"rounds": rounds, "reason": why} for name, (rounds, why) in self.refused.items()
        }
        if self.counted is not None:
            out["counted"] = {
                "unit": unit,
                "not_finite": round(self.counted.not_finite, 2),
                "failed": round(self.counted.failed, 2),
                "of": round(self.of, 2),
                "noise": round(self.noise, 3),
                "sure": self.significant,
            }
        return out

    def to_json(self) -> dict[str, Any]:
        """Returns all fields, as a checkpoint stores them."""
        return {
            "asked": self.asked,
            "refused": {name: [*pair] for name, pair in self.refused.items()},
            "counted": None if self.counted is None else self.counted.to_json(),
            "of": self.of,
            "variance": self.variance,
            "recent": [[*one] for one in self.recent],
        }

    @classmethod
    def from_json(cls, page: Mapping[str, Any]) -> Failures:
        """Reads what `to_json` gave; nothing has failed in an empty page."""
        if not page:
            return cls()
        refused = {name: (int(rounds), str(why)) for name, (rounds, why) in page["refused"].items()}
        counted = None if page["counted"] is None else Tally(*page["counted"])
        recent = tuple((float(a), float(b), float(c), float(d)) for a, b, c, d in page["recent"])
        return cls(page["asked"], refused, counted, page["of"], page["variance"], recent)


def _all(count: float, of: float, noise: float) -> bool:
    """Whether `count` of `of` units is nearly all, and surely more than half of them."""
    return count >= ALL * of and count - STOPS_FROM * noise > of / 2


def public_reasons(refused: Mapping[str, str], server: ServerSide) -> dict[str, str]:
    """Returns for each refused client its reason, or `PRIVATE` if it must not be stored.

    Under privacy an error raised by private examples says something exact about them. Errors of
    messages, files, disks and keys do not. Neither do numbers that are not finite after noised
    steps, because those are computed from noised gradients.
    """
    if server.uplink.privacy is None:
        return dict(refused)
    return {name: why if _is_public(why) else PRIVATE for name, why in refused.items()}


def _is_public(reason: str) -> bool:
    kind, colon, _ = reason.partition(": ")
    # A client's reason begins with the class of its exception, such as "ValueError: ". Anything
    # else is the server's own.
    from_client = colon and kind.isidentifier() and kind.endswith(("Error", "Exception"))
    return not from_client or kind in PUBLIC_ERRORS


def refusal_line(refused: Mapping[str, str], asked: int, round: int) -> str:
    """Returns one line about the refused clients of a round; empty if there are none."""
    if not refused:
        return ""
    named = [f"{name} ({why})" for name, why in list(refused.items())[:SHOWN]]
    more = [f"and {len(refused) - SHOWN} more"] if len(refused) > SHOWN else []
    return f"round {round}: {len(refused)} of {asked} clients refused: {', '.join([*named, *more])}"
