"""Sources: digits, prepared TFDS sets without TensorFlow, the cache, and own data."""

from __future__ import annotations

import multiprocessing
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest

from pipar_jax import data
from pipar_jax.config import Config, DataConfig
from pipar_jax.data import public
from pipar_jax.data.own import load_own, stored_samples
from pipar_jax.errors import DataError
from pipar_jax.methods.resolution import resolve
from stages.signature import ArrayType, Signature
from stages.tasks.targets import ClassTargets
from tests.patience import PROCESS_S

PREPARED = pathlib.Path(__file__).parents[4] / "shared" / "data" / "tfds"
needs_prepared = pytest.mark.skipif(
    not PREPARED.is_dir(), reason="no prepared MNIST and CIFAR-10 in ../shared/data/tfds"
)


@pytest.fixture
def config(tmp_path: pathlib.Path) -> Config:
    made = Config()
    made.data.cache_dir = str(tmp_path / "cache")
    made.data.data_dir = str(tmp_path / "tfds")
    return resolve(made)


def test_digits_are_split_dealt_and_normalised(config: Config) -> None:
    config.devices.count = 3
    shards = [data.load_device(config, index) for index in range(3)]
    server = data.load_server(config)
    assert sum(len(shard.train) for shard in shards) == 1438
    assert len(server.test) == 359 and not len(server.train) and not len(shards[0].test)
    assert server.input_shape == (8, 8, 1) and server.classes == 10
    everything = np.concatenate([shard.train.x for shard in shards])
    normal = server.normalise(everything)
    assert normal.dtype == np.float32
    assert abs(normal.mean()) < 1e-3 and abs(normal.std() - 1) < 1e-3
    # Shards hold their samples in memory, and only theirs.
    assert not isinstance(shards[0].train.x, np.memmap)
    assert shards[0].train.x.base is None


def test_the_subset_asked_for_is_dealt_and_the_table_counts_it(config: Config) -> None:
    config.data.train_samples, config.data.test_samples = 101, 50
    sizes = [len(data.load_device(config, index).train) for index in range(2)]
    assert sizes == [51, 50]
    assert len(data.load_server(config).test) == 50
    rows = [line.split() for line in data.table(config).splitlines()[1:]]
    assert [int(row[1]) for row in rows] == sizes
    whole = data.load(config.data)
    assert (len(whole.train), len(whole.test)) == (101, 50)


def test_the_second_time_nothing_is_decoded(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = data.load(config.data)
    monkeypatch.setattr("sklearn.datasets.load_digits", lambda: pytest.fail("decoded again"))
    second = data.load(config.data)
    assert isinstance(second.train.x, np.memmap)
    assert np.array_equal(first.train.x, second.train.x)
    assert np.array_equal(first.mean, second.mean)


def _load_in_a_process(cache: str, queue: multiprocessing.Queue) -> None:
    made = Config()
    made.data.cache_dir = cache
    queue.put(int(data.load(made.data).train.labels.sum()))


def test_processes_that_start_together_decode_once_and_agree(tmp_path: pathlib.Path) -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [
        context.Process(target=_load_in_a_process, args=(str(tmp_path), queue)) for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    sums = {queue.get(timeout=PROCESS_S) for _ in workers}
    for worker in workers:
        worker.join()
    queue.close()
    queue.join_thread()
    assert len(sums) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digits-1", "digits-1.lock"]


def test_a_cache_that_cannot_be_written_is_explained(
    config: Config, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "file").write_text("")
    config.data.cache_dir = str(tmp_path / "file")
    with pytest.raises(DataError, match=r"--config\.data\.cache_dir"):
        data.load(config.data)


def test_a_cache_cut_short_is_explained(config: Config) -> None:
    data.load(config.data)
    [images] = pathlib.Path(config.data.cache_dir).glob("*/train_images.npy")
    images.write_bytes(images.read_bytes()[:1000])
    with pytest.raises(DataError, match="delete that folder"):
        data.load(config.data)


@needs_prepared
@pytest.mark.soak
@pytest.mark.parametrize(
    ("source", "shape", "samples"), [("mnist", (28, 28, 1), 60000), ("cifar10", (32, 32, 3), 50000)]
)
def test_the_real_sets_are_read_without_tensorflow(
    config: Config, source: str, shape: tuple[int, int, int], samples: int
) -> None:
    config.data.source, config.data.data_dir = source, str(PREPARED)
    config.devices.count = 4
    shard, server = data.load_device(config, 3), data.load_server(config)
    assert len(shard.train) == samples // 4 and shard.train.x.dtype == np.uint8
    assert server.input_shape == shape and len(server.test) == 10000
    assert np.bincount(server.test.labels).min() > 800
    normal = server.normalise(server.test.x[:4000])
    assert np.abs(normal.mean((0, 1, 2))).max() < 0.1
    assert np.abs(normal.std((0, 1, 2)) - 1).max() < 0.1
    assert "tensorflow" not in sys.modules


class FakeRecords:
    """What tfds.data_source returns, as far as it is used."""

    def __init__(self, samples: int, classes: int) -> None:
        self._images = np.random.default_rng(0).integers(0, 255, (samples, 32, 32, 3), np.uint8)
        self._classes = classes

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, i: int) -> dict[str, object]:
        return {"image": self._images[i], "label": i % self._classes, "coarse_label": 0}


class FakeBatchedRecords(FakeRecords):
    def __getitems__(self, positions: list[int]) -> list[dict[str, object]]:
        return [self[i] for i in positions]


@pytest.mark.parametrize(("source", "classes"), [("svhn_cropped", 10), ("cifar100", 100)])
@pytest.mark.parametrize("records", [FakeRecords, FakeBatchedRecords])
def test_sets_that_tfds_prepared_need_no_tensorflow(
    config: Config,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    classes: int,
    records: type[FakeRecords],
) -> None:
    home = pathlib.Path(config.data.data_dir) / source / "3.0.0"
    home.mkdir(parents=True)
    (home / "dataset_info.json").write_text("{}")
    (home / f"{source}-train.array_record-00000-of-00001").write_bytes(b"")
    asked = []

    def data_source(name: str, *, split: str, data_dir: str, download: bool) -> FakeRecords:
        asked.append((name, split, data_dir, download))
        return records(1201 if split == "train" else 300, classes)

    fake = types.SimpleNamespace(data_source=data_source)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", fake)
    config.data.source = source
    shard, server = data.load_device(config, 0), data.load_server(config)
    assert asked == [(source, part, config.data.data_dir, False) for part in ("train", "test")]
    assert len(shard.train) == 601 and len(server.test) == 300
    assert server.classes == classes and server.input_shape == (32, 32, 3)
    expected = records(300, classes)
    assert np.array_equal(server.test.x[299], expected[299]["image"])
    assert server.test.labels[299] == 299 % classes


def test_the_newest_prepared_version_is_taken(tmp_path: pathlib.Path) -> None:
    for version in ("3.0.2", "3.0.10", "4.0.0"):
        home = tmp_path / "mnist" / version
        home.mkdir(parents=True)
        (home / "dataset_info.json").write_text("{}")
        if version != "4.0.0":  # prepared as tfrecord, which needs TensorFlow to read
            (home / "mnist-train.array_record-00000-of-00001").write_bytes(b"")
    found = public.find_prepared("mnist", tmp_path)
    assert found is not None and found.parent.name == "3.0.10"
    assert public.find_prepared("cifar10", tmp_path) is None


def own(path: pathlib.Path, **changes: object) -> None:
    arrays: dict = {
        "x_train": np.arange(6 * 16, dtype=np.uint8).reshape(6, 4, 4, 1),
        "y_train": np.array([0, 1, 2, 0, 1, 2]),
        "x_test": np.ones((2, 4, 4, 1), np.uint8),
        "y_test": np.array([2, 3]),
        **changes,
    }
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})


def test_each_device_reads_its_own_file_and_the_server_the_test_set(
    config: Config, tmp_path: pathlib.Path
) -> None:
    for index in range(2):
        own(tmp_path / f"{index}.npz", y_train=np.full(6, index), scale=255, classes=5)
    own(tmp_path / "test.npz", x_train=None, y_train=None, classes=5, scale=255)
    config.data.source = f"npz:{tmp_path}/{{device}}.npz"
    config.data.test_source = f"npz:{tmp_path}/test.npz"
    config = resolve(config)
    data.prepare(config)
    for index in range(2):
        shard = data.load_device(config, index)
        assert shard.train.labels.tolist() == [index] * 6
        assert shard.input_shape == (4, 4, 1)
        np.testing.assert_allclose(shard.normalise(shard.train.x).max(), 95 / 255, rtol=1e-6)
    server = data.load_server(config)
    assert server.classes == 5 and server.test.labels.tolist() == [2, 3]
    assert data.table(config) == ""
    # A device that lacks the highest class still builds the model of all.
    config.data.classes = 7
    assert data.load_device(config, 0).classes == data.load_server(config).classes == 7
    (tmp_path / "1.npz").unlink()
    with pytest.raises(DataError, match=r"there is no file .*1\.npz"):
        data.prepare(config)


def test_the_number_of_own_samples_is_known_without_reading_them(tmp_path: pathlib.Path) -> None:
    own(tmp_path / "one.npz")
    np.savez_compressed(tmp_path / "two.npz", x_train=np.zeros((9, 2)), y_train=np.zeros(9))
    np.save(tmp_path / "x_train.npy", np.zeros((7, 3)))
    (tmp_path / "no.npz").write_text("nothing")
    for source, count in (
        (f"npz:{tmp_path}/one.npz", 6), (f"npz:{tmp_path}/two.npz", 9), (f"npy:{tmp_path}", 7),
        (f"npz:{tmp_path}/no.npz", None), ("npz:missing.npz", None), ("module:a:b", None),
        ("mnist", None),
    ):  # fmt: skip
        assert stored_samples(source) == count


def test_a_function_gives_a_device_its_data(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mine(device: int | None) -> dict[str, object]:
        part = "test" if device is None else "train"
        images = np.full((3, 2, 2, 1), 0.5 if device is None else float(device))
        return {f"x_{part}": images, f"y_{part}": [0, 1, 1], "mean": 0.5, "std": [2.0]}

    module = types.ModuleType("my_data")
    module.mine = mine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_data", module)
    config.data.source = "module:my_data:mine"
    config = resolve(config)
    data.prepare(config)
    shard = data.load_device(config, 1)
    assert shard.train.x.dtype == np.float64
    np.testing.assert_allclose(shard.normalise(shard.train.x), 0.25)
    assert len(data.load_server(config).test) == 3


WRONG = [
    ({"x_train": None}, "has no x_train"),
    ({"x_train": np.ones((5, 4, 4))}, "target y has 6 samples, expected 5 as input x"),
    ({"x_train": np.full((6, 4, 4), np.nan)}, "not finite"),
    ({"x_train": np.full((6, 4, 4), "a")}, "must be numbers"),
    ({"y_train": np.full(6, 0.5)}, "whole numbers"),
    ({"y_train": np.full(6, -1)}, "negative"),
    ({"classes": 2}, "out of range for classes=2"),
    ({"mean": [1.0, 2.0]}, "one for each of 1 channels"),
    ({"std": 0.0}, "above 0"),
    ({"x_train": np.ones((0, 4, 4)), "y_train": np.ones(0, int)}, "no sample"),
]


@pytest.mark.parametrize(("changes", "says"), WRONG, ids=[says for _, says in WRONG])
def test_wrong_own_data_are_refused_in_plain_words(
    config: Config, tmp_path: pathlib.Path, changes: dict, says: str
) -> None:
    own(tmp_path / "own.npz", **changes)
    config.data.source = f"npz:{tmp_path}/own.npz"
    with pytest.raises(DataError, match=says):
        data.load_device(config, 0)


def test_files_that_are_no_npz_and_objects_in_them_are_refused(
    config: Config, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "text.npz").write_text("no zip")
    own(tmp_path / "objects.npz", x_train=np.array([object()] * 6))
    for name in ("text", "objects", "missing"):
        config.data.source = f"npz:{tmp_path}/{name}.npz"
        with pytest.raises(DataError, match="cannot be read"):
            data.load_device(config, 0)


def test_a_module_that_is_not_there_is_named(config: Config) -> None:
    config.data.source = "module:no_such_module:f"
    with pytest.raises(DataError, match="no_such_module"):
        data.load_device(config, 0)


def test_data_that_do_not_fit_the_model_are_refused(config: Config) -> None:
    shard = data.load_device(config, 0)
    data.check_fits(shard, Signature.labelled((8, 8, 1), 10), "d0")
    with pytest.raises(DataError, match=r"d0: input of 'digits' is \(8, 8, 1\)"):
        data.check_fits(shard, Signature.labelled((28, 28, 1), 10), "d0")
    with pytest.raises(DataError, match="has 10 classes"):
        data.check_fits(shard, Signature.labelled((8, 8, 1), 9), "d0")


KINDS = {"bool": "bool", "uint8": "whole", "int8": "whole", "int32": "whole", "int64": "whole",
         "float16": "float", "float32": "float", "float64": "float"}  # fmt: skip


@pytest.mark.parametrize("expected", ["bool", "uint8", "int8", "int32", "float32"])
@pytest.mark.parametrize("stored", KINDS)
def test_numbers_have_to_be_of_the_kind_that_the_model_takes(stored: str, expected: str) -> None:
    """Whatever their width; truth values may become numbers, and numbers no truth values."""
    x = np.ones((3, 4), stored)
    made = data.admit((x, np.zeros(3, np.int64)), "train", "d0", ClassTargets(), 2)
    side = np.ones((3, 2), stored)
    both = data.admit(({"x": x, "s": side}, np.zeros(3, np.int64)), "train", "d0",
                      ClassTargets(), 2)  # fmt: skip
    kind, wanted = KINDS[stored], KINDS[expected]
    model = Signature(ArrayType((4,), expected), {}, {"y": ArrayType((), "int32")}, 2)
    beside = Signature(ArrayType((4,), made.signature().input.dtype),
                       {"s": ArrayType((2,), expected)}, model.targets, 2)  # fmt: skip
    if kind == wanted or (kind, wanted) == ("bool", "float"):
        data.check_fits(made, model, "d0")
    else:
        with pytest.raises(DataError, match=f"is {stored}, but the model expects {expected}"):
            data.check_fits(made, model, "d0")
    if kind == wanted:
        data.check_fits(both, beside, "d0")
    else:
        with pytest.raises(DataError, match="the model takes the side input 's'"):
            data.check_fits(both, beside, "d0")


def test_data_load_no_jax() -> None:
    code = "import sys, pipar_jax.data, pipar_jax.launch.launcher; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_nobody_is_advised_to_unpickle(tmp_path: pathlib.Path) -> None:
    (tmp_path / "text.npz").write_text("a,b\n1,2\n")
    np.savez(tmp_path / "objects.npz", x_train=np.array([{}], object), y_train=[1])
    for name, says in (("text", "not an .npz file"), ("objects", "contains Python objects")):
        with pytest.raises(DataError, match=says) as caught:
            load_own(
                f"npz:{tmp_path / name}.npz", 0, DataConfig(), part="train", rule=ClassTargets()
            )
        assert "pickle" not in str(caught.value)
