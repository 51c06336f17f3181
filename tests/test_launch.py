"""Launches on devices made up by fake_cuda, and rows of ragged sequences whose bounds nobody checked."""

from __future__ import annotations

import itertools
import random
import threading
from types import ModuleType

import host_build
import pytest

MAX_SHARED, LARGE_CLUSTERS = 8, 11  # cudaFuncAttribute


numbers = itertools.count()


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    folder = tmp_path_factory.mktemp("launch")
    return host_build.build("launch_module", folder, f"-I{host_build.TESTS / 'fake_cuda'}")


@pytest.fixture
def kernel(host: ModuleType) -> int:
    """One that nothing is allowed to and nothing known of, on device 0 of 132 multiprocessors."""
    host.use_device(0, 132)
    return next(numbers)


def test_shared_memory_is_allowed_once_and_whole(host, kernel):
    """One value serves all threads of a device, whatever each of them launches with."""
    sizes = [60 * 1024, 100 * 1024, host.most_shared(), 49 * 1024]
    failures, before = [], host.launches()

    def run(shared_bytes: int, device: int) -> None:
        host.use_device(device, 132)
        if host.launch(kernel, shared_bytes, 1, 2000) != 0:
            failures.append(shared_bytes)

    threads = [threading.Thread(target=run, args=(s, d)) for s in sizes for d in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and host.launches() == before + 2000 * len(threads)
    assert sorted(host.settings(kernel)) == [(d, MAX_SHARED, host.most_shared()) for d in (0, 1)]
    assert host.settings(next(numbers)) == []  # no other kernel's


def test_small_launches_set_nothing(host, kernel):
    assert host.launch(kernel, 48 * 1024, 8, 1) == 0
    assert host.settings(kernel) == []


def test_a_refused_launch_says_why_and_is_forgotten(host, kernel):
    """The next launch is not told of it, nor is the next error's text."""
    wanted = host.most_shared() + 1
    status = host.launch(kernel, wanted, 1, 1)
    assert status == 1
    text = host.take_cuda_error(status)
    assert f"{wanted} bytes" in text and f"this device has {host.most_shared()}" in text
    assert host.last_error() == 0 and host.launch(kernel, 0, 1, 1) == 0
    host.use_device(0, 4)
    status = host.launch(kernel, 0, 8, 1)
    assert host.last_error() == status == 1
    assert host.take_cuda_error(status) == "cudaErrorInvalidValue: invalid argument"
    assert host.last_error() == 0


@pytest.mark.parametrize("multiprocessors", [1, 6, 8, 14, 16, 132])
def test_clusters_are_asked_for_once(host, kernel, multiprocessors):
    host.use_device(0, multiprocessors)
    before = host.cluster_questions()
    for _ in range(3):
        for cluster in (16, 8, 4, 2, 1):
            held = host.holds_cluster(kernel, 100 * 1024, cluster)
            assert held == (cluster <= multiprocessors)
            assert not held or host.launch(kernel, 100 * 1024, cluster, 1) == 0
    assert host.cluster_questions() == before + 4  # any device holds a cluster of one
    assert sorted(host.settings(kernel)) == [
        (0, MAX_SHARED, host.most_shared()),
        (0, LARGE_CLUSTERS, 1),
    ]


def test_a_cluster_that_does_not_fit_leaves_no_error(host, kernel):
    assert not host.holds_cluster(kernel, host.most_shared() + 1, 4)
    assert host.last_error() == 0
    assert host.take_cuda_error(1) == "cudaErrorInvalidValue: invalid argument"


def test_every_row_has_one_sequence_or_none(host):
    """Sequences longer than max_seqlen lose what goes beyond; bounds may be anything at all."""
    for _ in range(400):
        tokens, batch, longest = (random.randint(1, 12) for _ in "abc")
        bounds = sorted(random.randint(0, tokens) for _ in range(batch + 1))
        if random.random() < 0.3:
            bounds = [random.randint(-2, tokens + 2) for _ in bounds]
        spans = [host.sequence_rows(bounds, b, longest, tokens) for b in range(batch)]
        for begin, count in spans:
            assert 0 <= begin and begin + count <= tokens and 0 <= count <= longest
        for token in range(tokens):
            owners = [b for b, (begin, n) in enumerate(spans) if begin <= token < begin + n]
            found = host.find_sequence(bounds, longest, token, tokens)
            if bounds == sorted(bounds):
                assert [found] == (owners or [-1])
            else:
                assert found == -1 or found in owners
    # Two sequences of 5 and 2 rows with room for 3: rows 3 and 4 are of no sequence.
    found = [host.find_sequence([0, 5, 7], 3, token, 8) for token in range(8)]
    assert found == [0, 0, 0, -1, -1, 1, 1, -1]
