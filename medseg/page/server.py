"""A web page on this computer: an address, whose requests are answered, and an end without traces.

uvicorn is imported when used: it comes with gradio.
"""

import contextlib
import errno
import ipaddress
import shutil
import signal
import socket
import tempfile
import threading
from pathlib import Path
from urllib.parse import urlsplit

PORT, PORTS = 7860, 100  # the first port to try, and how many


def is_loopback(host):
    """Whether only programs on this computer can connect to the address `host`."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def open_socket(host, port=None):
    """A socket that listens. port: None for 7860 or the next free one, 0 for any free one.

    Raises ValueError where `host` is no address of this computer or the port is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    ports = range(PORT, PORT + PORTS) if port is None else [port]
    for candidate in ports:
        try:
            return socket.create_server((host, candidate), family=family)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                problem = f"--host {host}, port {candidate}: {error.strerror or error}"
                raise ValueError(problem) from None
    if port is None:
        raise ValueError(f"ports {ports[0]} to {ports[-1]} are taken: choose one with --port")
    raise ValueError(f"--port {port}: another program listens there; leave --port out, or choose")


def url(listening, host):
    """'http://127.0.0.1:7860' for a socket that listens."""
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listening.getsockname()[1]}"


class SameOrigin:
    """An ASGI application that refuses what other pages in the same browser ask for.

    The Origin of a request, where it has one, must be the page itself. With a loopback address, the
    Host must be this computer's, or a page of a name that was changed to 127.0.0.1 could read
    predictions ("DNS rebinding").
    """

    def __init__(self, app, host):
        self._app = app
        self._hosts = {"localhost", "127.0.0.1", "::1", host} if is_loopback(host) else None

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan" or self._allowed(dict(scope["headers"])):
            await self._app(scope, receive, send)
            return
        headers = [(b"content-type", b"text/plain")]
        await send({"type": "http.response.start", "status": 403, "headers": headers})
        await send({"type": "http.response.body", "body": b"another Host or Origin than this page"})

    def _allowed(self, headers):
        host = headers.get(b"host", b"").decode("latin-1")
        origin = headers.get(b"origin", b"").decode("latin-1")
        try:
            if self._hosts and urlsplit(f"//{host}").hostname not in self._hosts:
                return False
            return not origin or urlsplit(origin).netloc == host
        except ValueError:  # not an address at all
            return False


@contextlib.contextmanager
def hang_up_ends(signals):
    """A closed terminal ends the program as SIGTERM does. signals: a medseg.signals.Signals."""
    signum = getattr(signal, "SIGHUP", None)  # Windows has none
    if signum is None or signal.getsignal(signum) == signal.SIG_IGN:  # which nohup sets
        yield
        return
    before = signal.signal(signum, signals.receive)
    try:
        yield
    finally:
        signal.signal(signum, before)


@contextlib.contextmanager
def temporary_folder(prefix):
    """A folder that is removed in the end, also where threads still write to it."""
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    try:
        yield folder
    finally:
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # a second Ctrl-C must leave nothing behind
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), signal.SIG_IGN)
        for _ in range(100):
            shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():
                break


def run(app, listening, host):
    """Serve an ASGI application until a signal handler raises. Prints the address."""
    import uvicorn

    config = uvicorn.Config(SameOrigin(app, host), log_level="error", ws="none", lifespan="on")
    server = uvicorn.Server(config)
    # In a thread, where it leaves signals alone: its own way out waits for every prediction.
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    while thread.is_alive() and not server.started:
        thread.join(0.05)
    if thread.is_alive():
        print(f"open {url(listening, host)} in a browser; Ctrl-C ends it", flush=True)
    if not is_loopback(host):
        print(f"every computer that can reach {host} can use the page", flush=True)
    while thread.is_alive():
        thread.join(0.5)  # Windows notices Ctrl-C only between two of these
    raise RuntimeError("the server of the page ended by itself")
