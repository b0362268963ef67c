"""Applies a data owner's policy: decides, before a client answers the server, whether it may.

The decision follows from three things: the policy file, the recipes that the owner has approved,
and the ledger (a file with the privacy cost of all earlier answers about the same data).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path

from fedpress.core import consent
from fedpress.core.log import logger
from fedpress.errors import PolicyError, PrivacyError
from fedpress.network import policy as policies
from fedpress.network.gate import Asked, Refusal, unnamed_code
from fedpress.network.ledger import CHECK, DataKey, OwnerLedger, Question, default_path
from fedpress.network.policy import Policy, PrivacyRules
from fedpress.network.spending import Charge, Unit, spent
from fedpress.privacy.ledger import LedgerEntry
from fedpress.stages.federate.contract import Contract, counts_are_public, owns_keys
from fedpress.stages.federate.offer import Offer
from fedpress.stages.federate.protection import is_secure, trust_of_stage
from fedpress.wire.message import Message

log = logger(__name__)

ROUNDING = 1e-9
"""Share of a limit of epsilon by which it may be exceeded, because of floating-point rounding."""


@dataclass(eq=False)
class OwnerGate:
    """Decides by the owner's policy and ledger; implements `fedpress.network.gate.Gate`.

    Attributes:
        policy: which servers, models and privacy promises are allowed.
        ledger: earlier answers and their privacy cost.
        data: number of the data in the ledger.
        server: fingerprint of the certificate that this client was started with to verify the
            server; empty without TLS.
    """

    policy: Policy
    ledger: OwnerLedger
    data: int
    server: str = ""
    # Run -> number of the latest charge by another run at the time when this whole run was found
    # to be within the limits. The result holds until another run spends, see `_cannot_pay`.
    _fits: dict[str, int] = field(default_factory=dict, repr=False)
    _key: bytes = field(default_factory=lambda: os.urandom(32), repr=False)

    @classmethod
    def open(
        cls,
        data: Path | DataKey,
        *,
        policy: Path | None = None,
        ledger: Path | None = None,
        certificate: Path | None = None,
    ) -> OwnerGate:
        """Opens the gate of one client.

        Args:
            data: file or folder with the owner's data, or its key in the ledger.
            policy: a policy file; None: the defaults of `Policy`.
            ledger: the ledger's file; None: the ledger of this user, see `default_path`.
            certificate: PEM file of the certificate authority or the server, used to verify the
                server; None without TLS.

        Raises:
            PolicyError: if the policy is wrong, allows only a server with another certificate, or
                names code that is not installed, or if the certificate cannot be read.
            PrivacyError: if the ledger or the data cannot be read.
        """
        rules = Policy() if policy is None else policies.read(policy)
        server = "" if certificate is None else policies.certificate_fingerprint(certificate)
        if rules.server is not None and rules.server != server:
            got = f"that of {certificate} is {server}" if server else "no certificate is given"
            raise PolicyError(
                f"the policy allows the server with certificate {rules.server}, but {got}",
                place=policy or "policy",
                cure="start the client with the allowed server's certificate, or change 'server'",
            )
        # Checked now: else the owner would hear of a missing package only in the middle of a run.
        for name in rules.code:
            _check_installed(name, policy)
        consent.allow(*rules.code)
        book = OwnerLedger(ledger or default_path())
        key = data if isinstance(data, DataKey) else DataKey.of(data)
        return cls(rules, book, book.data(key), server)

    def close(self) -> None:
        """Closes the ledger."""
        self.ledger.close()

    def code_named(self, session: str, name: str) -> Refusal | None:
        """See `Gate`."""
        # The policy alone decides: code that another part of this process has allowed is refused.
        if name in self.policy.code:
            return None
        refusal = unnamed_code(name)
        # The offer is not read yet, so its fingerprint and stage are not known.
        question = Question(self.data, session, self.server, "", "")
        return self._noted(question, "offer", lambda: refusal)

    def offered(self, asked: Asked, *, trial: bool) -> Refusal | None:
        """See `Gate`."""
        kind = CHECK if trial else "offer"
        return self._noted(self._question(asked), kind, lambda: self._of_offer(asked.offer))

    def agreed(self, asked: Asked, contract: Contract, *, trial: bool) -> Refusal | None:
        """See `Gate`."""
        kind = f"{CHECK} of a run" if trial else "run"
        question = self._question(asked)
        return self._noted(question, kind, lambda: self._of_run(asked, contract, trial))

    def called(self, asked: Asked, contract: Contract, message: Message) -> Refusal | None:
        """See `Gate`."""
        # The client refuses a message with the fingerprint of another agreement, and a refusal
        # costs no privacy.
        fingerprint = contract.terms.agreement.fingerprint
        if message.kind in ("fit", "evaluate") and message.header.get("agreement") != fingerprint:
            return None
        found = self._guarded(lambda: self._of_call(asked, contract, message))
        if found is not None:
            return self._noted(self._question(asked), message.kind, lambda: found)
        return None

    def consent(self) -> str:
        """See `Gate`."""
        try:
            latest = self.ledger.latest_approval()
        except PrivacyError:
            return ""
        # With a random key: the server must not learn how many recipes were approved.
        return blake2b(f"{latest}".encode(), key=self._key, digest_size=8).hexdigest()

    def leaving(self, asked: Asked, answer: Message) -> Message:
        """See `Gate`."""
        # The server can do without the training loss, so it is dropped. It cannot do without the
        # other metrics: `_of_call` and `_measures` refuse the whole request.
        if answer.kind != "update" or "loss" in self.policy.metrics or "loss" not in answer.header:
            return answer
        header = {name: value for name, value in answer.header.items() if name != "loss"}
        return replace(answer, header=header)

    def _question(self, asked: Asked) -> Question:
        offer = asked.offer
        return Question(self.data, asked.session, self.server, offer.fingerprint, offer.stage.name)

    def _noted(
        self, question: Question, kind: str, decide: Callable[[], Refusal | None]
    ) -> Refusal | None:
        """Decides by `decide`, and stores the decision in the ledger.

        Args:
            question: what was asked.
            kind: kind of the decision, such as "offer" or "run".
            decide: returns a refusal or None.
        """

        def both() -> Refusal | None:
            found = decide()
            rule, reason = ("", "") if found is None else (found.rule, found.reason)
            self.ledger.decide(question, kind, rule, reason)
            return found

        return self._guarded(both)

    def _guarded(self, decide: Callable[[], Refusal | None]) -> Refusal | None:
        """Decides by `decide`; refuses if the ledger cannot be read or written.

        An answer whose privacy cost cannot be stored must not be given.
        """
        try:
            return decide()
        except PrivacyError as problem:
            log.error("%s", problem)
            # The server receives this text. It has no path, and no details in parentheses: they
            # would tell the server something about this machine.
            said = problem.problem.partition(" (")[0]
            return Refusal(
                "ledger", f"the owner's ledger {said}; the output of that client names a cure"
            )

    def _of_offer(self, offer: Offer) -> Refusal | None:
        """Applies all rules that need only the offer, and not the agreement."""
        # Checked when the gate was opened, too; a gate can also be made without `open`.
        if self.policy.server is not None and self.policy.server != self.server:
            return Refusal(
                "server",
                "another server's certificate is allowed; the owner names this one in the policy",
            )
        for rule in OFFER_RULES:
            refusal = rule(self.policy, offer)
            if refusal is not None:
                return refusal
        if self.policy.require_approval and not self.ledger.approved(offer.fingerprint):
            return Refusal(
                "require_approval",
                f"the owner has not approved the recipe with the fingerprint {offer.fingerprint}; "
                "to approve it there: fedpress client approve RECIPE",
            )
        return None

    def _of_run(self, asked: Asked, contract: Contract, trial: bool) -> Refusal | None:
        """Applies the rules about the number of clients, and checks the budget for the whole run.

        A run that would use up the budget half-way is refused before its first round.
        """
        few = _too_few(self.policy, contract)
        if few is not None or self.policy.privacy is None:
            return few
        run = _run(asked, contract)
        besides = {run}
        if trial:
            # A server that was killed checks again before it goes on, and a trial does not say
            # which run will go on. The run itself is checked when it does.
            besides |= self.ledger.unfinished(
                self.data,
                recipe=asked.offer.fingerprint,
                rounds=contract.participation.max_tasks,
            )
        unit = _unit(contract)
        planned = [Charge(unit, entry) for entry in contract.planned_charges(asked.name)]
        latest = self.ledger.latest_charge(self.data, besides=run)
        over = self._over(self.policy.privacy, asked, besides, planned)
        if over is None:
            self._fits[run] = latest
        return over

    def _over(
        self,
        rules: PrivacyRules,
        asked: Asked,
        besides: Collection[str],
        charges: list[Charge],
    ) -> Refusal | None:
        """Returns a refusal if `charges` would exceed a limit of epsilon, else None.

        Args:
            rules: the policy's rules of privacy.
            asked: what the client takes part in.
            besides: names of runs whose charges in the ledger are left out, since `charges` are
                the costs of the whole run. Empty if `charges` come on top of everything.
            charges: privacy costs that are not in the ledger yet.
        """
        limits = {
            "max_epsilon": (rules.max_epsilon, asked.offer.fingerprint, "of this recipe"),
            "total_epsilon": (rules.total_epsilon, None, "of all recipes on these data"),
        }
        for rule, (limit, recipe, what) in limits.items():
            before = self.ledger.charges(self.data, recipe=recipe, besides=besides)
            epsilon = spent([*before, *charges], unit=rules.unit, delta=rules.delta)
            # Else a run planned for exactly the limit could be refused because of rounding.
            if epsilon > limit * (1 + ROUNDING):
                return Refusal(
                    f"privacy.{rule}",
                    f"epsilon {what} would be {epsilon:.3g} for each {rules.unit} at delta "
                    f"{rules.delta:g}, allowed is {limit:g}; ask for less, with a smaller epsilon "
                    "or fewer rounds, or the owner allows more",
                )
        return None

    def _of_call(self, asked: Asked, contract: Contract, message: Message) -> Refusal | None:
        """Applies the rules about one message, and charges the cost of its answer."""
        named = message.header.get("cohort")
        # As a set: a server must not fill a cohort by listing one client twice.
        if isinstance(named, list) and len(set(map(str, named))) < self.policy.min_cohort:
            return _below(self.policy, len(set(map(str, named))), "in this round")
        if message.kind == "evaluate":
            if "score" not in self.policy.metrics:
                return Refusal(
                    "metrics",
                    "the score on the owner's examples may not leave; the run goes on without it",
                )
            # In a private stage the client itself refuses to evaluate, which costs no privacy.
            if contract.stage.privacy is not None:
                return None
            return self._charge(asked, contract, 0)
        if message.kind != "fit":
            return None
        round = message.header.get("round")
        planned = range(1, contract.stage.num_rounds + 1)
        # In a private stage the client itself refuses a round that is not planned (see
        # `answer_once`), which costs no privacy. `type`, since True is an int for `isinstance`.
        if type(round) is not int or (contract.stage.privacy is not None and round not in planned):
            return None
        return self._charge(asked, contract, round)

    def _charge(self, asked: Asked, contract: Contract, round: int) -> Refusal | None:
        """Stores one more answered round and its privacy cost, unless the round is stored already.

        Round 0 stands for an evaluation. Returns a refusal if a limit would be exceeded.
        """
        run = _run(asked, contract)
        question = self._question(asked)
        # Check and charge are one transaction. Else two clients on the same data could both find
        # that the rest of the budget suffices, and spend it twice.
        with self.ledger.changing():
            answered = self.ledger.answered(run)
            # A repeated request gets the same answer, bit for bit, which reveals nothing new.
            if round in answered:
                return None
            limit = self.policy.rounds_per_day
            if limit is not None and round and self.ledger.rounds_of_today(self.data) >= limit:
                return Refusal(
                    "rounds_per_day", f"{limit} in 24 hours are allowed; it answers again later"
                )
            entries: list[LedgerEntry] = contract.charges_of_answer(
                asked.name, round, first=not answered
            )
            charges = [Charge(_unit(contract), entry) for entry in entries]
            refusal = self._cannot_pay(asked, contract, run, len(answered), charges)
            if refusal is None:
                self.ledger.write_round(question, run, round, charges)
            return refusal

    def _cannot_pay(
        self, asked: Asked, contract: Contract, run: str, answered: int, charges: list[Charge]
    ) -> Refusal | None:
        """Returns a refusal if the budget does not suffice for the charges of one round.

        `answered` is the number of rounds of this run that are answered already.
        """
        rules = self.policy.privacy
        if rules is None or not charges:
            return None
        # Epsilon takes up to a second to compute, so it is not computed in every round. The whole
        # run was found to be within the limits, and a part of it costs less. This holds while no
        # other run has spent since, and while the server asks no more often than planned.
        latest = self.ledger.latest_charge(self.data, besides=run)
        if self._fits.get(run) == latest and answered < contract.participation.max_tasks:
            return None
        return self._over(rules, asked, (), charges)


def _check_installed(name: str, policy: Path | None) -> None:
    """Checks that the package of `package.module:function` is installed."""
    # Only the top package is looked up: to find a submodule Python would run the package's code.
    top = name.partition(":")[0].partition(".")[0]
    if importlib.util.find_spec(top) is None:
        raise PolicyError(
            f"'{name}' is not installed here",
            place=f"{policy}: code",
            cure=f"install the package with the module {top}, or leave the name out",
        )


def _run(asked: Asked, contract: Contract) -> str:
    """Returns the name of a run in the ledger.

    It consists of the id of the client's stored state, and the fingerprint of the agreement. If
    either changes, a repeated request can get another answer, which must be charged again.
    """
    return f"{asked.memory}-{contract.terms.agreement.fingerprint}"


def _unit(contract: Contract) -> Unit:
    """Returns what the run protects."""
    # A run without privacy has no unit. Its epsilon is infinite whichever unit stands here.
    return contract.uplink.trust.unit or "sample"


def _server_free_noise(policy: Policy, offer: Offer) -> Refusal | None:
    """Refuses noise that the server could compute from the seed, and subtract."""
    rules = policy.privacy
    stage = offer.stage
    if rules is None or not rules.secure_noise or stage.privacy is None:
        return None
    if stage.privacy.secure_noise:
        return None
    return Refusal(
        "privacy.secure_noise", "the noise follows from the seed; set secure_noise = true"
    )


def _family(policy: Policy, offer: Offer) -> Refusal | None:
    """Refuses a model architecture that the policy does not list."""
    architecture = offer.spec.architecture
    if architecture in policy.families or architecture in policy.code:
        return None
    allowed = ", ".join(policy.families)
    return Refusal(
        "families",
        f"models of the family '{architecture[:80]}' are not allowed; take one of {allowed}",
    )


def _size(policy: Policy, offer: Offer) -> Refusal | None:
    """Refuses a model with too many parameters."""
    size = sum(tensor.numel() for tensor in offer.tensors.values())
    if policy.max_parameters is None or size <= policy.max_parameters:
        return None
    return Refusal(
        "max_parameters",
        f"the model has {size} numbers, allowed are {policy.max_parameters}; take a smaller model",
    )


def _cohort(policy: Policy, offer: Offer) -> Refusal | None:
    """Refuses rounds with too few clients."""
    cohort = offer.stage.cohort
    # None: all clients take part in each round. How many that are, `_too_few` checks later.
    if cohort is None or cohort >= policy.min_cohort:
        return None
    return _below(policy, cohort, "in a round")


def _secure(policy: Policy, offer: Offer) -> Refusal | None:
    """Refuses a stage in which the server sees single updates, if the policy forbids that."""
    if not policy.secure_sum:
        return None
    if not is_secure(offer.stage):
        return Refusal(
            "secure_sum", 'the server would see single updates; set aggregator = "secure"'
        )
    # A server that knows the seed could compute the keys, and remove the masks of each update.
    if not owns_keys(offer.stage):
        return Refusal(
            "secure_sum", "the keys of the sum follow from the seed; set secure_keys = true"
        )
    return None


def _private(policy: Policy, offer: Offer) -> Refusal | None:
    """Refuses a stage without privacy, with a weaker unit, or with noise from a forbidden party."""
    rules = policy.privacy
    if rules is None:
        return None
    trust = trust_of_stage(offer.stage)
    if offer.stage.privacy is None:
        return Refusal(
            "privacy", "the stage promises no differential privacy; give it a table privacy"
        )
    # Not the other way round: protection of a whole client also protects each of its rows.
    if rules.unit == "client" and trust.unit != "client":
        return Refusal(
            "privacy.unit",
            f'it protects single {trust.unit}s, not the whole client; set unit = "client"',
        )
    if trust.kind not in rules.trust:
        allowed = ", ".join(rules.trust)
        return Refusal(
            "privacy.trust",
            f"the noise is '{trust.kind}', allowed is {allowed}; set trust = \"{rules.trust[0]}\"",
        )
    return None


def _measures(policy: Policy, offer: Offer) -> Refusal | None:
    """Refuses a stage that needs the number of examples, if this number must not leave."""
    if "examples" in policy.metrics or not counts_are_public(offer.stage):
        return None
    return Refusal(
        "metrics",
        "the number of examples may not leave, and this recipe needs it; protect whole clients, "
        'with unit = "client"',
    )


OFFER_RULES: tuple[Callable[[Policy, Offer], Refusal | None], ...] = (
    _family,
    _size,
    _cohort,
    _secure,
    _private,
    _server_free_noise,
    _measures,
)
"""The rules that are asked about an offer, in this order."""


def _too_few(policy: Policy, contract: Contract) -> Refusal | None:
    """Refuses a run with too few clients in the run, in a round, or in an opened secure sum."""
    cohort = contract.context.cohort
    grid = contract.protection.grid
    counts = {
        "in the run": cohort.population,
        "in a round": cohort.size,
        # The server can open a secure sum although some clients of the round have dropped out, so
        # the smallest number of remaining clients counts.
        "in a sum that is opened": cohort.size if grid is None else grid.plan.survivors,
    }
    for where, count in counts.items():
        if count < policy.min_cohort:
            return _below(policy, count, where)
    return None


def _below(policy: Policy, count: int, where: str) -> Refusal:
    few = f"{count} clients {where}, allowed are {policy.min_cohort} or more; let more take part"
    return Refusal("min_cohort", few)
