"""The store: which release a name means, going back, removing, one writer at a time."""

import os
import threading
from pathlib import Path

import pytest
from archive_samples import archive_of, tree, whole_package

from device_runtime.apps import store_lock
from device_runtime.apps.install import install
from device_runtime.apps.places import data_dir
from device_runtime.apps.release import next_release_id
from device_runtime.apps.store import Store, find_package
from device_runtime.apps.store_lock import exclusive
from device_runtime.errors import DeviceError, UsageError


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """Archives of three releases of one model."""
    folder = tmp_path_factory.mktemp("archives")
    for seed in range(3):
        whole_package(folder / f"p{seed}", seed=seed)
        archive_of(folder / f"p{seed}", folder / f"{seed}.tgz")
    return [folder / f"{seed}.tgz" for seed in range(3)]


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "data")


@pytest.fixture
def releases(store, archives):
    """Three installed releases, the last one current."""
    return [install(store, archive).release for archive in archives]


def ids(releases):
    return [release.release_id for release in releases]


def test_an_empty_store_has_no_models(store) -> None:
    assert store.names() == ()
    assert store.releases("tiny-1.0") == ()
    assert not store.models_dir.exists()
    with pytest.raises(UsageError, match="no model is called 'x'; none is installed, `turbojet"):
        store.get("x")


def test_the_current_release_comes_first_and_then_the_newest(store, releases) -> None:
    times = dict(zip(ids(releases), (100, 300, 200), strict=True))
    for release in releases:
        os.utime(release.root, (0, times[release.release_id]))
    a, b, c = ids(releases)
    assert ids(store.releases("tiny-1.0")) == [c, b, a]
    store.rollback("tiny-1.0", a)
    assert ids(store.releases("tiny-1.0")) == [a, b, c]


def test_rollback_goes_back_and_forth(store, releases) -> None:
    a, b, c = ids(releases)
    assert store.get("tiny-1.0").release_id == c
    assert store.rollback("tiny-1.0").release_id == b
    assert store.rollback("tiny-1.0").release_id == c
    assert store.rollback("tiny-1.0", a).release_id == a
    assert store.rollback("tiny-1.0").release_id == c
    assert store.rollback("tiny-1.0", c).is_current


def test_rollback_says_what_is_wrong(store, archives) -> None:
    first = install(store, archives[0]).release
    with pytest.raises(UsageError, match="no previous release; nothing to go back to"):
        store.rollback("tiny-1.0")
    second = install(store, archives[1]).release
    (store.models_dir / "tiny-1.0" / "previous").unlink()
    message = f"no previous release; name one with --release: {first.release_id}"
    with pytest.raises(UsageError, match=message):
        store.rollback("tiny-1.0")
    known = f"{second.release_id}, {first.release_id}"
    with pytest.raises(UsageError, match=f"has no release '0123'; installed: {known}"):
        store.rollback("tiny-1.0", "0123")
    with pytest.raises(UsageError, match=r"no model is called 'tiny'; did you mean tiny-1\.0"):
        store.rollback("tiny")


def test_a_model_whose_link_is_lost_says_how_to_mend_it(store, releases) -> None:
    (store.models_dir / "tiny-1.0" / "current").unlink()
    with pytest.raises(UsageError, match=r"no current release; `turbojet rollback .*--release ID"):
        store.get("tiny-1.0")
    assert store.rollback("tiny-1.0", releases[0].release_id).is_current


@pytest.mark.parametrize("target", ["/etc", "../..", "nothing", ".", ""])
def test_a_link_that_leads_elsewhere_means_nothing(store, releases, target) -> None:
    link = store.models_dir / "tiny-1.0" / "current"
    link.unlink()
    if target:
        link.symlink_to(target)
    assert not any(release.is_current for release in store.releases("tiny-1.0"))


def test_removing_a_model_removes_all_of_it(store, releases) -> None:
    store.remove("tiny-1.0")
    assert store.names() == ()
    assert not (store.models_dir / "tiny-1.0").exists()
    with pytest.raises(UsageError, match=r"no model is called 'tiny-1\.0'; none is installed"):
        store.remove("tiny-1.0")


def test_removing_a_release_leaves_the_others(store, releases) -> None:
    a, b, c = ids(releases)
    with pytest.raises(UsageError, match=f"{c} is the current release of tiny-1.0; make another"):
        store.remove_release(store.get("tiny-1.0"))
    store.remove_release(store.get("tiny-1.0", b))
    assert ids(store.releases("tiny-1.0"))[0] == c
    assert set(ids(store.releases("tiny-1.0"))) == {a, c}
    assert not (store.models_dir / "tiny-1.0" / f"{b}.json").exists()
    with pytest.raises(UsageError, match="no previous release"):
        store.rollback("tiny-1.0")


def test_names_that_lead_elsewhere_are_unknown(store, releases) -> None:
    for name in ("..", ".", "../models/tiny-1.0", "", "tiny-1.0/current", ".incoming", "a\nb"):
        assert store.releases(name) == ()
        with pytest.raises(UsageError, match="no model is called"):
            store.get(name)
        with pytest.raises(UsageError, match="no model is called"):
            store.remove(name)


def test_what_dead_processes_left_is_cleaned_up(store, releases) -> None:
    before = tree(store.models_dir)
    (store.models_dir / ".incoming" / "new-abc" / "package").mkdir(parents=True)
    (store.models_dir / ".incoming" / "new-abc" / "package" / "file").write_text("x")
    (store.models_dir / "tiny-1.0" / "0123456789ab.json").write_text("{}")
    (store.models_dir / "empty").mkdir()
    (store.models_dir / "foreign").mkdir()
    (store.models_dir / "foreign" / "thesis.txt").write_text("keep me")
    assert store.names() == ("tiny-1.0",)
    with store.locked(pytest.fail):
        pass
    after = tree(store.models_dir)
    assert after.pop("foreign/thesis.txt") == b"keep me"
    del after["foreign"]
    assert after == before


def test_writers_wait_for_each_other(store, archives) -> None:
    told = threading.Event()
    sentences = []
    done = []

    def tell(sentence):
        sentences.append(sentence)
        told.set()

    second = threading.Thread(
        target=lambda: done.append(install(store, archives[1], tell=tell)), daemon=True
    )
    with store.locked(pytest.fail):
        second.start()
        assert told.wait(10)
        assert store.names() == ()
    second.join(20)
    assert sentences == [
        f"waiting for another turbojet that changes {store.models_dir} (process {os.getpid()})"
    ]
    assert done[0].release.is_current


def test_a_lock_that_cannot_be_had_is_a_sentence(tmp_path, monkeypatch) -> None:
    with (
        pytest.raises(DeviceError, match=r"cannot open the lock .*: No such file"),
        exclusive(tmp_path / "none" / "lock", pytest.fail),
    ):
        pytest.fail("locked")

    def flock(descriptor, operation):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(store_lock.fcntl, "flock", flock)
    with (
        pytest.raises(DeviceError, match=r"cannot lock .*: Function not implemented; choose"),
        exclusive(tmp_path / "lock", pytest.fail),
    ):
        pytest.fail("locked")


def test_a_store_that_cannot_be_read_is_a_sentence(tmp_path) -> None:
    (tmp_path / "models").write_text("a file")
    with pytest.raises(DeviceError, match=r"cannot read .*models: Not a directory"):
        Store(tmp_path).names()


def test_find_tells_a_model_from_a_folder(store, releases) -> None:
    assert store.find("tiny-1.0", None) == store.get("tiny-1.0")
    assert store.find("tiny-1.0", releases[0].release_id).release_id == releases[0].release_id
    assert store.find("./folder", None) is None
    with pytest.raises(UsageError, match=r"no model is called './folder'"):
        store.find("./folder", releases[0].release_id)


def test_ids_of_repeated_installs_count_up() -> None:
    assert next_release_id("ab" * 6, set()) == "ab" * 6
    assert next_release_id("ab" * 6, {"ab" * 6}) == "ab" * 6 + "-2"
    assert next_release_id("ab" * 6, {"ab" * 6, "ab" * 6 + "-2"}) == "ab" * 6 + "-3"
    assert next_release_id("ab" * 6, {"ab" * 6 + "-2"}) == "ab" * 6


def test_a_package_is_found_by_name_or_by_folder(store, tmp_path, archives, monkeypatch) -> None:
    data = tmp_path / "data"
    with pytest.raises(UsageError, match=r"no model is installed; `turbojet install X\.tgz`"):
        find_package(None, data)
    root = install(store, archives[0]).release.root
    assert find_package(None, data) == root
    assert find_package("tiny-1.0", data) == root
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_package("here", data) == Path("here")
    assert find_package("./here", data) == Path("./here")
    # An installed name wins over a folder that happens to be here; a path says which is meant.
    (tmp_path / "tiny-1.0").mkdir()
    assert find_package("tiny-1.0", data) == root
    assert find_package("./tiny-1.0", data) == Path("./tiny-1.0")
    with pytest.raises(UsageError, match=r"0\.tgz is a file; `turbojet install .*0\.tgz` inst"):
        find_package(str(archives[0]), data)
    with pytest.raises(UsageError, match=r"\./none is not a folder"):
        find_package("./none", data)
    with pytest.raises(UsageError, match="no model is called 'none'"):
        find_package("none", data)
    (store.models_dir / "other").mkdir()
    os.rename(root, store.models_dir / "other" / root.name)
    assert store.names() == ("other",)
    install(store, archives[0])
    with pytest.raises(UsageError, match="several models are installed, name one: other, tiny"):
        find_package(None, data)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"HOME": "/h"}, "/h/.local/share/turbojet"),
        ({"HOME": "/h", "XDG_DATA_HOME": "/x"}, "/x/turbojet"),
        ({"XDG_DATA_HOME": "/x", "TURBOJET_DATA_DIR": "/t"}, "/t"),
        ({"HOME": "/h", "XDG_DATA_HOME": "", "TURBOJET_DATA_DIR": ""}, "/h/.local/share/turbojet"),
    ],
)
def test_the_data_folder_follows_xdg(environ, expected) -> None:
    assert data_dir(environ) == Path(expected)


def test_a_bad_place_is_an_error(monkeypatch) -> None:
    with pytest.raises(UsageError, match="TURBOJET_DATA_DIR is 'models', expected an absolute"):
        data_dir({"TURBOJET_DATA_DIR": "models", "HOME": "/h"})
    with pytest.raises(UsageError, match="XDG_DATA_HOME is 'x', expected an absolute path"):
        data_dir({"XDG_DATA_HOME": "x"})
    with pytest.raises(UsageError, match="there is no HOME to keep models in; set TURBOJET_DATA"):
        data_dir({})
    monkeypatch.setenv("TURBOJET_DATA_DIR", "/from/environment")
    assert data_dir() == Path("/from/environment")
