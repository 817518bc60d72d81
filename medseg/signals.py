"""Ctrl-C and SIGTERM: end the step, save, leave."""

import os
import signal
import sys
from contextlib import contextmanager


class Stopped(BaseException):
    """SIGINT or SIGTERM came. Not an Exception: nothing on the way out may swallow it.

    checkpointed: whether last.pth holds the step it stopped at.
    """

    def __init__(self, signum, *, checkpointed=False):
        self.signum, self.checkpointed = signum, checkpointed


class Signals:
    """Asked to stop once, the training loop ends its step and saves; asked twice, it ends."""

    def __init__(self):
        self.received = 0  # number of the signal, 0 before one came
        self.deferred = False

    @contextmanager
    def installed(self):
        """Handle SIGINT and SIGTERM here; outside, they do what they did before.

        So does SIGHUP of a closed terminal, unless nohup has it ignored. Windows has none.
        """
        signums = [signal.SIGINT, signal.SIGTERM]
        hang_up = getattr(signal, "SIGHUP", None)
        if hang_up and signal.getsignal(hang_up) != signal.SIG_IGN:
            signums.append(hang_up)
        before = {signum: signal.signal(signum, self.receive) for signum in signums}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def receive(self, signum, frame):
        if self.received:
            os._exit(128 + signum)
        self.received = signum
        if not self.deferred:
            raise Stopped(signum)

    @contextmanager
    def exit_when_stopped(self, command):
        """Within, `Stopped` becomes a line on stderr and the exit with status 128 + signal.

        command: to go on with; the line has it where there is a checkpoint.
        """
        try:
            yield
        except Stopped as stop:
            to_go_on = f"; to go on: {command}" if stop.checkpointed else ""
            with self.defer():  # torchrun ends the processes that are left once one has stopped
                name = signal.Signals(stop.signum).name
                print(f"stopped by {name}{to_go_on}", file=sys.stderr)
                sys.exit(128 + stop.signum)

    @contextmanager
    def defer(self):
        """Within, a signal is only noted in `received`, for the loop to look at."""
        self.deferred = True
        try:
            yield
        finally:
            self.deferred = False
