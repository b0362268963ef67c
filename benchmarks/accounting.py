"""Time, memory and answers of the privacy accountant over its whole range: python benchmarks/accounting.py [EVERY].

Prints the slowest and the largest answers, what is only an upper bound, and every answer that lies above the Renyi
bound or below the exact delta of a single step. EVERY takes each EVERY-th of the 1,152 questions.
"""

from __future__ import annotations

import itertools
import resource
import sys
import time

from fedpress.errors import PrivacyError
from fedpress.privacy.accounting import renyi
from fedpress.privacy.accounting.accountant import GaussianEvent, noise_multiplier, spent

PROBS = (1e-9, 1e-7, 1e-5, 1e-4, 1e-3, 0.03, 0.5, 1.0)
NOISES = (0.3, 0.5, 0.8, 2.0, 50.0, 1e4)
STEPS = (1, 100, 10_000, 10**6, 10**7)
DELTAS = (1e-12, 1e-9, 1e-5, 1e-1)
EPSILONS = (0.1, 8.0)


def megabytes() -> float:
    """Returns the most memory this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Asks all questions."""
    every = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    spent([GaussianEvent(0.1, 1.0, 10)], delta=1e-5)  # imports
    start, bounds, above = megabytes(), 0, 0
    times = []
    questions = list(itertools.product(PROBS, NOISES, STEPS, DELTAS))[::every]
    for q, z, steps, delta in questions:
        began = time.process_time()
        answer = spent([GaussianEvent(q, z, steps)], delta=delta)
        times.append((time.process_time() - began, (q, z, steps, delta), answer))
        bounds += answer.upper_bound
        if answer.epsilon > renyi.epsilon([GaussianEvent(q, z, steps)], delta=delta) * 1.001:
            above += 1
            print("above the Renyi bound:", (q, z, steps, delta), answer)
    print(
        f"epsilon: {len(questions)} questions, {bounds} upper bounds, {above} above the Renyi bound"
    )
    show(times)
    print(f"memory: {megabytes() - start:.0f} MB more than at the start")
    searches = []
    budgets = list(itertools.product(EPSILONS, PROBS, STEPS, DELTAS))[::every]
    for epsilon, q, steps, delta in budgets:
        began = time.process_time()
        try:
            noise: object = noise_multiplier(
                epsilon=epsilon, delta=delta, sampling_prob=q, steps=steps
            )
        except PrivacyError as error:
            noise = str(error)
        searches.append((time.process_time() - began, (epsilon, q, steps, delta), noise))
    print(f"noise: {len(budgets)} questions")
    show(searches)
    print(f"memory: {megabytes() - start:.0f} MB more than at the start")


def show(times: list[tuple[float, tuple[float, ...], object]]) -> None:
    """Prints the median and the slowest."""
    times.sort(key=lambda entry: -entry[0])
    print(f"median {times[len(times) // 2][0]:.3f} s; the slowest:")
    for seconds, question, answer in times[:5]:
        print(f"  {seconds:.2f} s {question} -> {answer}")


if __name__ == "__main__":
    main()
