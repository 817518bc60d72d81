"""What the threads of PyTorch's convolutions read once, when torch is loaded: import this before.

Threads of libgomp that wait for one another spin, by default for milliseconds. Where other programs
use the same cores, a thread spins while the one that it waits for has no core, and training becomes
several times slower. After fewer turns it gives its core away. What the user has set counts.

Fewer threads help more, but sums in another order have other last bits: a run must not depend on
what else the machine does. So the user is told and decides (`busy_hint`).
"""

import os
import time
from pathlib import Path

from medseg.files import available_cores

SPIN_TURNS = 10_000  # some ten microseconds: on a quiet machine the others arrive within them
SETTINGS = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}  # of libgomp's, that say how long to spin
MANY = 0.4  # of the cores, from which on other programs are worth a word

if not SETTINGS & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = str(SPIN_TURNS)


def idle_seconds():
    """Seconds that the cores of this process have been idle since the machine started, all added.

    None where Linux's /proc/stat is missing.
    """
    try:
        lines = Path("/proc/stat").read_text().splitlines()
        names = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    except (OSError, AttributeError):
        return None
    rows = [line.split() for line in lines]
    ticks = sum(int(row[4]) + int(row[5]) for row in rows if row[0] in names)  # idle, iowait
    return ticks / os.sysconf("SC_CLK_TCK")


STARTED = time.monotonic(), time.process_time(), idle_seconds()


def busy_hint():
    """A line where other programs have used many of the cores since this one started, else ''."""
    cores, (began, own, idle) = available_cores(), STARTED
    if idle is None or cores < 2 or "OMP_NUM_THREADS" in os.environ:
        return ""
    unused = idle_seconds() - idle + time.process_time() - own
    others = cores - unused / (time.monotonic() - began)
    if others < MANY * cores:
        return ""
    free = max(round(cores - others), 1)
    return (
        f"other programs use {others:.1f} of {cores} cores: OMP_NUM_THREADS={free} before the "
        "command may make it several times as fast"
    )
