"""The files that a browser sends, written as they come. python-multipart comes with gradio."""

import re
from collections import Counter
from pathlib import Path, PurePosixPath

MAX_FILES, MAX_NAME = 1000, 200  # of an upload, and bytes of a name
FORBIDDEN = re.compile(r'[\x00-\x1f\x7f<>:"|?*]')  # in names of files


class Upload:
    """The files of a multipart/form-data body (RFC 7578), written to a folder as they come.

    paths: of the files. done: whether it is over, received or not. ValueError is raised where the
    body is no such one, or has something else than files.
    """

    def __init__(self, folder):
        self.paths, self.done = [], False
        self._folder, self._file, self._name, self._sizes = Path(folder), None, "", Counter()
        self._field, self._value, self._headers = b"", b"", {}

    def parser(self, content_type):
        """What the body is to be written to."""
        from python_multipart import MultipartParser

        media_type, options = parse_header(content_type)
        if media_type != b"multipart/form-data" or not options.get(b"boundary"):
            raise ValueError("it is no multipart/form-data")
        names = ("header_field", "header_value", "header_end", "headers_finished")
        names += ("part_data", "part_end")
        calls = {f"on_{name}": getattr(self, f"_on_{name}") for name in names}
        return MultipartParser(options[b"boundary"], calls)

    def check_complete(self):
        if self._file or not self.paths:
            raise ValueError("it is cut, or has no file")

    def end(self):
        self.done = True
        if self._file:  # a part of one
            self._file.close()

    def take_sizes(self):
        """{name of a file: bytes that came since the last call}"""
        sizes, self._sizes = self._sizes, Counter()
        return sizes

    def _on_header_field(self, data, start, end):
        self._field += data[start:end]

    def _on_header_value(self, data, start, end):
        self._value += data[start:end]

    def _on_header_end(self):
        self._headers[self._field.lower()] = self._value
        self._field = self._value = b""

    def _on_headers_finished(self):
        disposition, self._headers = self._headers.get(b"content-disposition", b""), {}
        name = parse_header(disposition)[1].get(b"filename")
        if name is None or len(self.paths) == MAX_FILES:
            raise ValueError(f"it has something else than files, or more than {MAX_FILES}")
        self._name = name.decode("utf-8", "replace")
        folder = self._folder / str(len(self.paths))
        folder.mkdir(parents=True)
        self.paths.append(folder / clean_name(self._name))
        self._file = open(self.paths[-1], "xb")  # noqa: SIM115  it is closed with its part

    def _on_part_data(self, data, start, end):
        self._file.write(data[start:end])
        self._sizes[self._name] += end - start

    def _on_part_end(self):
        self._file.close()
        self._file = None


def parse_header(text):
    """b'form-data; name="files"' -> (b'form-data', {b'name': b'files'})"""
    from python_multipart.multipart import parse_options_header

    return parse_options_header(text)


def clean_name(name):
    """A name that any file system takes, for what a browser calls a file; the ending stays."""
    name = FORBIDDEN.sub("", PurePosixPath(name.replace("\\", "/")).name).strip(" .")
    stem, dot, ending = name.rpartition(".")
    room = MAX_NAME - len((dot + ending).encode())
    if not dot or room < 1:
        return name.encode()[:MAX_NAME].decode(errors="ignore") or "file"
    return (stem.encode()[:room].decode(errors="ignore") or "file") + dot + ending
