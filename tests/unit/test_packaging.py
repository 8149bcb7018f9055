"""The device's installer against toy wheels: offline, atomic, harmless to repeat."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pip
import pytest

PACKAGING = Path(__file__).resolve().parents[2] / "packaging"
INTERPRETER = "cpython-3.99.1+20260101-aarch64-unknown-linux-gnu-install_only.tar.gz"
TAG = f"cp{sys.version_info.major}{sys.version_info.minor}"


def make_wheel(folder: Path, name: str, version: str, files: dict[str, str], points: str) -> None:
    """Write a wheel as PEP 427 has it."""
    info = f"{name}-{version}.dist-info"
    files = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": points,
    }
    record = ""
    for path, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=")
        record += f"{path},sha256={digest.decode()},{len(text.encode())}\n"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in {**files, f"{info}/RECORD": f"{record}{info}/RECORD,,\n"}.items():
            wheel.writestr(path, text)


def make_wheelhouse(folder: Path, pip_wheel: Path, version: str, body: str = "") -> Path:
    folder.mkdir()
    main = f"def main():\n    print('turbojet {version}')\n    {body or 'return 0'}\n"
    points = "[console_scripts]\nturbojet = toy:main\n"
    make_wheel(folder, "turbojet_llm", version, {"toy.py": main}, points)
    make_wheel(folder, "lean", "1.0", {"lean.py": ""}, "")
    shutil.copy(pip_wheel, folder)
    (folder / f"{TAG}.txt").write_text(f"lean==1.0\nturbojet-llm=={version}\n")
    seal(folder)
    return folder


def seal(folder: Path) -> None:
    sums = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
        for path in sorted(folder.iterdir())
        if path.name != "SHA256SUMS"
    ]
    (folder / "SHA256SUMS").write_text("".join(sums))


@pytest.fixture(scope="module")
def pip_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pip of this interpreter as a file that Python can run."""
    root = Path(pip.__file__).parent
    path = tmp_path_factory.mktemp("pip") / f"pip-{pip.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for file in sorted(root.rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts:
                wheel.write(file, str(file.relative_to(root.parent)))
    return path


def install(
    wheelhouse: Path,
    home: Path,
    *arguments: str,
    python: str | None = sys.executable,
    board: str | None = None,
    **environ: str,
) -> subprocess.CompletedProcess[str]:
    home.mkdir(exist_ok=True)
    release = home / "nv_tegra_release"
    if board:
        release.write_text(board)
    env = {
        "HOME": str(home),
        "PATH": f"{home}/bin:{os.environ['PATH']}",
        "TURBOJET_TEGRA_RELEASE": str(release),
        "LC_ALL": "C",
        **environ,
    }
    script = str(PACKAGING / "install.sh")
    command = ["sh", script, "--wheelhouse", str(wheelhouse)]
    if python is not None:
        command += ["--python", python]
    return subprocess.run(
        [*command, *arguments], env=env, cwd=home, capture_output=True, text=True, timeout=120
    )


def answer(home: Path) -> str:
    command = [str(home / ".local/bin/turbojet"), "--help"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def releases(home: Path) -> list[str]:
    runtime = home / ".local/share/turbojet/runtime"
    return sorted(path.name for path in runtime.glob("cp*"))


def test_it_installs_updates_and_keeps_the_release_before(tmp_path: Path, pip_wheel: Path) -> None:
    home = tmp_path / "home"
    first = make_wheelhouse(tmp_path / "first", pip_wheel, "1.0")
    with ThreadPoolExecutor() as pool:  # one of two at the same time waits for the other
        done, again = pool.map(lambda _: install(first, home), range(2))
    assert (done.returncode, again.returncode) == (0, 0), done.stderr + again.stderr
    assert (done.stderr + again.stderr).count("installing into") == 1
    assert answer(home) == "turbojet 1.0\n"
    assert "Next: turbojet chat MODEL.tgz" in done.stdout
    assert "Add it to your PATH" in done.stdout
    before = releases(home)
    assert len(before) == 1

    second = make_wheelhouse(tmp_path / "second", pip_wheel, "2.0")
    assert install(second, home).returncode == 0
    assert answer(home) == "turbojet 2.0\n"
    assert len(releases(home)) == 2
    assert set(before) < set(releases(home))

    # As where a library does not load on this board, which only verbs that need it find out.
    body = "import sys; sys.exit(9 if 'chat' in sys.argv else 0)"
    broken = make_wheelhouse(tmp_path / "broken", pip_wheel, "3.0", body=body)
    failed = install(broken, home)
    assert failed.returncode == 1
    assert "turbojet does not start from" in failed.stderr
    assert answer(home) == "turbojet 2.0\n"

    third = make_wheelhouse(tmp_path / "third", pip_wheel, "3.1")
    assert install(third, home).returncode == 0
    assert len(releases(home)) == 2  # 3.1 and 2.0; 1.0 and the broken one are gone


def test_a_damaged_wheelhouse_is_refused_before_anything_is_written(
    tmp_path: Path, pip_wheel: Path
) -> None:
    wheelhouse = make_wheelhouse(tmp_path / "wheels", pip_wheel, "1.0")
    with open(wheelhouse / "lean-1.0-py3-none-any.whl", "ab") as wheel:
        wheel.write(b"x")
    done = install(wheelhouse, tmp_path / "home")
    assert done.returncode == 3
    assert "is damaged, copy it again" in done.stderr
    assert not (tmp_path / "home/.local").exists()


def test_a_folder_without_sums_is_no_wheelhouse(tmp_path: Path) -> None:
    done = install(tmp_path, tmp_path / "home")
    assert (done.returncode, "has no SHA256SUMS" in done.stderr) == (3, True)


def test_wheels_for_another_python_are_refused_with_the_ones_there_are(
    tmp_path: Path, pip_wheel: Path
) -> None:
    wheelhouse = make_wheelhouse(tmp_path / "wheels", pip_wheel, "1.0")
    (wheelhouse / f"{TAG}.txt").rename(wheelhouse / "cp399.txt")
    seal(wheelhouse)
    done = install(wheelhouse, tmp_path / "home")
    assert done.returncode == 3
    assert f"has wheels for cp399, none for the {TAG}" in done.stderr


@pytest.mark.parametrize(
    ("release", "expected"),
    [
        ("# R35 (release), REVISION: 4.1, GCID: 1", "JetPack 5 (L4T 35.4.1)"),
        ("# R36 (release), REVISION: 4.7, GCID: 1", "JetPack 6 (L4T 36.4.7)"),
        ("# R38 (release), REVISION: 2.0, GCID: 1", "JetPack 7 (L4T 38.2.0)"),
        (None, "this is no Jetson"),
    ],
)
def test_a_python_that_is_too_old_is_refused_in_words_of_the_board(
    tmp_path: Path, release: str | None, expected: str
) -> None:
    old = tmp_path / "old-python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.8.10" && exit\nexit 1\n')
    old.chmod(0o755)
    (tmp_path / "wheels").mkdir()
    seal(tmp_path / "wheels")
    (tmp_path / "wheels/notes.txt").write_text("x")
    seal(tmp_path / "wheels")
    done = install(tmp_path / "wheels", tmp_path / "home", "--python", str(old), board=release)
    assert done.returncode == 2
    assert "Python 3.8.10 is too old, 3.10 or newer is needed" in done.stderr
    assert expected in done.stderr


def test_a_python_that_the_wheelhouse_brings_serves_a_board_whose_own_is_too_old(
    tmp_path: Path, pip_wheel: Path
) -> None:
    wheelhouse = make_wheelhouse(tmp_path / "wheels", pip_wheel, "1.0")
    (wheelhouse / f"{TAG}.txt").rename(wheelhouse / "cp399.txt")
    command = tmp_path / "python/bin/python3"
    command.parent.mkdir(parents=True)
    command.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    command.chmod(0o755)
    with tarfile.open(wheelhouse / INTERPRETER, "w:gz") as archive:
        archive.add(tmp_path / "python", "python")
    seal(wheelhouse)
    home = tmp_path / "home"
    prefix = "--prefix", ".local/share/turbojet"  # links must not depend on where it was run
    board = "# R35 (release), REVISION: 4.1, GCID: 1"
    done = install(wheelhouse, home, *prefix, python=None, board=board)
    assert done.returncode == 0, done.stderr
    assert "Board: JetPack 5 (L4T 35.4.1)\n" in done.stdout
    assert answer(home) == "turbojet 1.0\n"
    (release,) = releases(home)
    assert release.startswith("cp399-")
    assert (home / ".local/share/turbojet/runtime" / release / "python/bin/python3").exists()
    named = install(wheelhouse, home)  # who names a Python means that one
    assert (named.returncode, f"none for the {TAG}" in named.stderr) == (3, True)


def test_too_little_room_is_known_before_anything_is_unpacked(
    tmp_path: Path, pip_wheel: Path
) -> None:
    home = tmp_path / "home"
    (home / "bin").mkdir(parents=True)
    df = home / "bin/df"
    df.write_text("#!/bin/sh\necho 'Filesystem 1024-blocks Used Available Capacity Mounted on'\n")
    with df.open("a") as script:
        script.write("echo '/dev/mmcblk0p1 14384136 13281320 102400 100% /'\n")
    df.chmod(0o755)
    done = install(make_wheelhouse(tmp_path / "wheels", pip_wheel, "1.0"), home)
    assert done.returncode == 4
    assert "runtime has 100 MB free, 200 are needed; name another disk" in done.stderr
    assert releases(home) == []


@pytest.mark.parametrize("name", ["home", "ho me"])
def test_nothing_that_surrounds_it_gets_into_the_release(
    tmp_path: Path, pip_wheel: Path, name: str
) -> None:
    home, foreign = tmp_path / name, tmp_path / "foreign"
    (foreign / "lean-1.0.dist-info").mkdir(parents=True)
    (foreign / "lean-1.0.dist-info/METADATA").write_text("Name: lean\nVersion: 1.0\n")
    (foreign / "toy.py").write_text("def main(): print('foreign')\n")
    (home / "bin").mkdir(parents=True)
    (home / "bin/df").write_text("#!/bin/sh\necho 'overlay 0 0 0 - /'\n")  # says no size
    (home / "bin/df").chmod(0o755)
    wheelhouse = make_wheelhouse(tmp_path / "wheels", pip_wheel, "1.0")
    done = install(wheelhouse, home, PYTHONPATH=str(foreign), PIP_USER="1")
    assert done.returncode == 0, done.stderr
    (release,) = (home / ".local/share/turbojet/runtime").glob("cp*")
    assert list(release.rglob("lean.py"))
    command = [str(home / ".local/bin/turbojet")]
    found = subprocess.run(command, capture_output=True, env={"PYTHONPATH": str(foreign)})
    assert found.stdout == b"turbojet 1.0\n"


def test_an_unknown_argument_is_refused(tmp_path: Path) -> None:
    done = install(tmp_path, tmp_path / "home", "--frobnicate")
    assert (done.returncode, "unknown argument --frobnicate" in done.stderr) == (2, True)


def test_a_file_in_the_way_of_the_command_is_not_replaced(tmp_path: Path, pip_wheel: Path) -> None:
    home = tmp_path / "home"
    (home / ".local/bin").mkdir(parents=True)
    (home / ".local/bin/turbojet").write_text("mine")
    done = install(make_wheelhouse(tmp_path / "wheels", pip_wheel, "1.0"), home)
    assert (done.returncode, "is in the way" in done.stderr) == (1, True)
    assert (home / ".local/bin/turbojet").read_text() == "mine"


@pytest.mark.parametrize("script", ["install.sh", "build-wheelhouse"])
def test_scripts_explain_themselves_and_are_valid_sh(script: str) -> None:
    path = str(PACKAGING / script)
    subprocess.run(["sh", "-n", path], check=True)
    done = subprocess.run(["sh", path, "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[1].startswith(("Usage:", "the lean runtime"))
    linter = shutil.which("shellcheck")  # where it is installed; no Python package brings it
    if linter:
        subprocess.run([linter, path], check=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--python", "3.9"], "Python 3.9 is not supported"),
        (["--machine", "mips"], "machine is mips, expected aarch64 or x86_64"),
        (["--frobnicate"], "unknown argument --frobnicate"),
        (["--interpreter", "python.tgz"], "python.tgz is not called cpython-3.*-aarch64-unknown"),
        (["--interpreter", INTERPRETER], f"{INTERPRETER} holds no python/bin/python3"),
    ],
)
def test_build_wheelhouse_refuses_what_it_does_not_know(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    own = tmp_path / "turbojet_llm-0-py3-none-any.whl"
    own.write_bytes(b"")
    command = ["sh", str(PACKAGING / "build-wheelhouse"), "--output", str(tmp_path / "out")]
    env = {**os.environ, "PYTHON": sys.executable, "WHEEL": str(own)}
    done = subprocess.run([*command, *arguments], env=env, capture_output=True, text=True)
    assert (done.returncode, message in done.stderr) == (2, True), done.stderr
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.part").exists()
