"""Bytes and seconds of a secure sum and of a plain sum of float32, for clients and server.

All clients run in this process, one after another. The full size is timed on `--sample` clients; that the sum is right
is seen in a second run in which every client takes part with `--small` values. The server's work at full size is the
adding of sampled vectors and the removal of sampled masks, times how many there are; the rest (shares, signatures) does
not depend on the size and is timed in the small run. Bytes are those of the tensors, masked values packed to `--bits`.

    OMP_NUM_THREADS=1 python benchmarks/secure_sum.py [--clients 10 100 1000] [--values 3300000] [--bits 18]
        [--dropout 0 0.2] [--sample 10] [--small 1000] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import TypeVar

import numpy as np
import torch

from fedpress.secagg import (
    SecAggClient,
    SecAggMessage,
    SecAggServer,
    SecurePlan,
    SecureRound,
    identity,
)
from fedpress.secagg.masks import add_masks_, centred, word_type

Row = dict[str, str | float | int | bool]
T = TypeVar("T")


def measure(
    clients: int, dropout: float, *, values: int, bits: int, sample: int, small: int
) -> Row:
    """Returns one row: what a client and the server pay at this number of clients and share of drop-outs."""
    plan = SecurePlan(clients, bits)
    setup: list[float] = []
    combiner, members = group(plan, setup)
    names = list(members)
    silent = set(names[:: round(1 / dropout)][: int(clients * dropout)]) if dropout else set()
    limit = max(1, (1 << (bits - 1)) // clients - 1)
    drawn = torch.Generator().manual_seed(0)

    sampled = [name for name in names if name not in silent][:sample]
    vector = torch.randint(-limit, limit + 1, (values,), generator=drawn)
    big = combiner.open(1, names, values)
    mask, add = [], []
    for name in sampled:
        took, part = timed(lambda name=name: members[name].mask(vector, round=1, cohort=names))  # type: ignore[misc]
        mask.append(took)
        add.append(timed(lambda name=name, part=part: big.add(name, part))[0])  # type: ignore[misc]
    words = np.zeros(values, word_type(bits))
    expand = [
        timed(lambda k=k: add_masks_(words, [(bytes([k] * 16), True)]))[0] for k in range(sample)
    ]  # type: ignore[misc]
    centre = timed(lambda: centred(words, bits))[0]

    rows = torch.randint(-limit, limit + 1, (clients, small), generator=drawn)
    secure = combiner.open(2, names, small)
    sent, unmask, got, answered, server = [], [], [], [], 0.0
    for row, name in enumerate(names):
        part = members[name].mask(rows[row], round=2, cohort=names)
        if name not in silent:
            sent.append(size(part, but="masked"))
            server += timed(lambda name=name, part=part: secure.add(name, part))[0]  # type: ignore[misc]
    took, requests = timed(secure.requests)
    server += took
    for name, request in requests.items():
        took, answer = timed(lambda name=name, request=request: members[name].unmask(request))  # type: ignore[misc]
        unmask.append(took)
        got.append(size(request) + len(json.dumps(dict(request.header))))
        answered.append(size(answer))
        server += timed(lambda name=name, answer=answer: secure.share(name, answer))[0]  # type: ignore[misc]
    took, total = timed(secure.sum)
    server += took
    kept = [row for row, name in enumerate(names) if name not in silent]
    masks = removed(secure)
    alive = clients - len(silent)
    plain = [timed(lambda: torch.zeros(values).add_(vector.float()))[0] for _ in range(sample)]
    packed = (values * bits + 7) // 8
    return {
        "clients": clients,
        "dropout": len(silent) / clients,
        "values": values,
        "bits": bits,
        "exact": torch.equal(total, rows[kept].sum(0)),
        "degree": round(plan.degree, 1),
        "committee": plan.committee,
        "threshold": plan.threshold,
        "setup_s": statistics.median(setup),
        "mask_s": statistics.median(mask),
        "mask_low_s": quartiles(mask)[0],
        "mask_high_s": quartiles(mask)[1],
        "unmask_s": statistics.median(unmask),
        "unmask_low_s": quartiles(unmask)[0],
        "unmask_high_s": quartiles(unmask)[1],
        "up_bytes": packed + round(statistics.mean(sent)) + round(statistics.mean(answered)),
        "shares_up_bytes": round(statistics.mean(sent)) + round(statistics.mean(answered)),
        "unmask_down_bytes": round(statistics.mean(got)),
        "server_masks": masks,
        "server_s": statistics.median(add) * alive
        + statistics.median(expand) * masks
        + centre
        + server,
        "server_small_s": server,
        "plain_up_bytes": 4 * values,
        "plain_server_s": statistics.median(plain) * alive,
    }


def group(plan: SecurePlan, setup: list[float]) -> tuple[SecAggServer, dict[str, SecAggClient]]:
    """Returns a server and its clients after the set-up, and notes how long each client's took."""
    names = [f"client-{i}" for i in range(plan.cohort)]
    secrets = {name: sha256(name.encode()).digest() for name in names}
    known = {name: identity(secret) for name, secret in secrets.items()}
    members = {
        name: SecAggClient(name, secret, plan, known, "benchmark")
        for name, secret in secrets.items()
    }
    combiner = SecAggServer(plan, known, "benchmark")
    for name, member in members.items():
        combiner.join(name, member.join())
    roster = combiner.roster()
    for name, member in members.items():
        took, part = timed(lambda member=member: member.accept(roster))  # type: ignore[misc]
        setup.append(took)
        combiner.accepted(name, part)
    return combiner, members


def removed(secure: SecureRound) -> int:
    """Returns how many masks the server takes out: one for each client in the sum, one for each edge that was cut."""
    facts = secure._facts
    inside = np.isin(np.array(facts.names), secure.reported)
    return int(inside.sum()) + int(facts.edges[inside][:, ~inside].sum())


def size(part: SecAggMessage, *, but: str = "") -> int:
    """Returns the bytes of all tensors but one."""
    return sum(t.numel() * t.element_size() for name, t in part.tensors.items() if name != but)


def timed(work: Callable[[], T]) -> tuple[float, T]:
    """Returns the seconds that `work` took, and its result."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def quartiles(times: Sequence[float]) -> tuple[float, float]:
    """Returns the first and the third quartile."""
    ordered = sorted(times)
    return ordered[len(ordered) // 4], ordered[-1 - len(ordered) // 4]


def main() -> None:
    """Prints one line per number of clients and share of drop-outs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.2])
    parser.add_argument("--values", type=int, default=3_300_000)
    parser.add_argument("--bits", type=int, default=18)
    parser.add_argument("--sample", type=int, default=10)
    parser.add_argument("--small", type=int, default=1000)
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    line = (
        "{clients:6d} {dropout:5.0%} {exact!s:6} {degree:6} {committee:9d} {setup_s:7.3f} "
        "{mask_s:7.3f} ({mask_low_s:.3f}-{mask_high_s:.3f}) {unmask_s:7.3f} ({unmask_low_s:.3f}-{unmask_high_s:.3f}) "
        "{up:8.2f} {down:8.2f} {server_s:8.2f}   {plain_up:8.2f} {plain_server_s:8.2f}"
    )
    if not chosen.json:
        print(
            "clients, drop-out, sum exact, degree, committee; per client: set-up s, mask s (quartiles), unmask s",
            end="",
        )
        print(" (quartiles), MB up, MB down to unmask; server s; plain sum: MB up, server s")
    for clients in chosen.clients:
        for dropout in chosen.dropout:
            row = measure(
                clients,
                dropout,
                values=chosen.values,
                bits=chosen.bits,
                sample=min(chosen.sample, clients),
                small=chosen.small,
            )
            if chosen.json:
                print(json.dumps(row), flush=True)
                continue
            sizes = {"up": "up_bytes", "down": "unmask_down_bytes", "plain_up": "plain_up_bytes"}
            print(
                line.format(**row, **{k: float(row[v]) / 1e6 for k, v in sizes.items()}), flush=True
            )


if __name__ == "__main__":
    main()
