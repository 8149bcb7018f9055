"""Tiny packages and hand-made archives for the tests of archives and of the store."""

import gzip
import hashlib
import io
import tarfile

import format_samples

from device_runtime.package_format import names
from device_runtime.package_format.archive_writer import write_archive
from device_runtime.package_format.manifest import FileEntry, write_manifest

CONFIG = names.weight_path(names.CONFIG_INI)
WEIGHT = names.weight_path(names.FINAL_NORM)


def entry(path, data):
    return FileEntry(path, len(data), hashlib.sha256(data).hexdigest())


def seal(root, **fields):
    """List every file below root in a manifest, as packing does."""
    paths = sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())
    files = tuple(entry(p, (root / p).read_bytes()) for p in paths if p != names.MANIFEST)
    write_manifest(root, format_samples.manifest_of(format_samples.INT4, files=files, **fields))
    return root


def whole_package(root, *, seed=0, name="tiny-1.0"):
    """A sealed package that opens; the seed changes one weight and so the release."""
    format_samples.write_workspace(root, format_samples.INT4, is_sealed=False)
    spec = next(s for s in format_samples.tensor_specs(format_samples.INT4) if s.path == WEIGHT)
    (root / WEIGHT).write_bytes(format_samples.random_array(spec, seed).tobytes())
    return seal(root, name=name)


def small_package(root, *, weight=b"weights of a model", config=b"[llama]\n"):
    """A sealed package of two files: enough for an archive, too little to open."""
    (root / names.WEIGHTS_DIR).mkdir(parents=True)
    (root / CONFIG).write_bytes(config)
    (root / WEIGHT).write_bytes(weight)
    return seal(root)


def archive_of(package, path):
    """Write the package's archive and return its bytes."""
    write_archive(package, path)
    return path.read_bytes()


def tree(root):
    """Every path below root with its content; folders have None."""
    return {
        str(p.relative_to(root)): None if p.is_dir() else p.read_bytes()
        for p in sorted(root.rglob("*"))
    }


def member(name, data=b"", kind=tarfile.REGTYPE, **fields):
    """A tar member that may lie."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    info.type = kind
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def tar_of(*members, form=tarfile.GNU_FORMAT):
    """An uncompressed tar of (TarInfo, data) pairs."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def tgz_of(*members, form=tarfile.GNU_FORMAT):
    """The same compressed as one plain gzip member."""
    return gzip.compress(tar_of(*members, form=form), mtime=0)


def members_of(package, prefix="ws/"):
    """The package's files as tar members, manifest.json not first."""
    paths = sorted(str(p.relative_to(package)) for p in package.rglob("*") if p.is_file())
    paths.sort(key=lambda path: path == names.MANIFEST)
    return [member(prefix + path, (package / path).read_bytes()) for path in paths]
