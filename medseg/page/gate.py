"""What one browser may ask of the page: its own uploads and predictions, and the examples.

gradio answers everyone who knows the name of a file or of a session. Here each browser gets a
cookie, which names a folder of its own. Only the requests that the page itself makes are passed on
to gradio, with files of that folder and sessions of that browser.
"""

import asyncio
import json
import re
import secrets
import shutil
from pathlib import Path
from urllib.parse import parse_qs

from medseg.page.upload import Upload

SHARED = "shared"  # no name that a cookie gives
MAX_UPLOAD = 2 * 1024**3  # bytes of a request with files
MAX_BODY = 4 * 1024**2  # of any other
KEPT = 24 * 3600  # seconds that an upload stays
WAITING, INTERVAL = 3, 0.1  # seconds for an upload to begin, and between two reports on it
COOKIE = re.compile(r"(?:^|;\s*)medseg-browser=([0-9a-f]{32})\s*(?:;|$)")
TAB = re.compile(r"[A-Za-z0-9_-]{1,64}")  # what a tab calls its session
PUBLIC = re.compile(r"/|/config|/theme\.css|/favicon\.ico|/(assets|static)/.+")


class Refused(Exception):
    """A request that gets an HTTP status and a line."""

    def __init__(self, status, line):
        super().__init__(line)
        self.status = status


class Disconnected(Exception):
    """The browser hung up."""


def browser_folder(folder, session):
    """The folder, in that of all browsers, of the browser that a session is of."""
    return Path(folder) / session[:32]


class Gate:
    """An ASGI application in front of gradio's.

    folder: that of all browsers, the absolute path GRADIO_TEMP_DIR. Every browser may read what is
    in `folder` / SHARED.
    """

    def __init__(self, app, folder):
        self._app, self._folder = app, Path(folder)
        self._uploads = {}  # {(browser, what it calls the upload): Upload}

    async def __call__(self, scope, receive, send):
        try:
            if scope["type"] == "http":
                await self._answer(scope, receive, send)
            else:
                await self._app(scope, receive, send)
        except Refused as refusal:
            await respond(send, refusal.status, "text/plain", str(refusal).encode())
        except Disconnected:
            pass  # there is nobody to tell

    async def _answer(self, scope, receive, send):
        browser, path = browser_of(scope), scope["path"]
        reads = scope["method"] in ("GET", "HEAD")
        query = parse_qs(scope["query_string"].decode("latin-1"))
        if reads and PUBLIC.fullmatch(path):
            if path == "/" and browser is None:
                send = with_cookie(send)
            await self._app({**scope, "query_string": b""}, receive, send)
            return
        api, name = path.startswith("/gradio_api/"), path.removeprefix("/gradio_api/")
        upload = (browser, query.get("upload_id", [""])[0])
        if api and browser is None:
            raise Refused(403, "no cookie of the page: open the page first")
        elif api and reads and name.startswith("file="):
            self._check_file(browser, name.removeprefix("file="))
            await self._app({**scope, "query_string": b""}, receive, send)
        elif api and reads and name == "queue/data":
            tab = own_session(browser, query.get("session_hash", [None])[0])
            given = f"session_hash={tab}".encode()
            await self._app({**scope, "query_string": given}, receive, send)
        elif api and reads and name.startswith("heartbeat/"):
            tab = own_session(browser, name.removeprefix("heartbeat/"))
            path = f"/gradio_api/heartbeat/{tab}"
            await self._app({**scope, "path": path, "raw_path": path.encode()}, receive, send)
        elif api and scope["method"] == "POST" and name == "queue/join":
            event = await self._own_event(browser, scope, receive)
            await self._app(scope, replay(event, receive), send)
        elif api and scope["method"] == "POST" and name == "upload":
            paths = await self._receive_files(upload, scope, receive)
            await respond(send, 200, "application/json", json.dumps(paths).encode())
        elif api and reads and name == "upload_progress":
            await self._report_progress(upload, send)
        else:
            raise Refused(404, "the page has no such part")

    def _check_file(self, browser, path):
        """Refused unless `path` names a file of this browser, or a shared one.

        Nothing is looked up, so that the answer does not tell whether a file exists.
        """
        parts = Path(path).parts if isinstance(path, str) and "\0" not in path else ()
        allowed = [(self._folder / name).parts for name in (browser, SHARED)]
        if ".." in parts or parts[: len(allowed[0])] not in allowed:
            raise Refused(403, "not a file that this browser uploaded")

    async def _own_event(self, browser, scope, receive):
        """The bytes of an event for gradio: of the browser's own session and files."""
        body = b"".join([part async for part in read_body(scope, receive, MAX_BODY)])
        try:
            event = json.loads(body)
        except (ValueError, RecursionError):
            event = None
        if not isinstance(event, dict):
            raise Refused(400, "not an event")
        for path in named_paths(event):
            self._check_file(browser, path)
        own = {key: event.get(key) for key in ("data", "fn_index", "trigger_id", "event_data")}
        own["session_hash"] = own_session(browser, event.get("session_hash"))
        return json.dumps(own).encode()

    async def _receive_files(self, key, scope, receive):
        """Write the files of an upload; return their paths. Nothing is left of a part of one."""
        folder = browser_folder(self._folder, key[0]) / f"upload-{secrets.token_hex(8)}"
        upload = self._uploads[key] = Upload(folder)
        loop, kept = asyncio.get_running_loop(), 0
        try:
            parser = upload.parser(dict(scope["headers"]).get(b"content-type", b""))
            async for part in read_body(scope, receive, MAX_UPLOAD):
                await asyncio.to_thread(parser.write, part)  # disks may be slow
            upload.check_complete()
            kept = KEPT
        except OSError as error:
            raise Refused(507, f"the upload cannot be stored: {error.strerror}") from None
        except ValueError as error:
            raise Refused(400, f"not an upload: {error}") from None
        finally:
            upload.end()
            loop.call_later(kept, shutil.rmtree, folder, True)
            loop.call_later(WAITING, self._uploads.pop, key, None)
        return [str(path) for path in upload.paths]

    async def _report_progress(self, key, send):
        """Server-sent events, as the page expects them, on an upload of this browser."""
        for _ in range(round(WAITING / INTERVAL)):
            if key in self._uploads:
                break
            await asyncio.sleep(INTERVAL)
        else:
            raise Refused(404, "no such upload")
        upload, done = self._uploads[key], False
        await start_response(send, 200, "text/event-stream")
        while not done:
            done = upload.done
            messages = [
                {"msg": "update", "orig_name": name, "chunk_size": size}
                for name, size in upload.take_sizes().items()
            ]
            if done:
                messages.append({"msg": "done"})
            lines = "".join(f"data: {json.dumps(message)}\n\n" for message in messages)
            body = {"type": "http.response.body", "body": lines.encode(), "more_body": not done}
            await send(body)
            await asyncio.sleep(INTERVAL)


def browser_of(scope):
    """The name that the cookie of a request gives to its browser, or None."""
    found = COOKIE.search(dict(scope["headers"]).get(b"cookie", b"").decode("latin-1"))
    return found and found[1]


def with_cookie(send):
    """`send`, which also gives the browser its cookie."""
    cookie = f"medseg-browser={secrets.token_hex(16)}; Path=/; HttpOnly; SameSite=Lax".encode()

    async def send_cookie(message):
        if message["type"] == "http.response.start":
            headers = [*message.get("headers", ()), (b"set-cookie", cookie)]
            message = {**message, "headers": headers}
        await send(message)

    return send_cookie


def own_session(browser, tab):
    """The name of a session for gradio: no other browser can name it."""
    if not isinstance(tab, str) or not TAB.fullmatch(tab):
        raise Refused(400, "no session")
    return f"{browser}{tab}"


def named_paths(event):
    """Every value of the key "path" in an event, at any depth."""
    pending = [event]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            if "path" in value:
                yield value["path"]
            pending += value.values()
        elif isinstance(value, list):
            pending += value


async def read_body(scope, receive, limit):
    """Yield the parts of a body. Refused where it says to have more than `limit` bytes, or has."""
    too_long = Refused(413, f"more than {limit} bytes")
    length = dict(scope["headers"]).get(b"content-length", b"0")
    if len(length) > 18 or not length.isdigit() or int(length) > limit:
        raise too_long
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Disconnected
        part, more = message.get("body", b""), message.get("more_body", False)
        size += len(part)
        if size > limit:
            raise too_long
        yield part


def replay(body, receive):
    """A `receive` that has `body` first."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_it():
        return messages.pop() if messages else await receive()

    return receive_it


async def start_response(send, status, media_type):
    """Begin a response. What was not read of the request is not waited for: the connection ends."""
    headers = [(b"content-type", media_type.encode()), (b"cache-control", b"no-store")]
    if status >= 400:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})


async def respond(send, status, media_type, body):
    await start_response(send, status, media_type)
    await send({"type": "http.response.body", "body": body})
