"""What libgomp reads once, when torch is loaded: import this before.

Threads that wait for one another spin, by default for milliseconds. Where other programs use the
same cores, a thread spins while the one that it waits for has no core, and training becomes several
times slower. After fewer turns it gives its core away. What the user has set counts.
"""

import os

if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "10000"  # ten microseconds: on a quiet machine they suffice
