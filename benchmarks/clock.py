"""A deployed run whose server's clock jumps by an hour, forward and back: python benchmarks/clock.py [SECONDS ...].

The server and its SuperLink are given the jump by a small library in C (needs `cc`; libfaketime 0.9.10 breaks
Python's `time.sleep`); the three clients, with TLS and keys, keep the true clock. The run must end in the bits of the
same run in one process. It takes two minutes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import kills

JUMP = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static long jump(void) {
    char text[32] = {0};
    int file = open(getenv("CLOCK_JUMP"), O_RDONLY);
    if (file >= 0) { (void)!read(file, text, 31); close(file); }
    return atol(text);
}
/* The clock since the start does not jump. */
int clock_gettime(clockid_t clock, struct timespec *t) {
    int status = syscall(SYS_clock_gettime, clock, t);
    if (!status && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) t->tv_sec += jump();
    return status;
}
int gettimeofday(struct timeval *restrict t, void *restrict zone) {
    int status = syscall(SYS_gettimeofday, t, zone);
    if (!status && t) t->tv_sec += jump();
    return status;
}
time_t time(time_t *t) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (t) *t = now.tv_sec;
    return now.tv_sec;
}
"""
BETWEEN = 6
"""Finished rounds between two jumps."""


def jumping(folder: Path) -> dict[str, str]:
    """Returns the environment in which the clock differs by the seconds in the file `folder`/jump."""
    jump(folder, 0)
    (folder / "jump.c").write_text(JUMP)
    words = ["cc", "-O2", "-shared", "-fPIC", "-o", "jump.so", "jump.c"]
    subprocess.run(words, cwd=folder, check=True)
    return {"LD_PRELOAD": str(folder / "jump.so"), "CLOCK_JUMP": str(folder / "jump")}


def jump(folder: Path, seconds: int) -> None:
    """Sets the difference, at once: a half written file would be another jump."""
    (folder / "next").write_text(str(seconds))
    (folder / "next").replace(folder / "jump")


def lines(place: kills.Place) -> list[dict[str, object]]:
    """Returns the records of the finished rounds."""
    try:
        text = (place.folder / "run" / "records.jsonl").read_text()
    except FileNotFoundError:
        return []
    return [one for one in map(json.loads, text.splitlines()) if "round" in one]


def main() -> None:
    """Jumps, compares and prints."""
    jumps = [int(word) for word in sys.argv[1:]] or [3600, 0, -3600, 0]
    folder = Path(tempfile.mkdtemp(prefix="clock-"))
    place = kills.Place(folder, int(os.environ.get("FEDPRESS_TEST_PORT", "24140")))
    model = Path("stages") / "0-federate" / "model.safetensors"
    try:
        for name in kills.CLIENTS:
            place.start_client(name)
        kills.ENVIRONMENT.update(jumping(folder))
        place.start_server()
        end = time.monotonic() + kills.LONGEST
        done = 0
        while place.processes["server"].poll() is None:
            if time.monotonic() > end:
                raise SystemExit(f"the run has not ended; see {folder}")
            time.sleep(0.02)
            if done < len(jumps) and len(lines(place)) >= BETWEEN * (done + 1):
                jump(folder, jumps[done])
                print(f"after {len(lines(place))} rounds: {jumps[done]:+d} s", flush=True)
                done += 1
        status = place.processes["server"].returncode
    finally:
        place.close()
    found = lines(place)
    for one in found:
        print(f"round {one['round']}: {one['seconds']:.1f} s")
    equal = (
        not status
        and (folder / "run" / model).read_bytes() == (folder / "undisturbed" / model).read_bytes()
    )
    print(f"{'the same bits' if equal else f'OTHER BITS (exit {status})'} ({folder})")
    raise SystemExit(not equal)


if __name__ == "__main__":
    main()
