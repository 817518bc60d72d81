"""What the threads of PyTorch's convolutions read once, when torch is loaded: import this before.

Threads of libgomp that wait for one another spin, by default for milliseconds. Where other programs
use the same cores, a thread spins while the one that it waits for has no core, and training becomes
several times slower. After fewer turns it gives its core away. What the user has set counts.
"""

import os

SPIN_TURNS = 10_000  # some ten microseconds: on a quiet machine the others arrive within them
SETTINGS = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}  # of libgomp's, that say how long to spin

if not SETTINGS & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = str(SPIN_TURNS)
