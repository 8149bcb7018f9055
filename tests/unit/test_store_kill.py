"""kill -9 at any moment leaves the old release working, and the next install cleans up."""

import contextlib
import os
import random
import signal
import sys
import time

import pytest
from archive_samples import archive_of, whole_package

from device_runtime.apps.install import InstallOptions, install
from device_runtime.apps.store import Store
from device_runtime.apps.verify import verify_release

NAME = "tiny-1.0"


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    folder = tmp_path_factory.mktemp("archives")
    for seed in range(2):
        archive_of(whole_package(folder / f"p{seed}", seed=seed), folder / f"{seed}.tgz")
    return [folder / f"{seed}.tgz" for seed in range(2)]


def in_child(work):
    """Run work in a forked child and return its process id; it never comes back from here."""
    pid = os.fork()
    if pid == 0:
        # A child that hangs ends by another signal than the kill it is meant to die from.
        signal.alarm(60)
        code = 70
        with contextlib.suppress(BaseException):
            work()
            code = 0
        os._exit(code)
    return pid


def check_store(store, allowed):
    """What is current is one of the allowed releases and is whole; so is every other release."""
    current = store.get(NAME)
    assert current.release_id in allowed
    for release in store.releases(NAME):
        verify_release(release)
    return current


def leftovers(store):
    ids = {release.release_id for release in store.releases(NAME)}
    known = ids | {f"{release_id}.json" for release_id in ids} | {"current", "previous"}
    extra = [name for name in os.listdir(store.models_dir / NAME) if name not in known]
    return extra + [name for name in os.listdir(store.models_dir) if name not in (NAME, ".lock")]


def test_fifty_kills_at_random_moments(tmp_path, archives) -> None:
    store = Store(tmp_path)
    forced = InstallOptions(is_forced=True)
    start = time.monotonic()
    install(store, archives[0])
    duration_s = time.monotonic() - start
    rng = random.Random(0)
    num_killed = 0
    for count in range(50):
        before = store.get(NAME)
        archive = archives[count % 2]
        pid = in_child(lambda archive=archive: install(store, archive, forced))
        time.sleep(rng.uniform(0, 1.2 * duration_s))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        num_killed += os.WIFSIGNALED(status)
        ids = {release.release_id for release in store.releases(NAME)}
        current = check_store(store, ids)
        assert current.release_id == before.release_id or current.record().source == archive.name
    # Most of them died in the middle, not after the end.
    assert num_killed >= 25
    install(store, archives[0], forced)
    check_store(store, {store.get(NAME).release_id})
    assert leftovers(store) == []


STEPS = (
    "open",
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.symlink",
    "tempfile.mkdtemp",
    "shutil.rmtree",
    "os.truncate",
    "fcntl.flock",
    "os.listdir",
    "os.scandir",
)


def die_at(step):
    """Have the process kill itself at the given one of its file operations."""
    num_steps = 0

    def hook(event, arguments):
        nonlocal num_steps
        if event in STEPS:
            num_steps += 1
            if num_steps == step:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


@pytest.mark.parametrize(
    ("verb", "stride"), [("update", 1), ("force", 4), ("remove", 1), ("first", 4)]
)
def test_a_kill_at_every_single_step(tmp_path, archives, verb, stride, monkeypatch) -> None:
    # A killed process loses nothing that it wrote; syncing would only take time here.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    store = Store(tmp_path)
    new_id = install(Store(tmp_path / "other"), archives[1]).release.release_id

    def work():
        if verb == "remove":
            with store.locked(lambda sentence: None):
                store.remove(NAME)
        elif verb == "force":
            install(store, archives[0], InstallOptions(is_forced=True))
        else:
            install(store, archives[1] if verb == "update" else archives[0])

    old_id = None
    was_killed = True
    step = 0
    seen = set()
    while was_killed:
        step += stride
        assert step < 2000
        if verb != "first" and not store.releases(NAME):
            old_id = install(store, archives[0]).release.release_id

        def dying(step=step):
            die_at(step)
            work()

        _, status = os.waitpid(in_child(dying), 0)
        was_killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert was_killed or os.waitstatus_to_exitcode(status) == 0
        releases = store.releases(NAME)
        for release in releases:
            verify_release(release)
        if verb == "update":
            current = store.get(NAME).release_id
            assert current in (old_id, new_id)
            seen.add(current)
            if current == new_id:
                assert store.rollback(NAME).release_id == old_id
        elif verb == "force":
            assert store.get(NAME).record().source == "0.tgz"
        elif verb == "first":
            seen.add(len(releases))
        if verb == "remove" and releases:
            assert store.get(NAME).release_id == old_id
    if verb == "update":
        assert seen == {old_id, new_id}
    assert step > 20
    with store.locked(pytest.fail):
        pass
    if verb == "remove":
        assert not store.releases(NAME)
        assert os.listdir(store.models_dir) == [".lock"]
    else:
        assert leftovers(store) == []
