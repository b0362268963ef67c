"""Remembers the requests that a client has answered, so that it answers each step only once.

A second, different request for the same step of a round could reveal a single client's vector.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fedpress.errors import SecureError
from fedpress.secagg.message import JSON
from fedpress.secagg.public import PublicRound

MAX_ROUNDS = 2
"""Number of rounds that are remembered. Requests of older rounds are refused."""


@dataclass(eq=False)
class AnsweredRounds:
    """The answered requests of the newest rounds.

    Attributes:
        client: name of the client, for error messages.
        rounds: round -> step ("mask" or "unmask") -> hexadecimal digest of the answered request.
            The key "context" holds the digest of the round itself (see `PublicRound`).
    """

    client: str
    rounds: dict[int, dict[str, str]] = field(default_factory=dict)

    def took_part(self, public: PublicRound) -> bool:
        """Returns whether the client answered any request of exactly this round and cohort."""
        return self.rounds.get(public.number, {}).get("context") == public.context.hex()

    def answer_once_(self, public: PublicRound, step: str, question: bytes) -> None:
        """Stores that a request is answered; the same request may be repeated.

        Args:
            public: the round.
            step: "mask" or "unmask".
            question: digest of the request.

        Raises:
            SecureError: if a different request of this step was answered, if the round was answered
                with another cohort, or if a later round was answered and this one is not
                remembered.
        """
        # Only the newest rounds are remembered. Without this check an older round could be answered
        # twice.
        newest = max(self.rounds, default=public.number)
        if public.number not in self.rounds and public.number < newest:
            raise SecureError(
                f"it is over: round {newest} was answered already",
                place=f"round {public.number}",
                cure="ask about a later round",
            )
        steps = self.rounds.setdefault(public.number, {"context": public.context.hex()})
        same_round = steps["context"] == public.context.hex()
        if not same_round or steps.setdefault(step, question.hex()) != question.hex():
            raise SecureError(
                f"{self.client!r} answered another {step} question",
                place=f"round {public.number}",
                cure="repeat the same question, or go on with the next step",
            )
        for old in sorted(self.rounds)[:-MAX_ROUNDS]:
            del self.rounds[old]

    def take_over_(self, saved: JSON) -> None:
        """Refuses all rounds up to the last one of `saved`; nothing else of `saved` is used.

        Args:
            saved: result of `to_json`, from the time when this run had another name.

        Raises:
            TypeError: if `saved` is not a result of `to_json`. May also be a ValueError.
        """
        rounds = [int(number) for number in saved]  # type: ignore[union-attr, arg-type]
        self.rounds = {}
        if rounds:
            # No round has this context, so every request of that round is refused.
            self.rounds = {max(rounds): {"context": "another run"}}

    def to_json(self) -> dict[str, JSON]:
        """Returns `rounds` as JSON."""
        # JSON allows only text as keys.
        answered: dict[str, JSON] = {}
        for number, steps in self.rounds.items():
            answered[str(number)] = dict(steps.items())
        return answered

    @classmethod
    def from_json(cls, client: str, saved: JSON) -> AnsweredRounds:
        """Reads a result of `to_json`.

        Raises:
            KeyError: if `saved` is anything else. May also be an AttributeError, TypeError or
                ValueError.
        """
        rounds: dict[str, dict[str, str]] = saved  # type: ignore[assignment]
        answered = {}
        for number, steps in rounds.items():
            # Without its context, a round would accept a request of another cohort.
            if "context" not in steps:
                raise KeyError("context")
            answered[int(number)] = {str(step): str(digest) for step, digest in steps.items()}
        return cls(client, answered)
