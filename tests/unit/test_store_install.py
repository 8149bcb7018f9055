"""Installing: checked, kept beside the old release, switched to by one rename."""

import dataclasses
import errno
import io
import os
import shutil
import time

import format_samples
import pytest
from archive_samples import archive_of, members_of, small_package, tgz_of, tree, whole_package

from device_runtime.apps import install as install_module
from device_runtime.apps.install import InstallOptions, install
from device_runtime.apps.store import Store
from device_runtime.apps.verify import Verified, verify_release
from device_runtime.errors import DeviceError, PackageError, UsageError
from device_runtime.package_format import names


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "data")


@pytest.fixture
def archives(tmp_path):
    """Archives of three releases of one model."""
    made = []
    for seed in range(3):
        whole_package(tmp_path / f"p{seed}", seed=seed)
        archive_of(tmp_path / f"p{seed}", tmp_path / f"{seed}.tgz")
        made.append(tmp_path / f"{seed}.tgz")
    return made


def nothing_left(store):
    """No temporary thing remains anywhere in the store."""
    assert not (store.models_dir / ".incoming").exists()
    for name in store.names():
        ids = {release.release_id for release in store.releases(name)}
        extra = {"current", "previous"} | {f"{release_id}.json" for release_id in ids}
        assert set(os.listdir(store.models_dir / name)) <= ids | extra


def plain_workspace(root):
    format_samples.write_workspace(root, format_samples.INT4)
    (root / names.TOKENIZER_DIR).mkdir()
    return root


def test_a_package_is_installed_whole_and_current(store, archives, tmp_path) -> None:
    seen = []
    done = install(store, archives[0], progress=lambda *args: seen.append(args))
    assert done.outcome == "installed"
    assert (done.release.name, done.release.is_current) == ("tiny-1.0", True)
    assert tree(store.models_dir / "tiny-1.0" / "current") == tree(tmp_path / "p0")
    assert os.readlink(store.models_dir / "tiny-1.0" / "current") == done.release.release_id
    files = [p for p in (tmp_path / "p0").rglob("*") if p.is_file() and p.name != names.MANIFEST]
    assert done.size_bytes == sum(path.stat().st_size for path in files)
    assert done.num_files == len(files)
    assert seen[-1] == (archives[0].stat().st_size,) * 2
    record = done.release.record()
    assert (record.source, record.files) == ("0.tgz", ())
    assert record.archive_bytes == archives[0].stat().st_size
    nothing_left(store)


def test_a_stream_is_installed_too(store, archives) -> None:
    done = install(store, io.BytesIO(archives[0].read_bytes()))
    assert done.release.is_current
    assert done.release.record().source == "-"


def test_a_second_release_leaves_the_first_beside_it(store, archives) -> None:
    first = install(store, archives[0]).release
    second = install(store, archives[1]).release
    assert first.release_id != second.release_id
    assert [r.release_id for r in store.releases("tiny-1.0")] == [
        second.release_id,
        first.release_id,
    ]
    now = store.get("tiny-1.0", first.release_id)
    assert (now.is_current, now.is_previous) == (False, True)
    verify_release(now)
    nothing_left(store)


def test_the_same_release_twice_changes_nothing(store, archives, monkeypatch) -> None:
    first = install(store, archives[0]).release
    before = tree(store.models_dir)
    monkeypatch.setattr(
        install_module.ArchiveReader, "extract", lambda *args: pytest.fail("unpacked again")
    )
    done = install(store, archives[0])
    assert (done.outcome, done.release) == ("unchanged", first)
    assert tree(store.models_dir) == before


def test_an_old_release_that_is_installed_again_is_made_current(store, archives) -> None:
    first = install(store, archives[0]).release
    install(store, archives[1])
    done = install(store, archives[0])
    assert (done.outcome, done.release.release_id) == ("activated", first.release_id)
    assert done.release.is_current


def test_a_release_can_wait_for_its_turn(store, archives) -> None:
    first = install(store, archives[0]).release
    done = install(store, archives[1], InstallOptions(is_activated=False))
    assert (done.outcome, done.release.is_current) == ("installed", False)
    assert store.get("tiny-1.0") == first
    again = install(store, archives[1], InstallOptions(is_activated=False))
    assert (again.outcome, again.release) == ("unchanged", done.release)
    with store.locked(pytest.fail):
        assert store.rollback("tiny-1.0", done.release.release_id).is_current


def test_a_name_can_be_chosen(store, archives) -> None:
    install(store, archives[0], InstallOptions(name="mine"))
    assert store.names() == ("mine",)
    assert install(store, archives[0], InstallOptions(name="mine")).outcome == "unchanged"
    for name in ("../x", ".x", "a/b", "x" * 97):
        with pytest.raises(UsageError, match="is not 1 to 96 letters"):
            InstallOptions(name=name)


@pytest.mark.parametrize("lost", [names.MANIFEST, names.weight_path(names.FINAL_NORM)])
def test_a_damaged_release_is_replaced_without_asking(store, archives, lost) -> None:
    install(store, archives[1])
    damaged = install(store, archives[0]).release
    (damaged.root / lost).unlink()
    done = install(store, archives[0])
    assert done.outcome == "installed"
    assert done.release.release_id == f"{damaged.release_id}-2"
    verify_release(done.release)
    assert not damaged.root.exists()
    # Going back still means the release before, not the damaged one.
    with store.locked(pytest.fail):
        assert store.rollback("tiny-1.0").record().source == "1.tgz"
    nothing_left(store)


def test_force_unpacks_anew_and_drops_the_old_twin(store, archives) -> None:
    for count in (1, 2, 3):
        done = install(store, archives[0], InstallOptions(is_forced=True))
        assert done.outcome == "installed"
        assert len(store.releases("tiny-1.0")) == 1
        verify_release(done.release)
        assert done.release.release_id.endswith("-2") == (count == 2)
    nothing_left(store)


@pytest.mark.parametrize("is_converted", [False, True])
def test_a_workspace_packed_by_hand_is_installed_and_verified(
    store, tmp_path, is_converted
) -> None:
    if is_converted:
        root = format_samples.write_workspace(tmp_path / "ws", format_samples.INT4, is_sealed=False)
    else:
        root = plain_workspace(tmp_path / "ws")
    (tmp_path / "x.tgz").write_bytes(tgz_of(*members_of(root)))
    done = install(store, tmp_path / "x.tgz")
    assert done.release.name == ("tiny-1.0" if is_converted else "tiny")
    assert verify_release(done.release) == Verified(done.num_files, done.size_bytes)
    assert install(store, tmp_path / "x.tgz").outcome == "unchanged"
    assert install(store, io.BytesIO((tmp_path / "x.tgz").read_bytes())).outcome == "unchanged"
    nothing_left(store)


def test_a_changed_file_makes_another_release_of_a_workspace(store, tmp_path) -> None:
    root = plain_workspace(tmp_path / "ws")
    (tmp_path / "x.tgz").write_bytes(tgz_of(*members_of(root)))
    install(store, tmp_path / "x.tgz")
    (root / "note").write_text("x")
    (tmp_path / "x.tgz").write_bytes(tgz_of(*members_of(root)))
    assert install(store, tmp_path / "x.tgz").outcome == "installed"
    assert len(store.releases("tiny")) == 2


def test_a_workspace_whose_name_is_no_folder_needs_another(store, tmp_path) -> None:
    root = plain_workspace(tmp_path / "ws")
    config = root / names.WEIGHTS_DIR / names.CONFIG_INI
    config.write_text(config.read_text().replace("model_name = tiny", "model_name = a/b"))
    (tmp_path / "x.tgz").write_bytes(tgz_of(*members_of(root)))
    with pytest.raises(PackageError, match=r"calls itself 'a/b'.*choose one with --name"):
        install(store, tmp_path / "x.tgz")
    assert install(store, tmp_path / "x.tgz", InstallOptions(name="ok")).release.name == "ok"


def test_what_fails_leaves_the_old_release_and_nothing_else(store, archives, tmp_path) -> None:
    install(store, archives[0])
    before = tree(store.models_dir)
    data = bytearray(archives[1].read_bytes())
    data[len(data) // 2] ^= 1
    small_package(tmp_path / "incomplete")
    for source, message in (
        (io.BytesIO(data), "damaged"),
        (io.BytesIO(data[:30_000]), "cut short"),
        (io.BytesIO(archive_of(tmp_path / "incomplete", tmp_path / "x.tgz")), "lacks|missing"),
    ):
        with pytest.raises(PackageError, match=message):
            install(store, source)
        assert tree(store.models_dir) == before
    with pytest.raises(UsageError, match="cannot read"):
        install(store, tmp_path / "none.tgz")
    assert tree(store.models_dir) == before


def test_too_little_space_is_known_before_anything_is_written(
    store, archives, tmp_path, monkeypatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=33_000_000))
    monkeypatch.setattr(
        install_module.ArchiveReader, "extract", lambda *args: pytest.fail("unpacked")
    )
    # 32 MiB to spare + 25 files of up to a block + 61 kB.
    message = r"needs 33\.7 MB, .*models has 33\.0 MB free; remove a model"
    with pytest.raises(DeviceError, match=message):
        install(store, archives[0])
    with pytest.raises(DeviceError, match=message):
        install(store, io.BytesIO(archives[0].read_bytes()))
    root = plain_workspace(tmp_path / "ws")
    (tmp_path / "x.tgz").write_bytes(tgz_of(*members_of(root)))
    with pytest.raises(DeviceError, match=r"needs 33\.\d MB"):
        install(store, tmp_path / "x.tgz")
    assert store.names() == ()


def test_a_disk_without_links_is_refused_before_anything_is_unpacked(
    store, archives, monkeypatch
) -> None:
    def refuse(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refuse)
    monkeypatch.setattr(
        install_module.ArchiveReader, "extract", lambda *args: pytest.fail("unpacked")
    )
    with pytest.raises(DeviceError, match=r"models takes no links .*FAT.*; choose another disk"):
        install(store, archives[0])
    assert store.names() == ()
    nothing_left(store)


def test_a_store_that_cannot_be_written_is_a_sentence(tmp_path, archives) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DeviceError, match=r"cannot change .*models: Not a directory"):
        install(Store(tmp_path / "file"), archives[0])


def test_an_interrupt_leaves_nothing(store, archives) -> None:
    def interrupt(done_bytes, total_bytes):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        install(store, archives[0], progress=interrupt)
    assert store.names() == ()
    nothing_left(store)


def test_verify_names_what_changed(store, archives, tmp_path) -> None:
    release = install(store, archives[0]).release
    assert verify_release(release).num_files == 25
    weight = release.root / names.weight_path(names.FINAL_NORM)
    good = weight.read_bytes()
    weight.write_bytes(bytes(len(good)))
    message = r"tiny-1.0 is damaged: .*norm\.weight has sha256.*`turbojet install --force`"
    with pytest.raises(PackageError, match=message):
        verify_release(release)
    weight.write_bytes(good)
    manifest = release.root / names.MANIFEST
    text = manifest.read_bytes()
    manifest.write_bytes(text + b"\n")
    with pytest.raises(PackageError, match=r"damaged: manifest\.json changed since"):
        verify_release(release)
    manifest.write_bytes(text)
    release.record_path.write_text("{}")
    with pytest.raises(PackageError, match="lacks the key 'installed_at'"):
        verify_release(release)
    release.record_path.unlink()
    with pytest.raises(PackageError, match=r"cannot read .*\.json: No such file.*install"):
        verify_release(release)


def test_verify_of_a_plain_workspace_names_what_changed(store, tmp_path) -> None:
    root = plain_workspace(tmp_path / "ws")
    (root / "note").write_text("x")
    (tmp_path / "x.tgz").write_bytes(tgz_of(*members_of(root)))
    release = install(store, tmp_path / "x.tgz").release
    (release.root / "note").write_text("y")
    with pytest.raises(PackageError, match=r"note has 1 bytes and sha256 .* installed with 1 and"):
        verify_release(release)
    (release.root / "note").unlink()
    with pytest.raises(PackageError, match="tiny is damaged: note is missing"):
        verify_release(release)
    (release.root / "note").write_text("x")
    (release.root / "other").write_text("x")
    with pytest.raises(PackageError, match="other was not there when it was installed"):
        verify_release(release)


def test_everything_is_synced_before_the_release_is_current(store, archives, monkeypatch) -> None:
    events = []
    real_fsync, real_replace, real_rename = os.fsync, os.replace, os.rename

    def fsync(descriptor):
        events.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        real_fsync(descriptor)

    def replace(source, target):
        events.append(("rename", str(target)))
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(
        os, "rename", lambda a, b: (events.append(("rename", str(b))), real_rename(a, b))
    )
    release = install(store, archives[0]).release
    moved = events.index(("rename", str(release.root)))
    current = events.index(("rename", str(release.root.with_name("current"))))
    synced = [path for kind, path in events[:moved] if kind == "sync"]
    for path in tree(release.root):
        assert any(done.endswith(f"/{path}") for done in synced), path
    assert ("sync", str(release.root.parent)) in events[moved:current]
    assert ("sync", str(release.root.parent)) in events[current:]


def test_records_say_when(store, archives) -> None:
    before = time.gmtime()
    record = install(store, archives[0]).release.record()
    assert record.installed_at.startswith(time.strftime("%Y-", before))
    assert record.installed_at.endswith("+00:00")
    assert dataclasses.asdict(record)["manifest_sha256"]
