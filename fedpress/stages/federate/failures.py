"""Who failed in a federate stage so far: by name where that may be told, else as a count with noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fedpress.federation import RoundRecord
from fedpress.federation.failures import Tally
from fedpress.stages.federate.server import ServerHalf

PRIVATE = "kept private"
SHOWN = 3
"""Clients that are named in one line of the terminal; the report names them all."""
SURE, CERTAIN = 4.0, 5.0
"""Standard deviations of the noise above which failures are told, and above which a run stops."""
ALL, MANY = 0.9, 1 / 3
"""Share of failures that counts as all, so that a run stops; and share from which a run warns."""
RECENT = 32
"""Rounds that are counted together before a run stops."""
OPEN = frozenset(
    {
        "DivergedError",
        "WireError",
        "SecureError",
        "RunError",
        "OSError",
        *(kind.__name__ for kind in OSError.__subclasses__()),
    }
)
"""Kinds of errors of a client whose words are about messages, keys, files or noised numbers, never about examples."""
WORDS = {"client": "clients", "sample": "examples"}


@dataclass(frozen=True)
class Failures:
    """What failed in all rounds so far.

    Attributes:
        asked: answers that were asked for: clients, summed over the rounds.
        refused: by client, in how many rounds its answer did not count, and why the last time.
        counted: protected units that gave nothing, with noise; None where nothing is counted.
        of: how many units there were, as expected from the plan.
        variance: of the noise in each count.
        recent: the counts of the last rounds, newest last: not_finite, failed, of, variance (also
            that of drawing).
    """

    asked: int = 0
    refused: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    counted: Tally | None = None
    of: float = 0.0
    variance: float = 0.0
    recent: tuple[tuple[float, float, float, float], ...] = ()

    def after(self, record: RoundRecord, drawn: Sequence[str], server: ServerHalf) -> Failures:
        """Returns what failed up to and with the round of `record`, in which the clients `drawn` took part."""
        refused = dict(self.refused)
        for name, reason in told(record.refused, server).items():
            refused[name] = (refused.get(name, (0, ""))[0] + 1, reason)
        # How many take part is secret where a trusted server draws them: then the planned number
        # stands for it.
        asked = server.uplink.cohort.size if server.hides_cohort else len(drawn)
        now = replace(self, asked=self.asked + asked, refused=refused)
        if record.failures is None:
            return now
        of, variance = server.failure_noise(drawn)
        counted = Tally.sum([self.counted or Tally(), record.failures])
        # Units are drawn by chance: of few, all that fail may be drawn at once, and then not all of
        # them fail.
        assert server.uplink.privacy is not None
        drawing = of * (1 - server.uplink.privacy.sampling_prob)
        latest = (record.failures.not_finite, record.failures.failed, of, variance + drawing)
        recent = (*self.recent, latest)[-RECENT:]
        return replace(
            now, counted=counted, of=self.of + of, variance=self.variance + variance, recent=recent
        )

    @property
    def noise(self) -> float:
        """Standard deviation of the noise in the count of all causes."""
        return math.sqrt(2 * self.variance)

    @property
    def significant(self) -> bool:
        """Whether the noised count says that something failed at all."""
        if self.counted is None or self.counted.total < 0.01 * self.of:
            return False
        one = max(self.counted.not_finite, self.counted.failed)
        return one > SURE * math.sqrt(self.variance) or self.counted.total > SURE * self.noise

    @property
    def all_failing(self) -> bool:
        """Whether the noised counts say that all units fail, in the last round or in the last rounds together.

        A run may go well at first, so the rounds before do not speak for it.
        """
        not_finite = failed = of = variance = 0.0
        for one in reversed(self.recent):
            not_finite, failed, of, variance = (
                not_finite + one[0],
                failed + one[1],
                of + one[2],
                variance + one[3],
            )
            noise = math.sqrt(variance)
            if _all(max(not_finite, failed), of, noise) or _all(
                not_finite + failed, of, math.sqrt(2) * noise
            ):
                return True
        return False

    def warning(self, unit: str | None) -> str:
        """Returns a sentence if a third or more failed, else nothing."""
        lost = sum(rounds for rounds, _ in self.refused.values())
        if lost and lost >= MANY * self.asked:
            return f"{lost} of {self.asked} answers of clients did not count; see “failed” in the report"
        if self.significant and self.counted is not None and self.counted.total >= MANY * self.of:
            return f"{self.estimate(unit)} gave nothing"
        return ""

    def estimate(self, unit: str | None) -> str:
        """Says the noised count in words: "about 4 of 6 clients (counted with noise of 0.4)"."""
        assert self.counted is not None
        count = min(max(self.counted.total, 0.0), self.of)
        return f"about {count:.0f} of {self.of:.0f} {WORDS[unit or 'client']} (counted with noise of {self.noise:.2g})"

    def cause(self, lr: str) -> str:
        """Says what most of the counted failures were, and the cure; `lr` names the learning rate's setting."""
        assert self.counted is not None
        if self.counted.not_finite > self.counted.failed:
            return f"their numbers were not finite; lower {lr}, or look for NaN in the examples"
        return (
            "the model could not run on them; look for values that the public examples do not have, such as tokens "
            "beyond the vocabulary or labels beyond the classes"
        )

    def facts(self, unit: str | None) -> dict[str, Any]:
        """Returns what the result tells: clients by name, and the noised count by cause."""
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
        """Returns all fields, for a checkpoint."""
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
    return count >= ALL * of and count - CERTAIN * noise > of / 2


def told(refused: Mapping[str, str], server: ServerHalf) -> dict[str, str]:
    """Returns why clients do not count, as far as it may be written down.

    Under privacy an error of the work on private examples is an exact word about them. What went
    wrong outside of it says nothing of them and is told: a lost message, a damaged file, a full
    disk, keys. So are numbers that are not finite after noised steps: those follow from the noise
    and the learning rate.
    """
    if server.uplink.privacy is None:
        return dict(refused)
    return {name: why if _is_public(why) else PRIVATE for name, why in refused.items()}


def _is_public(why: str) -> bool:
    kind, colon, _ = why.partition(": ")
    # A client's error begins with its kind, a word; what the server says itself begins with
    # something else.
    return (
        not (colon and kind.isidentifier() and kind.endswith(("Error", "Exception")))
        or kind in OPEN
    )


def refusal_line(refused: Mapping[str, str], asked: int, round: int) -> str:
    """Says in one line which clients of a round do not count; empty if all do."""
    if not refused:
        return ""
    named = [f"{name} ({why})" for name, why in list(refused.items())[:SHOWN]]
    more = [f"and {len(refused) - SHOWN} more"] if len(refused) > SHOWN else []
    return f"round {round}: {len(refused)} of {asked} clients refused: {', '.join([*named, *more])}"
