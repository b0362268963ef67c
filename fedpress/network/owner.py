"""The data owner's gate: policy, approvals and ledger decide before a client answers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from fedpress.core import consent
from fedpress.core.log import logger
from fedpress.errors import PolicyError, PrivacyError
from fedpress.network import policy as policies
from fedpress.network.gate import Asked, Refusal, unnamed_code
from fedpress.network.ledger import DataKey, OwnerLedger, Question, default_path
from fedpress.network.policy import Policy, PrivacyRules
from fedpress.network.spending import Charge, Unit, spent
from fedpress.privacy.ledger import LedgerEntry
from fedpress.stages.federate.contract import Contract, counts_are_public, owns_keys
from fedpress.stages.federate.offer import Offer
from fedpress.stages.federate.protection import is_secure, trust_of_stage
from fedpress.wire.message import Message

log = logger(__name__)

CHECK = "check"
"""Kind of a decision about a trial offer: a question before a run, of which nothing is kept."""
ROUNDING = 1e-9
"""Share of epsilon by which floating-point rounding may exceed a limit."""


@dataclass(eq=False)
class OwnerGate:
    """Answers for the owner of some data; see `fedpress.network.gate.Gate`.

    Attributes:
        policy: what is allowed.
        ledger: what was spent.
        data: number of the data in the ledger.
        server: fingerprint of the certificate by which this client knows the server; empty without
            TLS.
    """

    policy: Policy
    ledger: OwnerLedger
    data: int
    server: str = ""
    # Run -> number of the latest charge by other runs, when the whole run was found to be within
    # the limits.
    _fits: dict[str, int] = field(default_factory=dict, repr=False)

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
            data: file or folder with the owner's data, or what they are known by.
            policy: a policy file; None: the defaults of `Policy`.
            ledger: the ledger's file; None: that of this user, see `default_path`.
            certificate: PEM file of the CA or the server, by which the server is known; None
                without TLS.

        Raises:
            PolicyError: if the policy is wrong, does not go with the certificate, or names code
                that is not installed.
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
        # Also code that somebody else in this process has allowed: the policy alone decides.
        if name in self.policy.code:
            return None
        refusal = unnamed_code(name)
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
        return self._noted(question, kind, lambda: self._of_run(asked, contract))

    def called(self, asked: Asked, contract: Contract, message: Message) -> Refusal | None:
        """See `Gate`."""
        # The client refuses a message of another agreement, so it must cost nothing.
        fingerprint = contract.terms.agreement.fingerprint
        if message.kind in ("fit", "evaluate") and message.header.get("agreement") != fingerprint:
            return None
        found = self._guarded(lambda: self._of_call(asked, contract, message))
        if found is not None:
            return self._noted(self._question(asked), message.kind, lambda: found)
        return None

    def leaving(self, asked: Asked, answer: Message) -> Message:
        """See `Gate`."""
        if answer.kind != "update" or "loss" in self.policy.metrics or "loss" not in answer.header:
            return answer
        header = {name: value for name, value in answer.header.items() if name != "loss"}
        return Message(answer.kind, header, answer.tensors)

    def _question(self, asked: Asked) -> Question:
        offer = asked.offer
        return Question(self.data, asked.session, self.server, offer.fingerprint, offer.stage.name)

    def _noted(
        self, question: Question, kind: str, decide: Callable[[], Refusal | None]
    ) -> Refusal | None:
        """Decides, and writes the decision into the ledger."""

        def both() -> Refusal | None:
            found = decide()
            rule, reason = ("", "") if found is None else (found.rule, found.reason)
            self.ledger.decide(question, kind, rule, reason)
            return found

        return self._guarded(both)

    def _guarded(self, decide: Callable[[], Refusal | None]) -> Refusal | None:
        """Refuses where the ledger does not work: what cannot be noted must not be answered."""
        try:
            return decide()
        except PrivacyError as problem:
            log.error("%s", problem)
            # The text names no path, which would tell the server something about this machine.
            return Refusal("ledger", f"the owner's ledger {problem.problem.partition(' (')[0]}")

    def _of_offer(self, offer: Offer) -> Refusal | None:
        """Asks every rule that needs the offer alone."""
        if self.policy.server is not None and self.policy.server != self.server:
            return Refusal("server", "another server's certificate is allowed")
        for rule in OFFER_RULES:
            refusal = rule(self.policy, offer)
            if refusal is not None:
                return refusal
        if self.policy.require_approval and not self.ledger.approved(offer.fingerprint):
            return Refusal(
                "require_approval",
                f"the owner has not approved the recipe with the fingerprint {offer.fingerprint}",
            )
        return None

    def _of_run(self, asked: Asked, contract: Contract) -> Refusal | None:
        """Asks the rules that need all clients, and whether the whole run can be paid for."""
        few = _too_few(self.policy, contract)
        if few is not None or self.policy.privacy is None:
            return few
        run = _run(asked, contract)
        unit = _unit(contract)
        planned = [Charge(unit, entry) for entry in contract.planned_charges(asked.name)]
        latest = self.ledger.latest_charge(self.data, besides=run)
        over = self._over(self.policy.privacy, asked, run, planned)
        if over is None:
            self._fits[run] = latest
        return over

    def _over(
        self,
        rules: PrivacyRules,
        asked: Asked,
        run: str | None,
        charges: list[Charge],
    ) -> Refusal | None:
        """Says which limit would be exceeded by `charges`.

        Args:
            rules: of the policy.
            asked: what the client takes part in.
            run: whose earlier charges are part of `charges`; None if they are not.
            charges: further ones.
        """
        limits = {
            "max_epsilon": (rules.max_epsilon, asked.offer.fingerprint, "of this recipe"),
            "total_epsilon": (rules.total_epsilon, None, "of all recipes on these data"),
        }
        for rule, (limit, recipe, what) in limits.items():
            before = self.ledger.charges(self.data, recipe=recipe, besides=run)
            epsilon = spent([*before, *charges], unit=rules.unit, delta=rules.delta)
            if epsilon > limit * (1 + ROUNDING):
                return Refusal(
                    f"privacy.{rule}",
                    f"epsilon {what} would be {epsilon:.3g} for each {rules.unit} at delta "
                    f"{rules.delta:g}, allowed is {limit:g}",
                )
        return None

    def _of_call(self, asked: Asked, contract: Contract, message: Message) -> Refusal | None:
        """Asks the rules of one message, and writes what its answer costs."""
        named = message.header.get("cohort")
        if isinstance(named, list) and len(set(map(str, named))) < self.policy.min_cohort:
            return _below(self.policy, len(set(map(str, named))), "in this round")
        if message.kind == "evaluate":
            if "score" not in self.policy.metrics:
                return Refusal("metrics", "the score on the owner's examples may not leave")
            # Under privacy the client refuses to evaluate, so it must cost nothing.
            if contract.stage.privacy is not None:
                return None
            return self._charge(asked, contract, 0)
        if message.kind != "fit":
            return None
        round = message.header.get("round")
        planned = range(1, contract.stage.num_rounds + 1)
        # Under privacy the client refuses a round that is not planned (see `answer_once`), so it
        # must cost nothing.
        if type(round) is not int or (contract.stage.privacy is not None and round not in planned):
            return None
        return self._charge(asked, contract, round)

    def _charge(self, asked: Asked, contract: Contract, round: int) -> Refusal | None:
        """Charges and notes one more answered round, unless it is noted; round 0: an evaluation."""
        run = _run(asked, contract)
        question = self._question(asked)
        with self.ledger.changing():
            answered = self.ledger.answered(run)
            # A repeated question gets the same answer, bit for bit.
            if round in answered:
                return None
            limit = self.policy.rounds_per_day
            if limit is not None and round and self.ledger.rounds_of_today(self.data) >= limit:
                return Refusal("rounds_per_day", f"{limit} in 24 hours are allowed")
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
        rules = self.policy.privacy
        if rules is None or not charges:
            return None
        # Epsilon takes up to a second to compute. It was computed for the whole run before; as
        # long as no other run has spent since, a part of the run is within the limits, too.
        latest = self.ledger.latest_charge(self.data, besides=run)
        if self._fits.get(run) == latest and answered < contract.participation.max_tasks:
            return None
        return self._over(rules, asked, None, charges)


def _check_installed(name: str, policy: Path | None) -> None:
    top = name.partition(":")[0].partition(".")[0]
    if importlib.util.find_spec(top) is None:
        raise PolicyError(
            f"'{name}' is not installed here",
            place=f"{policy}: code",
            cure=f"install the package with the module {top}, or leave the name out",
        )


def _run(asked: Asked, contract: Contract) -> str:
    """Returns the name of a run: the id of the client's memory, and the agreement's fingerprint."""
    return f"{asked.memory}-{contract.terms.agreement.fingerprint}"


def _unit(contract: Contract) -> Unit:
    return contract.uplink.trust.unit or "sample"


def _server_free_noise(policy: Policy, offer: Offer) -> Refusal | None:
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
    architecture = offer.spec.architecture
    if architecture in policy.families or architecture in policy.code:
        return None
    return Refusal("families", f"models of the family '{architecture[:80]}' are not allowed")


def _size(policy: Policy, offer: Offer) -> Refusal | None:
    size = sum(tensor.numel() for tensor in offer.tensors.values())
    if policy.max_parameters is None or size <= policy.max_parameters:
        return None
    return Refusal(
        "max_parameters", f"the model has {size} numbers, allowed are {policy.max_parameters}"
    )


def _cohort(policy: Policy, offer: Offer) -> Refusal | None:
    cohort = offer.stage.cohort
    if cohort is None or cohort >= policy.min_cohort:
        return None
    return _below(policy, cohort, "in a round")


def _secure(policy: Policy, offer: Offer) -> Refusal | None:
    if not policy.secure_sum:
        return None
    if not is_secure(offer.stage):
        return Refusal(
            "secure_sum", 'the server would see single updates; set aggregator = "secure"'
        )
    if not owns_keys(offer.stage):
        return Refusal(
            "secure_sum", "the keys of the sum follow from the seed; set secure_keys = true"
        )
    return None


def _private(policy: Policy, offer: Offer) -> Refusal | None:
    rules = policy.privacy
    if rules is None:
        return None
    trust = trust_of_stage(offer.stage)
    if offer.stage.privacy is None:
        return Refusal("privacy", "the stage promises no differential privacy")
    if rules.unit == "client" and trust.unit != "client":
        return Refusal("privacy.unit", f"it protects single {trust.unit}s, not the whole client")
    if trust.kind not in rules.trust:
        allowed = ", ".join(rules.trust)
        return Refusal("privacy.trust", f"the noise is '{trust.kind}', allowed is {allowed}")
    return None


def _measures(policy: Policy, offer: Offer) -> Refusal | None:
    if "examples" in policy.metrics or not counts_are_public(offer.stage):
        return None
    return Refusal("metrics", "the number of examples may not leave, and this recipe needs it")


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
    cohort = contract.context.cohort
    grid = contract.protection.grid
    counts = {
        "in the run": cohort.population,
        "in a round": cohort.size,
        # A secure sum is opened, too, if some of the cohort have gone.
        "in a sum that is opened": cohort.size if grid is None else grid.plan.survivors,
    }
    for where, count in counts.items():
        if count < policy.min_cohort:
            return _below(policy, count, where)
    return None


def _below(policy: Policy, count: int, where: str) -> Refusal:
    few = f"{count} clients {where}, allowed are {policy.min_cohort} or more"
    return Refusal("min_cohort", few)


@dataclass(frozen=True)
class StatusRow:
    """What one server asked with one recipe about some data; another row sums up for the data.

    Attributes:
        data: path of the data; the latest one, if they were moved.
        recipe: fingerprint of the terms; "total" in a row that sums up, empty for an offer that
            was refused before it was read.
        stage: name of the stage.
        server: fingerprint of the server's certificate, shortened; empty without TLS.
        approved: whether the owner approved the recipe.
        asked: number of sessions in which the stage was offered.
        answered: number of rounds that were answered.
        refused: the latest rule that said no, and its reason.
        epsilon: spent by this recipe on these data.
    """

    data: str
    recipe: str
    stage: str
    server: str
    approved: bool
    asked: int
    answered: int
    refused: str
    epsilon: float


HEADINGS = ("data", "recipe", "stage", "server", "approved", "asked", "answered", "epsilon")
TOTAL = "total"


def status(ledger: OwnerLedger, policy: Policy) -> list[StatusRow]:
    """Returns what was asked, answered, refused and spent, for all data of a ledger.

    Epsilon is that of the policy's unit and delta; without rules of privacy, of one row at 1e-5.
    """
    found: list[StatusRow] = []
    seen: set[int] = set()
    for row in ledger.rows("data"):
        if row["id"] not in seen:
            seen |= ledger.same_data(row["id"])
            found += _status_of_data(ledger, policy.privacy or PrivacyRules(), row["id"])
    return found


def _status_of_data(ledger: OwnerLedger, rules: PrivacyRules, data: int) -> list[StatusRow]:
    same = ledger.same_data(data)
    place = [row["path"] for row in ledger.rows("data") if row["id"] in same][-1]
    decisions = [row for row in ledger.rows("decisions") if row["data"] in same]
    rounds = [row for row in ledger.rows("rounds") if row["data"] in same]
    found: dict[tuple[str, str], StatusRow] = {}
    sessions: dict[tuple[str, str], set[str]] = {}
    for row in [*decisions, *rounds]:
        recipe = row["recipe"]
        key = (recipe, row["server"])
        if key not in found:
            charges = ledger.charges(data, recipe=recipe)
            found[key] = StatusRow(
                place,
                recipe,
                row["stage"],
                row["server"][:12],
                ledger.approved(recipe),
                asked=0,
                answered=0,
                refused="",
                epsilon=spent(charges, unit=rules.unit, delta=rules.delta),
            )
        one = found[key]
        # Before a run a server asks once more, only to know whether it would be accepted.
        if not row.get("kind", "").startswith(CHECK):
            sessions.setdefault(key, set()).add(row["session"])
        # Round 0 stands for evaluations.
        if row.get("round"):
            found[key] = replace(one, answered=one.answered + 1)
        elif row.get("rule"):
            found[key] = replace(one, refused=f"{row['rule']}: {row['reason']}")
    rows = [replace(one, asked=len(sessions.get(key, ()))) for key, one in found.items()]
    total = spent(ledger.charges(data), unit=rules.unit, delta=rules.delta)
    answered = sum(row.answered for row in rows)
    asked = sum(row.asked for row in rows)
    return [*rows, StatusRow(place, TOTAL, "", "", False, asked, answered, "", total)]


def table(rows: Iterable[StatusRow]) -> list[str]:
    """Returns the rows as lines of a table, with headings; reasons of refusals stand below it."""
    cells = [list(HEADINGS)]
    refused = []
    for row in rows:
        approved = "" if row.recipe == TOTAL else ("yes" if row.approved else "no")
        recipe = row.recipe or "(not read)"
        name = Path(row.data).name
        numbers = [str(row.asked), str(row.answered), f"{row.epsilon:.3g}"]
        cells.append([name, recipe, row.stage, row.server, approved, *numbers])
        if row.refused:
            refused.append(f"refused {recipe} on {name}: {row.refused}")
    widths = [max(len(line[at]) for line in cells) for at in range(len(HEADINGS))]
    lines = []
    for line in cells:
        padded = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        lines.append("  ".join(padded).rstrip())
    return [*lines, *refused]
