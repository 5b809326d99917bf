"""Small public sets in the very files that their authors publish, and a server to fetch from."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gzip
import hashlib
import http.server
import io
import pathlib
import tarfile
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import scipy.io

from pipar_jax.data.published import SETS, File, Published


class Known(NamedTuple):
    """Images and labels of a split, in the order in which they are published."""

    images: np.ndarray
    labels: np.ndarray


def samples(source: str) -> dict[str, Known]:
    """Random samples of a set; CIFAR-10's training part is divisible by its five files."""
    draw = np.random.default_rng(len(source))
    shape = (28, 28, 1) if source == "mnist" else (32, 32, 3)
    sizes = {"train": 20 if source == "cifar10" else 11, "test": 4}
    return {
        part: Known(
            draw.integers(0, 256, (count, *shape), np.uint8),
            draw.integers(0, SETS[source].classes, count, np.uint8),
        )
        for part, count in sizes.items()
    }


def files(source: str) -> dict[str, bytes]:
    """The files that hold these samples, as they are before they are packed."""
    one, known = SETS[source], samples(source)
    made = {}
    for part, names in (("train", one.train), ("test", one.test)):
        images, labels = known[part]
        if source == "mnist":
            made[names[0]] = idx(images[..., 0])
            made[names[1]] = idx(labels)
        elif source == "svhn_cropped":
            made[names[0]] = mat(np.moveaxis(images, 0, 3), np.where(labels == 0, 10, labels))
        else:
            for name, some in zip(names, np.array_split(np.arange(len(labels)), len(names)),
                                  strict=True):  # fmt: skip
                made[name] = records(images[some], labels[some], coarse=source == "cifar100")
    return made


def records(images: np.ndarray, labels: np.ndarray, *, coarse: bool) -> bytes:
    """CIFAR's records: a label (coarse and fine), then red, green and blue."""
    planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    heads = [labels[:, None] // 5, labels[:, None]] if coarse else [labels[:, None]]
    return np.concatenate([*heads, planes], axis=1).astype(np.uint8).tobytes()


def idx(array: np.ndarray) -> bytes:
    """An idx file of bytes."""
    head = bytes((0, 0, 8, array.ndim)) + np.asarray(array.shape, ">u4").tobytes()
    return head + array.astype(np.uint8).tobytes()


def mat(images: np.ndarray, labels: np.ndarray, **more: Any) -> bytes:
    """A compressed MATLAB file."""
    file = io.BytesIO()
    scipy.io.savemat(file, {"X": images, "y": labels[:, None], **more}, do_compression=True)
    return file.getvalue()


def packed(members: dict[str, bytes], mode: str = "w:gz") -> bytes:
    """A tar archive."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def archive(source: str, content: dict[str, bytes] | None = None, mode: str = "w:gz") -> bytes:
    """A CIFAR archive as it is published."""
    inside = files(source) if content is None else content
    folder = SETS[source].folder
    return packed({f"{folder}/readme.html": b"text", **{
        f"{folder}/{name}": data for name, data in inside.items()
    }}, mode)  # fmt: skip


def published(source: str) -> dict[str, bytes]:
    """The files that are fetched, by name."""
    one = SETS[source]
    if one.folder:
        return {one.files[0].name: archive(source)}
    made = files(source)
    if source == "mnist":
        return {f"{name}.gz": gzip.compress(data) for name, data in made.items()}
    return made


def put(folder: pathlib.Path, content: dict[str, bytes]) -> None:
    """Writes files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in content.items():
        (folder / name).write_bytes(data)


def moved(source: str, url: str, content: dict[str, bytes]) -> Published:
    """A set whose files are those of ``content``, at another address."""
    made = tuple(
        File(name, f"{url}/{name}", len(data), hashlib.sha256(data).hexdigest())
        for name, data in content.items()
    )
    return dataclasses.replace(SETS[source], files=made)


class Site:
    """A web server on the loopback interface.

    Attributes:
      content: What it serves by name; an int is a status, a callable writes the answer itself.
      asked: Names that were asked for.
    """

    def __init__(self) -> None:
        self.content: dict[str, Any] = {}
        self.asked: list[str] = []
        self.released = threading.Event()
        handler = functools.partial(_Handler, site=self)
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    @contextlib.contextmanager
    def serving(self) -> Iterator[Site]:
        """Serves until its body ends."""
        thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield self
        finally:
            self.released.set()
            self.server.shutdown()
            thread.join()
            self.server.server_close()  # waits for the threads of requests


class _Handler(http.server.BaseHTTPRequestHandler):
    def __init__(self, *arguments: Any, site: Site) -> None:
        self.site = site
        super().__init__(*arguments)

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        self.site.asked.append(name)
        answer = self.site.content.get(name, 404)
        if isinstance(answer, int):
            self.send_error(answer)
            return
        self.send_response(200)
        if callable(answer):
            answer(self)
            return
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # whoever has had enough hangs up
            self.wfile.write(answer)

    def log_message(self, *_: Any) -> None:
        pass
