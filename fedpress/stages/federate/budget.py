"""Computes which epsilon a federate stage may spend, if earlier stages have spent some of it.

The key `privacy.epsilon` is the budget of everything that is charged until the end of the stage. So
the noise of a stage is calibrated to what earlier stages have left.
"""

from __future__ import annotations

import math

from fedpress.data.population import Population
from fedpress.privacy.accounting import closed_form
from fedpress.privacy.ledger import Ledger
from fedpress.stages.federate.contract import CommonInputs

LEAST_SHARE = 0.01
"""With less than this share of the budget left, a stage cannot be planned."""
FINE = 0.98
"""A plan that uses at least this share of the budget is good enough. Each plan may take seconds."""
TRIES = 6
"""Number of plans that are tried. One or two are usual."""


def epsilon_left(common: CommonInputs, population: Population, ledger: Ledger) -> float | None:
    """Returns the epsilon to which the noise of the stage is calibrated.

    With it, earlier stages and all rounds of this stage together cost at most the recipe's epsilon.

    Args:
        common: the settings and the model of the stage.
        population: all clients.
        ledger: what earlier stages have spent.

    Returns:
        The epsilon of this stage alone. None: it is the recipe's, because nothing was spent before,
        or the recipe gives no epsilon, or so little is left that the budget cannot be kept. In the
        last case `ServerSide.spend` refuses the stage.

    Raises:
        RecipeError: if a setting does not fit the clients.
        PrivacyError: if no noise is large enough.
    """
    private = common.stage.privacy
    if private is None or private.epsilon is None or not ledger.entries:
        return None
    budget, delta = private.epsilon, private.delta

    before = ledger.epsilon(delta=delta)
    if not before < (1 - LEAST_SHARE) * budget or not common.stage.num_rounds:
        return None

    def excess(epsilon: float) -> float:
        contract = common.contract(population, epsilon)
        # No client is asked more often, whichever clients the server draws.
        tasks = dict.fromkeys(population.names, contract.participation.max_tasks)
        charges = contract.charges(tasks, 1, common.stage.num_rounds)
        return math.log(ledger.add(*charges).epsilon(delta=delta) / budget)

    # Exact for Gaussian noise without sampling, where the squares of `mu` add up. With sampling or
    # Skellam noise it is a few percent off.
    total, spent = closed_form.largest_mu(budget, delta), closed_form.largest_mu(before, delta)
    guess = closed_form.epsilon_of(math.sqrt(max(total**2 - spent**2, 0.0)), delta)
    found = None
    for _ in range(TRIES):
        if guess < LEAST_SHARE * budget:
            return None
        over = excess(guess)
        if over <= 0:
            found = max(found or 0.0, guess)
        if math.log(FINE) <= over <= 0:
            break
        # Aims at the middle of the good range.
        guess = min(budget, guess * math.exp(-over + math.log(FINE) / 2))
    return found
