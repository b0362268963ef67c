"""The owner's status table: a line for each rule that refused, with how often and when."""

from fedpress.network.ledger import DataKey, OwnerLedger, Question
from fedpress.network.policy import Policy
from fedpress.network.status import status, table

DAY = 86_400


def test_refusals_are_counted_by_rule_and_dated_in_utc(tmp_path):
    now = [0.0]
    book = OwnerLedger(tmp_path / "ledger.sqlite", clock=lambda: now[0])
    own = book.data(DataKey("/own", "digest of own"))
    reasons = ("it would be 9", "it would be 10", "it would be 11")
    for at, reason in enumerate(reasons, start=1):
        now[0] = at * DAY + 3660
        asked = Question(own, str(at), "cert", "recipe", "federate")
        book.decide(asked, "run", "privacy.max_epsilon", reason)
        # The same refusal in the same session is no further one.
        book.decide(asked, "run", "privacy.max_epsilon", reason)
    book.decide(asked, "fit", "rounds_per_day", "2 are allowed")
    lines = table(status(book, Policy()))
    assert lines[-2:] == [
        "refused recipe on own: privacy.max_epsilon: it would be 11 "
        "(3 times, last 1970-01-04 01:01 UTC)",
        "refused recipe on own: rounds_per_day: 2 are allowed (1970-01-04 01:01 UTC)",
    ]
