"""Published data sets: files, addresses, checksums and metadata.

Sizes and SHA-256 sums are those of TensorFlow Datasets for the same addresses; the sum of
CIFAR-10's archive agrees with the MD5 sum on its page.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class File:
    """One published file.

    Attributes:
      name: File name.
      url: Address of the file.
      nbytes: Size in bytes.
      sha256: Checksum in hexadecimal.
    """

    name: str
    url: str
    nbytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Published:
    """A public data set.

    Attributes:
      classes: Number of classes.
      mean: Mean per channel of the training images scaled to [0, 1].
      std: Standard deviation per channel of the training images scaled to [0, 1].
      files: The published files that are read.
      train: Files with training samples, in order; inside an archive or extracted.
      test: Files with test samples.
      folder: Folder of these in an archive; empty without one.
      most: Maximum numbers of samples in ``train`` and ``test``, divided equally among their files.
      not_read: Another form of the set that is not read because it is a pickle.
    """

    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    files: tuple[File, ...]
    train: tuple[str, ...]
    test: tuple[str, ...]
    most: tuple[int, int]
    folder: str = ""
    not_read: str = ""


_CIFAR = "https://www.cs.toronto.edu/~kriz/"
_MNIST = "https://storage.googleapis.com/cvdf-datasets/mnist/"
_SVHN = "http://ufldl.stanford.edu/housenumbers/"

SETS: dict[str, Published] = {
    "mnist": Published(
        classes=10,
        mean=(0.1307,),
        std=(0.3081,),
        files=tuple(
            File(name, _MNIST + name, nbytes, sha256)
            for name, nbytes, sha256 in (
                ("train-images-idx3-ubyte.gz", 9912422,
                 "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
                ("train-labels-idx1-ubyte.gz", 28881,
                 "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
                ("t10k-images-idx3-ubyte.gz", 1648877,
                 "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
                ("t10k-labels-idx1-ubyte.gz", 4542,
                 "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
            )
        ),
        train=("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
        test=("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
        most=(60_000, 10_000),
    ),
    "cifar10": Published(
        classes=10,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        files=(
            File("cifar-10-binary.tar.gz", _CIFAR + "cifar-10-binary.tar.gz", 170052171,
                 "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"),
        ),
        train=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        test=("test_batch.bin",),
        most=(10_000, 10_000),
        folder="cifar-10-batches-bin",
        not_read="cifar-10-python.tar.gz",
    ),
    "cifar100": Published(
        classes=100,
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        files=(
            File("cifar-100-binary.tar.gz", _CIFAR + "cifar-100-binary.tar.gz", 168513733,
                 "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec"),
        ),
        train=("train.bin",),
        test=("test.bin",),
        most=(50_000, 10_000),
        folder="cifar-100-binary",
        not_read="cifar-100-python.tar.gz",
    ),
    "svhn_cropped": Published(
        classes=10,
        mean=(0.4377, 0.4438, 0.4728),
        std=(0.1980, 0.2010, 0.1970),
        files=(
            File("train_32x32.mat", _SVHN + "train_32x32.mat", 182040794,
                 "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8"),
            File("test_32x32.mat", _SVHN + "test_32x32.mat", 64275384,
                 "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b"),
        ),
        train=("train_32x32.mat",),
        test=("test_32x32.mat",),
        most=(73_257, 26_032),
    ),
}  # fmt: skip

#: Digits of scikit-learn, which come with it: nothing is published or fetched.
DIGITS = "digits"
#: Names of all public sets.
PUBLIC_SOURCES = (DIGITS, *SETS)
_DIGITS_SAMPLES = 1438


def training_samples(source: str, wanted: int) -> int:
    """Returns the training samples of a public set, of which a run may want fewer (0: all)."""
    count = _DIGITS_SAMPLES if source == DIGITS else SETS[source].most[0]
    return min(count, wanted) if wanted else count
