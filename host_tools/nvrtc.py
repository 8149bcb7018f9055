"""NVIDIA's run-time compiler from its PyPI wheels: CUDA sources to cubins without a toolkit or GPU.

Nothing of the CUDA toolkit is included by our sources, so the compiler's library is all it takes.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from ctypes import byref, c_char_p, c_int, c_size_t, c_void_p
from pathlib import Path

from device_runtime.errors import DeviceError, InternalError, PackageError

WHEELS = {
    "11.8": "nvidia-cuda-nvrtc-cu11==11.8.89",
    "12.6": "nvidia-cuda-nvrtc-cu12==12.6.85",
    "13.0": "nvidia-cuda-nvrtc==13.0.88",
}
"""The wheel of each CUDA release that cubins are built with."""


class Nvrtc:
    """One release of the compiler, loaded from the folder of its libraries.

    Attributes:
        release: as the library itself says, (12, 6).
    """

    def __init__(self, folder: Path) -> None:
        """Load the library.

        Raises:
            DeviceError: the folder has no library, or this machine cannot load it.
        """
        compilers = sorted(folder.glob("libnvrtc.so*"))
        builtins = sorted(folder.glob("libnvrtc-builtins.so*"))
        if not compilers or not builtins:
            raise DeviceError(f"{folder} has no NVRTC; delete it to fetch the compiler again")
        try:
            # The compiler looks its builtins up by name; loaded first, they are found.
            ctypes.CDLL(str(builtins[0]), mode=ctypes.RTLD_GLOBAL)
            self._library = ctypes.CDLL(str(compilers[0]))
        except OSError as error:
            raise DeviceError(f"{compilers[0]} cannot be loaded: {error}") from error
        self._library.nvrtcGetErrorString.restype = c_char_p
        major, minor = c_int(), c_int()
        self._call("nvrtcVersion", byref(major), byref(minor))
        self.release = (major.value, minor.value)

    def compile(
        self, name: str, text: str, headers: Mapping[str, str], flags: Sequence[str]
    ) -> bytes:
        """Return the cubin of one source.

        Args:
            name: of the source in messages.
            text: the source.
            headers: text of each file that it includes, by the name in the #include.
            flags: of the compiler, ``-arch=sm_87`` among them.

        Raises:
            InternalError: the source does not compile; the message has the compiler's log.
        """
        program = c_void_p()
        names, texts = list(headers), [headers[key] for key in headers]
        array = c_char_p * len(names)
        self._call(
            "nvrtcCreateProgram",
            byref(program),
            c_char_p(text.encode()),
            c_char_p(name.encode()),
            c_int(len(names)),
            array(*(item.encode() for item in texts)),
            array(*(item.encode() for item in names)),
        )
        try:
            options = (c_char_p * len(flags))(*(flag.encode() for flag in flags))
            code = self._library.nvrtcCompileProgram(program, c_int(len(flags)), options)
            if code:
                raise InternalError(
                    f"{name} does not compile with NVRTC {self.release[0]}.{self.release[1]} "
                    f"{' '.join(flags)}:\n{self._text(program, 'ProgramLog')}"
                )
            return self._bytes(program, "CUBIN")
        finally:
            self._library.nvrtcDestroyProgram(byref(program))

    def _text(self, program: c_void_p, what: str) -> str:
        return self._bytes(program, what).rstrip(b"\0").decode(errors="replace")

    def _bytes(self, program: c_void_p, what: str) -> bytes:
        size = c_size_t()
        self._call(f"nvrtcGet{what}Size", program, byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{what}", program, buffer)
        return buffer.raw

    def _call(self, function: str, *arguments: object) -> None:
        code = int(getattr(self._library, function)(*arguments))
        if code:
            reason = self._library.nvrtcGetErrorString(c_int(code)).decode()
            raise InternalError(f"{function} failed: {reason} ({code})")


def fetch_compiler(release: str, folder: Path) -> Path:
    """Return the folder of a release's libraries; pip fetches them the first time.

    Args:
        release: one of `WHEELS`.
        folder: where the compilers are kept, each in a folder of its own.

    Raises:
        DeviceError: pip cannot fetch the wheel.
        PackageError: the wheel has no library.
    """
    place = folder / release
    if place.is_dir():
        return place
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{release}-") as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary", ":all:", "--dest", temporary, WHEELS[release]]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(temporary).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise DeviceError(f"pip could not fetch {WHEELS[release]}: {reason}")
        libraries = Path(temporary) / "libraries"
        libraries.mkdir()
        extract_libraries(wheels[0], libraries)
        # Another process may have been faster; both have the same files.
        try:
            libraries.rename(place)
        except OSError:
            if not place.is_dir():
                raise
    return place


def extract_libraries(wheel: Path, folder: Path) -> None:
    """Copy the compiler and its builtins out of a wheel.

    Raises:
        PackageError: they are not in it.
    """
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.namelist():
            name = Path(entry).name
            # Releases from 12.9 on have a second pair of libraries, with a suffix.
            if name.startswith(("libnvrtc.so", "libnvrtc-builtins.so")) and ".alt." not in name:
                (folder / name).write_bytes(archive.read(entry))
    if len(list(folder.iterdir())) < 2:
        raise PackageError(f"{wheel.name} has no NVRTC libraries; this release cannot be used")
