"""Counts failures in a federate stage: by client, and under privacy as counts with noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fedpress.federation import RoundRecord
from fedpress.federation.failures import Tally
from fedpress.stages.federate.server import ServerSide

PRIVATE = "kept private"
"""Stands in place of a reason that may depend on private examples."""
SHOWN = 3
"""Largest number of clients named in a line of the terminal; the report names all."""
REPORTED_FROM = 4.0
"""A noised count above this many standard deviations is reported (false alarm: 1 in 30,000)."""
STOPS_FROM = 5.0
"""A noised count above this many standard deviations can stop a run (false alarm: 1 in 3
million)."""
ALL = 0.9
"""The run stops if at least this share of the protected units (clients or examples) fails."""
MANY = 1 / 3
"""The run warns if at least this share of the units, or of the clients' answers, fails."""
RECENT = 32
"""Largest number of rounds whose counts are added up to decide about a stop. In a sum the noise is
relatively smaller than in one round."""
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
"""Errors whose text never depends on examples: only on messages, keys, files or noised numbers."""
UNITS = {"client": "clients", "sample": "examples"}
"""Protected unit -> its plural in messages."""


@dataclass(frozen=True)
class Failures:
    """All failures so far.

    Under privacy, the protected units (examples or clients) that fail are counted by cause, and
    noise is added to each count. The causes are "not finite" (an update has NaN or inf) and
    "failed" (an error). A unit that fails contributes zero to the sum of updates.

    Attributes:
        asked: number of answers that the server waited for, in all rounds. If only the server may
            know who takes part, the planned number.
        refused: client -> (number of rounds in which its answer did not count, last reason).
        counted: noised numbers of failed units; None without privacy.
        of: expected number of units in all rounds.
        variance: variance of the noise of each count.
        recent: a row for each of the last rounds, newest last: (noised count of "not finite",
            noised count of "failed", expected units, variance of noise and sampling together).
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
            record: the public part of the round's record.
            drawn: clients whose answers the round waited for.
            server: the server's side of the stage.
        """
        refused = dict(self.refused)
        for name, reason in public_reasons(record.refused, server).items():
            before, _ = refused.get(name, (0, ""))
            refused[name] = (before + 1, reason)
        # If only the server may know who takes part, the planned number is used instead.
        asked = server.uplink.cohort.size if server.hides_cohort else len(drawn)
        now = replace(self, asked=self.asked + asked, refused=refused)
        if record.failures is None:
            return now
        of, variance = server.failure_noise(drawn)
        counted = Tally.sum([self.counted or Tally(), record.failures])
        # The number of sampled units varies too (binomial distribution). A count near `of` may come
        # from a round with more units than expected, of which only a part failed.
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
        """Standard deviation of the noise of the sum of the two counts."""
        return math.sqrt(2 * self.variance)

    @property
    def significant(self) -> bool:
        """Whether the counts are too large to be only noise, so some units did fail."""
        # Failures of less than 1% of the units are not reported, even if the count is precise.
        if self.counted is None or self.counted.total < 0.01 * self.of:
            return False
        larger = max(self.counted.not_finite, self.counted.failed)
        by_cause = larger > REPORTED_FROM * math.sqrt(self.variance)
        return by_cause or self.counted.total > REPORTED_FROM * self.noise

    @property
    def all_failing(self) -> bool:
        """Whether nearly all units fail, in the last round or in the last few rounds together.

        The counts are added up over the last round, over the last two rounds, and so on. So rounds
        that went well at the beginning do not hide that all units fail now.
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
            # One count has less noise than the sum of the two counts, so it may show earlier that
            # the run must stop.
            if _all(max(not_finite, failed), of, noise):
                return True
            if _all(not_finite + failed, of, math.sqrt(2) * noise):
                return True
        return False

    def warning(self, unit: str | None) -> str:
        """Returns a warning if a third or more of the answers or units failed; otherwise ""."""
        lost = sum(rounds for rounds, _ in self.refused.values())
        if lost and lost >= MANY * self.asked:
            return (
                f"{lost} of {self.asked} answers of clients did not count; see “failed” in the "
                "report"
            )
        if self.significant and self.counted is not None and self.counted.total >= MANY * self.of:
            return f"{self.estimate(unit)} contributed nothing"
        return ""

    def estimate(self, unit: str | None) -> str:
        """Returns the noised count as text: "about 4 of 6 clients (counted with noise of 0.4)"."""
        assert self.counted is not None
        # Noise may make the count negative, or larger than there are units.
        count = min(max(self.counted.total, 0.0), self.of)
        units = UNITS[unit or "client"]
        noise = f"counted with noise of {self.noise:.2g}"
        return f"about {count:.0f} of {self.of:.0f} {units} ({noise})"

    def cause(self, lr: str) -> str:
        """Returns the most frequent cause, and what to do about it.

        Args:
            lr: the learning rates that may be too large, as recipe keys with their values.
        """
        assert self.counted is not None
        if self.counted.not_finite > self.counted.failed:
            return f"their numbers were not finite; lower {lr}, or look for NaN in the examples"
        return (
            "the model could not run on them; look for values that the public examples do not "
            "have, such as tokens beyond the vocabulary or labels beyond the classes"
        )

    def facts(self, unit: str | None) -> dict[str, Any]:
        """Returns the failures for `result.json`: clients by name, and noised counts by cause."""
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
        """Reads the result of `to_json`; an empty dictionary means no failures."""
        if not page:
            return cls()
        refused = {name: (int(rounds), str(why)) for name, (rounds, why) in page["refused"].items()}
        counted = None if page["counted"] is None else Tally(*page["counted"])
        recent = tuple((float(a), float(b), float(c), float(d)) for a, b, c, d in page["recent"])
        return cls(page["asked"], refused, counted, page["of"], page["variance"], recent)


def _all(count: float, of: float, noise: float) -> bool:
    """Whether `count` is at least 90% of `of` units, and surely more than half of them.

    "Surely": even after subtracting five standard deviations of the noise (`STOPS_FROM`).
    """
    return count >= ALL * of and count - STOPS_FROM * noise > of / 2


def public_reasons(refused: Mapping[str, str], server: ServerSide) -> dict[str, str]:
    """Returns the reason of each refused client, or `PRIVATE` if it must not be stored.

    Under privacy the text of an error may depend on private examples, for instance "token 9999 is
    beyond the vocabulary". Errors about messages, files, disks and keys do not depend on examples.
    A "DivergedError" does not either, because it is raised for parameters after noised steps.
    """
    if server.uplink.privacy is None:
        return dict(refused)
    return {name: why if _is_public(why) else PRIVATE for name, why in refused.items()}


def _is_public(reason: str) -> bool:
    kind, colon, _ = reason.partition(": ")
    # A reason from a client begins with the class of its exception, such as "ValueError: ". Other
    # reasons are the server's own.
    from_client = colon and kind.isidentifier() and kind.endswith(("Error", "Exception"))
    return not from_client or kind in PUBLIC_ERRORS


def refusal_line(refused: Mapping[str, str], asked: int, round: int) -> str:
    """Returns one line about the refused clients of a round; empty if there are none."""
    if not refused:
        return ""
    named = [f"{name} ({why})" for name, why in list(refused.items())[:SHOWN]]
    more = [f"and {len(refused) - SHOWN} more"] if len(refused) > SHOWN else []
    return f"round {round}: {len(refused)} of {asked} clients refused: {', '.join([*named, *more])}"
