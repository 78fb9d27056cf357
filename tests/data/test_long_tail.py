"""The exponential profile of a long-tailed training set, out of any benchmark."""

from collections import Counter

import pytest

from pipelines.config import UserError
from pipelines.data.benchmark_config import BenchmarkConfig
from pipelines.data.benchmarks import open_benchmark
from pipelines.data.long_tail import largest, profile

CLASSES = ("ant", "bee", "cat")
IMAGES = {"ant": 90, "bee": 60, "cat": 40}


@pytest.fixture
def benchmark(tmp_path):
    for name, count in IMAGES.items():
        for domain in ("photo", "sketch"):
            folder = tmp_path / domain / name
            folder.mkdir(parents=True)
            for number in range(count // 2):
                (folder / f"{number:02d}.jpg").touch()
    sources = {d: {"kind": "folder", "root": str(tmp_path / d), "domain": d} for d in ("photo",)}
    other = {"kind": "folder", "root": str(tmp_path / "sketch"), "domain": "sketch"}
    both = ["photo", "sketch"]
    return BenchmarkConfig.model_validate(
        {
            "name": "toy",
            "class_names": list(CLASSES),
            "sources": {**sources, "sketch": other},
            "sets": {
                "train": {"source": both, "fraction": [0, 0.7]},
                "test": {"source": both, "fraction": [0.7, 1]},
            },
        }
    )


def counts(opened):
    found = Counter(opened.sets["train"].labels)
    return [found[label] for label in range(len(CLASSES))]


def test_the_published_profile_of_cifar():
    # The public code: int(5000 x 0.01^(i / 9)), CIFAR-10 of Choi 2023.
    expected = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert profile(10, 5000, 0.01) == expected


def test_rounding_down_leaves_an_image_and_whole_numbers_alone():
    assert profile(3, 40, 0.0001)[-1] == 1
    assert profile(3, 300, 0.01) == [300, 30, 3]


def test_without_shots_the_profile_is_the_largest_that_the_classes_have():
    available = [90, 60, 40]
    n_max = largest(available, 0.25)
    taken = profile(3, n_max, 0.25)
    assert taken == [90, 45, 22]
    assert all(n <= have for n, have in zip(taken, available, strict=True))
    # A scarce first class bounds the whole.
    assert profile(3, largest([10, 60, 40], 0.25), 0.25) == [10, 5, 2]


def test_a_benchmark_keeps_the_profile_and_the_same_images_for_ever(benchmark):
    whole = open_benchmark(benchmark)
    tail = open_benchmark(benchmark, imbalance=0.1, shots=20)
    assert counts(tail) == [20, 6, 2]
    assert tail.address != whole.address
    assert open_benchmark(benchmark, imbalance=0.1, shots=20).sets == tail.sets
    # A shorter list is the beginning of a longer one, class by class: an index, nothing drawn.
    longer = open_benchmark(benchmark, imbalance=0.1, shots=30)
    assert set(tail.sets["train"].keys) < set(longer.sets["train"].keys)
    assert tail.sets["test"] == whole.sets["test"]
    # Taken in turn from both domains.
    domains = Counter(source for source in tail.sets["train"].sources)
    assert abs(domains["photo"] - domains["sketch"]) <= len(CLASSES)


def test_no_imbalance_is_the_balanced_set(benchmark):
    balanced = open_benchmark(benchmark, shots=15)
    assert open_benchmark(benchmark, shots=15, imbalance=1.0).sets == balanced.sets
    assert counts(balanced) == [15, 15, 15]


def test_more_than_there_are_is_said_by_class(benchmark):
    have = counts(open_benchmark(benchmark))
    assert have[2] < 35 < have[0]
    with pytest.raises(UserError, match=rf"shots=35: more than there are \(cat: {have[2]}\)"):
        open_benchmark(benchmark, shots=35)
    # The same number fits where the tail asks for fewer of the last class.
    assert counts(open_benchmark(benchmark, shots=35, imbalance=0.2)) == [35, 15, 7]


def test_everything_wrong_with_the_training_set_is_said_at_once(benchmark):
    config = benchmark.model_copy(update={"class_names": [*CLASSES, "dodo"]})
    with pytest.raises(UserError) as caught:
        open_benchmark(config, shots=60)
    shots, missing = str(caught.value).splitlines()
    assert shots.startswith("shots=60: more than there are (ant: ")
    assert missing == "set 'train' of benchmark 'toy': no image of class dodo"
