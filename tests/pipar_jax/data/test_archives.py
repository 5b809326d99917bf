"""Public sets as published: read whole, in TFDS's order, and never more than they can be."""

from __future__ import annotations

import dataclasses
import gzip
import io
import pathlib
import pickle
import tarfile
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from pipar_jax import data
from pipar_jax.config import DataConfig
from pipar_jax.data import Dataset, archives, download, matlab
from pipar_jax.data.archives import shuffle
from pipar_jax.data.published import SETS
from pipar_jax.errors import DataError
from tests.patience import PATIENCE_S
from tests.pipar_jax.data import fakes

PREPARED = pathlib.Path(__file__).parents[4] / "shared" / "data" / "tfds"


@pytest.fixture
def load(tmp_path: pathlib.Path) -> Callable[..., Dataset]:
    """Loads a set from the folder ``data``, fetching nothing."""

    def made(source: str, **changes: Any) -> Dataset:
        fields = {"data_dir": str(tmp_path / "data"), "download": False, **changes}
        return data.load(DataConfig(source=source, cache_dir=str(tmp_path / "cache"), **fields))

    return made


def _forms(source: str) -> dict[str, dict[str, bytes]]:
    """The forms in which a set may lie in a folder, as files by path."""
    files, one = fakes.files(source), SETS[source]
    made = {"extracted": files, "published": fakes.published(source)}
    if one.folder:
        made["unpacked"] = {one.files[0].name[:-3]: fakes.archive(source, mode="w")}
        made["in its folder"] = {f"{one.folder}/{name}": some for name, some in files.items()}
    if source == "mnist":
        made["dotted"] = {name.replace("-idx", ".idx"): some for name, some in files.items()}
    made["below its name"] = {f"{source}/{name}": some for name, some in made["published"].items()}
    return made


FORMS = [(source, form) for source in SETS for form in _forms(source)]


@pytest.mark.parametrize(("source", "form"), FORMS, ids=[f"{s}, {f}" for s, f in FORMS])
def test_each_set_is_read_from_what_is_published(
    source: str, form: str, tmp_path: pathlib.Path, load: Callable[..., Dataset]
) -> None:
    for name, content in _forms(source)[form].items():
        fakes.put((tmp_path / "data" / name).parent, {pathlib.Path(name).name: content})
    made = load(source)
    for part, split in (("train", made.train), ("test", made.test)):
        known = fakes.samples(source)[part]
        order = shuffle(len(known.labels), part)
        assert np.array_equal(split.x, known.images[order])
        assert np.array_equal(split.labels, known.labels[order])
        assert split.x.dtype == np.uint8 and split.labels.dtype == np.int32
    assert made.classes == SETS[source].classes
    assert np.allclose(made.mean / 255, SETS[source].mean)
    again = load(source)  # from the decoded arrays
    assert isinstance(again.train.x, np.memmap)
    assert np.array_equal(again.train.x, made.train.x)


def test_the_order_is_that_of_tfds() -> None:
    """A few records of the real sets, whose published numbers or first labels are known."""
    if not PREPARED.is_dir():
        pytest.skip("no prepared MNIST and CIFAR-10 in ../shared/data/tfds")
    import tensorflow_datasets as tfds

    for part, count in (("train", 50_000), ("test", 10_000)):
        records = tfds.data_source("cifar10", split=part, data_dir=str(PREPARED), download=False)
        places = [*range(20), count // 2, count - 1]
        numbers = [int(records[i]["id"].decode().rpartition("_")[2]) for i in places]
        assert shuffle(count, part)[places].tolist() == numbers
    first = {"train": [5, 0, 4, 1, 9, 2, 1, 3, 1, 4], "test": [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]}
    for part, labels in first.items():
        records = tfds.data_source("mnist", split=part, data_dir=str(PREPARED), download=False)
        places = np.argsort(shuffle(len(records), part))[:10]
        assert [int(records[int(i)]["label"]) for i in places] == labels


@pytest.mark.soak
def test_cifar_10_of_an_archive_is_that_of_tfds(
    tmp_path: pathlib.Path, load: Callable[..., Dataset]
) -> None:
    if not PREPARED.is_dir():
        pytest.skip("no prepared CIFAR-10 in ../shared/data/tfds")
    prepared = load("cifar10", data_dir=str(PREPARED))
    one, content = SETS["cifar10"], {}
    for names, split, part in (
        (one.train, prepared.train, "train"), (one.test, prepared.test, "test"),
    ):  # fmt: skip
        back = np.argsort(shuffle(len(split), part))
        for name, some in zip(names, np.array_split(back, len(names)), strict=True):
            content[name] = fakes.records(split.x[some], split.labels[some], coarse=False)
    fakes.put(tmp_path / "data", {one.files[0].name: fakes.archive("cifar10", content)})
    made = load("cifar10")
    for ours, theirs in ((made.train, prepared.train), (made.test, prepared.test)):
        assert np.array_equal(ours.x, theirs.x)
        assert np.array_equal(ours.labels, theirs.labels)


# --- what is malformed ----------------------------------------------------------------------------


def _cifar(change: Callable[[dict[str, bytes]], None]) -> dict[str, bytes]:
    content = fakes.files("cifar10")
    change(content)
    return {SETS["cifar10"].files[0].name: fakes.archive("cifar10", content)}


def _tar(*members: tuple[str, bytes, bytes]) -> dict[str, bytes]:
    """An archive of CIFAR-10 with further members: name, type, content."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, kind, content in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return {SETS["cifar10"].files[0].name: file.getvalue()}


def _cut(source: str, name: str, size: int) -> dict[str, bytes]:
    content = fakes.published(source)
    content[name] = content[name][:size]
    return content


def _with(source: str, name: str, some: bytes) -> dict[str, bytes]:
    return {**fakes.published(source), name: some}


def _flipped(some: bytes) -> bytes:
    return some[:-6] + bytes([some[-6] ^ 1]) + some[-5:]  # in gzip's checksum


_IMAGES, _LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"
_CIFAR, _SVHN = "cifar-10-binary.tar.gz", "train_32x32.mat"
_RECORD = bytes(3073)

MALFORMED: dict[str, tuple[str, dict[str, bytes], str]] = {
    "tar cut short": ("cifar10", _cut("cifar10", _CIFAR, 5000), "cannot be read"),
    "tar empty": ("cifar10", {_CIFAR: b""}, "cannot be read"),
    "no tar": ("cifar10", {_CIFAR: b"<html>not found</html>" * 99}, "cannot be read"),
    "no tar inside": ("cifar10", {_CIFAR: gzip.compress(b"text" * 999)}, "cannot be read"),
    "bit flipped": ("cifar10", {_CIFAR: _flipped(fakes.archive("cifar10"))}, "cannot be read"),
    "record cut": (
        "cifar10", _cifar(lambda some: some.update({n: b[:-1] for n, b in some.items()})),
        "expected a multiple of 3073",
    ),
    "file too short": (
        "cifar10", _cifar(lambda some: some.update({"data_batch_2.bin": _RECORD})),
        "files of equal size",
    ),
    "file missing": (
        "cifar10", _cifar(lambda some: some.pop("test_batch.bin") and None), "has no .*test_batch"
    ),
    "no record": (
        "cifar10", _cifar(lambda some: some.update(dict.fromkeys(some, b""))), "no training sample"
    ),
    "label too high": (
        "cifar10", _cifar(lambda some: some.update(dict.fromkeys(some, b"\x0a" + _RECORD[1:]))),
        "label is 10, but cifar10 has classes 0 to 9",
    ),
    "path out": ("cifar10", _tar(("../data_batch_1.bin", b"0", _RECORD)), "leads out of the"),
    "path from the root": ("cifar10", _tar(("/tmp/test_batch.bin", b"0", b"")), "leads out of the"),
    "link": (
        "cifar10", _tar(("cifar-10-batches-bin/test_batch.bin", b"2", b"")), "is not a file, or"
    ),
    "twice": (
        "cifar10", _tar(*2 * [("cifar-10-batches-bin/test_batch.bin", b"0", _RECORD)]), "twice"
    ),
    "fine label too high": (
        "cifar100",
        {SETS["cifar100"].files[0].name: fakes.archive(
            "cifar100", dict.fromkeys(("train.bin", "test.bin"), b"\x00\x64" + _RECORD[1:]))},
        "label is 100",
    ),
    "idx cut short": (
        "mnist", _with("mnist", _IMAGES, gzip.compress(fakes.files("mnist")[_IMAGES[:-3]][:-1])),
        "is truncated: 8623 of 8624",
    ),
    "gzip cut short": ("mnist", _cut("mnist", _IMAGES, 400), "cannot be read"),
    "idx of another type": (
        "mnist", _with("mnist", _IMAGES, fakes.files("mnist")[_LABELS[:-3]]), "is not an idx file"
    ),
    "idx with more": (
        "mnist", _with("mnist", _LABELS, fakes.files("mnist")[_LABELS[:-3]] + b"\x01"), "more than"
    ),
    "idx of other sizes": (
        "mnist", _with("mnist", _IMAGES, fakes.idx(np.zeros((11, 27, 28)))), "28 x 28"
    ),
    "idx of another number": (
        "mnist", _with("mnist", _LABELS, fakes.idx(np.zeros(10))), "as many labels as images"
    ),
    "idx that says too much": (
        "mnist", _with("mnist", _IMAGES, bytes((0, 0, 8, 3)) + b"\xff" * 12), "more than the set"
    ),
    "idx empty": ("mnist", _with("mnist", _IMAGES, b""), "is not an idx file"),
    "no mat": ("svhn_cropped", _with("svhn_cropped", _SVHN, b"no" * 99), "is not a MATLAB file"),
    "mat of version 7.3": (
        "svhn_cropped",
        _with("svhn_cropped", _SVHN, bytes(124) + b"\x00\x02IM" + b"\x89HDF\r\n"),
        "is not a MATLAB file of version 5",
    ),
    "mat cut short": ("svhn_cropped", _cut("svhn_cropped", _SVHN, 3000), "is truncated"),
    "mat broken": (
        "svhn_cropped",
        _with("svhn_cropped", _SVHN, fakes.published("svhn_cropped")[_SVHN][:136]
              + bytes(len(fakes.published("svhn_cropped")[_SVHN]) - 136)),
        "cannot be read|truncated|X must be",
    ),
    "mat without images": (
        "svhn_cropped", _with("svhn_cropped", _SVHN, fakes.mat(np.zeros(3), np.zeros(3))), "X must"
    ),
    "mat of floats": (
        "svhn_cropped",
        _with("svhn_cropped", _SVHN, fakes.mat(np.zeros((32, 32, 3, 2)), np.zeros(2))),
        "X must be .* uint8, got",
    ),
    "mat of another number": (
        "svhn_cropped",
        _with("svhn_cropped", _SVHN, fakes.mat(np.zeros((32, 32, 3, 2), np.uint8), np.ones(3))),
        "a label for each of 2 images",
    ),
    "mat with label 11": (
        "svhn_cropped",
        _with("svhn_cropped", _SVHN, fakes.mat(np.zeros((32, 32, 3, 2), np.uint8), np.full(2, 11))),
        "from 1 to 10",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_what_is_malformed_is_one_clear_line(
    case: str, tmp_path: pathlib.Path, load: Callable[..., Dataset]
) -> None:
    source, content, says = MALFORMED[case]
    fakes.put(tmp_path / "data", content)
    with pytest.raises(DataError, match=says) as caught:
        load(source)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "data") in str(caught.value)
    kept = [path.name for path in (tmp_path / "cache").iterdir()]
    assert all(name.endswith(".lock") for name in kept)


_ZEROS_BYTES = 40 << 20


def _lying_variable() -> bytes:
    whole = fakes.mat(np.zeros((32, 32, 3, 2), np.uint8), np.ones(2))
    tag = zlib.compress(np.asarray([14, _ZEROS_BYTES], "<u4").tobytes() + bytes(_ZEROS_BYTES))
    return whole[:128] + np.asarray([15, len(tag)], "<u4").tobytes() + tag


#: What is small and would unpack to much: the set, and what makes the file.
BOMBS: dict[str, tuple[str, Callable[[bytes], dict[str, bytes]]]] = {
    "a wanted file": (
        "cifar10", lambda zeros: _tar(("cifar-10-batches-bin/data_batch_1.bin", b"0", zeros))
    ),
    "another file": ("cifar10", lambda zeros: _tar(("more", b"0", zeros), ("last", b"0", b""))),
    "a header": ("cifar10", lambda zeros: _tar(("././@PaxHeader", b"x", zeros))),
    "a name": ("cifar10", lambda zeros: _tar(("././@LongLink", b"L", zeros))),
    "the end": ("cifar10", lambda zeros: {
        _CIFAR: gzip.compress(fakes.archive("cifar10", mode="w") + zeros)
    }),
    "an idx": ("mnist", lambda zeros: _with(
        "mnist", _LABELS, gzip.compress(fakes.idx(np.zeros(11)) + zeros)
    )),
    "a variable": ("svhn_cropped", lambda zeros: _with("svhn_cropped", _SVHN, fakes.mat(
        np.zeros((32, 32, 3, 2), np.uint8), np.ones(2), Z=np.frombuffer(zeros, np.uint8)
    ))),
    "a variable that lies": (
        "svhn_cropped", lambda zeros: _with("svhn_cropped", _SVHN, _lying_variable())
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BOMBS)
def test_a_small_file_that_unpacks_to_much_is_refused_in_little_memory(
    case: str,
    tmp_path: pathlib.Path,
    load: Callable[..., Dataset],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, make = BOMBS[case]
    # A set of 20 samples stands for one of 60,000, and 40 MB for more than memory holds.
    monkeypatch.setitem(SETS, source, dataclasses.replace(SETS[source], most=(20, 20)))
    fakes.put(tmp_path / "data", make(bytes(_ZEROS_BYTES)))
    import scipy.io  # noqa: F401 (not what is measured)

    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="more than"):
            load(source)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_pickles_are_not_read_and_told_of(
    tmp_path: pathlib.Path, load: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, lambda *_, **__: pytest.fail("unpickled"))
    name = SETS["cifar10"].not_read
    fakes.put(tmp_path / "data", {name: fakes.packed({"cifar-10-batches-py/test_batch": b"\x80"})})
    with pytest.raises(DataError, match=rf"{name} is a pickle, which is never read"):
        load("cifar10")


@pytest.mark.parametrize("source", SETS)
def test_what_is_not_there_says_what_to_put_where(
    source: str, tmp_path: pathlib.Path, load: Callable[..., Dataset]
) -> None:
    with pytest.raises(DataError) as caught:
        load(source)
    text = str(caught.value)
    assert str(tmp_path / "data") in text and "data.data_dir" in text
    assert all(file.name in text for file in SETS[source].files)
    assert SETS[source].files[0].url.rpartition("/")[0] in text


def test_a_file_as_data_dir_is_refused(
    tmp_path: pathlib.Path, load: Callable[..., Dataset]
) -> None:
    (tmp_path / "data").write_text("a file")
    with pytest.raises(DataError, match="is not a folder: give its folder"):
        load("mnist")


# --- fetching -------------------------------------------------------------------------------------


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[fakes.Site]:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download, "TIMEOUT_S", PATIENCE_S)
    with fakes.Site().serving() as served:
        yield served


@pytest.mark.parametrize("source", SETS)
@pytest.mark.parametrize("given", [True, False], ids=["data_dir", "cache"])
def test_a_set_that_is_nowhere_is_fetched_once(
    source: str, given: bool, site: fakes.Site, tmp_path: pathlib.Path,
    load: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "nowhere"))
    site.content = dict(fakes.published(source))
    monkeypatch.setitem(SETS, source, fakes.moved(source, site.url, site.content))
    folder = tmp_path / "data" if given else tmp_path / "cache" / "published"
    changes = {"download": True, "data_dir": str(folder) if given else ""}
    for _ in range(2):
        made = load(source, **changes)
        known = fakes.samples(source)["train"]
        assert np.array_equal(made.train.x, known.images[shuffle(len(known.labels), "train")])
    assert site.asked == [file.name for file in SETS[source].files]
    assert {path.name for path in folder.iterdir()} == set(site.content)


def _stalls(handler: Any) -> None:
    handler.send_header("Content-Length", "9999")
    handler.end_headers()
    handler.wfile.write(b"begun")
    handler.site.released.wait(30)


def _hangs_up(handler: Any) -> None:
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b"ffff\r\nbegun")


_WHOLE = fakes.published("cifar10")[_CIFAR]
BROKEN: dict[str, tuple[Any, str]] = {
    "changed": (_WHOLE[:-1] + bytes([_WHOLE[-1] ^ 1]), "returned a file with SHA-256"),
    "short": (_WHOLE[:-1], r"returned \d+ of the \d+ published bytes"),
    "long": (_WHOLE + b"x", r"returned more than the \d+ published bytes"),
    "empty": (b"", "returned 0 of the"),
    "not found": (404, "the server responded 404"),
    "out of order": (503, "the server responded 503"),
    "silent": (_stalls, "timed out"),
    "hung up": (_hangs_up, "IncompleteRead"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_not_fetched_whole_and_right_leaves_nothing_and_one_line(
    case: str, site: fakes.Site, tmp_path: pathlib.Path, load: Callable[..., Dataset],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(download, "TIMEOUT_S", 0.3 if case == "silent" else PATIENCE_S)
    monkeypatch.setitem(SETS, "cifar10", fakes.moved("cifar10", site.url, {_CIFAR: _WHOLE}))
    answer, says = BROKEN[case]
    site.content = {_CIFAR: answer}
    with pytest.raises(DataError, match=says) as caught:
        load("cifar10", download=True)
    text = str(caught.value)
    assert "\n" not in text and f"{site.url}/{_CIFAR}" in text and "data.data_dir" in text
    assert not list((tmp_path / "data").glob("*"))
    site.content = {_CIFAR: _WHOLE}
    monkeypatch.setattr(download, "TIMEOUT_S", PATIENCE_S)
    assert len(load("cifar10", download=True).train) == 20  # nothing is in the way of another try


def test_without_a_network_one_line_says_what_to_do(
    tmp_path: pathlib.Path, load: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "*")
    site = fakes.Site()
    site.server.server_close()  # its port refuses now
    monkeypatch.setitem(SETS, "mnist", fakes.moved("mnist", site.url, fakes.published("mnist")))
    with pytest.raises(
        DataError, match=r"cannot be downloaded .* Connection refused; download train-"
    ):
        load("mnist", download=True)


def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: pathlib.Path, load: Callable[..., Dataset], site: fakes.Site,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "file").write_text("")
    site.content = dict(fakes.published("mnist"))
    monkeypatch.setitem(SETS, "mnist", fakes.moved("mnist", site.url, site.content))
    with pytest.raises(DataError, match=r"cannot be downloaded into .*file/data: Not a directory"):
        load("mnist", download=True, data_dir=str(tmp_path / "file" / "data"))


def test_the_published_table_is_whole() -> None:
    for one in SETS.values():
        assert len(one.mean) == len(one.std) and len(one.most) == 2
        for file in one.files:
            assert len(bytes.fromhex(file.sha256)) == 32 and file.nbytes > 0
            assert file.url.endswith(f"/{file.name}")
    assert archives.SETS is SETS and matlab.SHAPE == (32, 32, 3)
