import io
from itertools import count, pairwise

import pytest
from rich.console import Console

from host_tools.progress import (
    BYTES,
    PlainProgress,
    Progress,
    RichProgress,
    format_amount,
    make_progress,
)


def test_amounts_name_their_unit():
    assert format_amount(3, 30, "layers") == "3 of 30 layers"
    assert format_amount(3, None, "layers") == "3 layers"
    assert format_amount(3, 4, "") == "3 of 4"
    assert format_amount(1500, 98_200_000, BYTES) == "1.5 kB of 98.2 MB"
    assert format_amount(1500, None, BYTES) == "1.5 kB"


def test_the_base_is_silent_and_counts(capsys):
    progress = Progress()
    with progress.task("calibrate", total=4, unit="layers") as task:
        task.advance()
        task.advance(2)
        progress.note("nothing to see")
    assert task.completed == 3
    assert capsys.readouterr() == ("", "")


def test_plain_lines_come_every_five_seconds_with_the_time_that_is_left():
    stream = io.StringIO()
    clock = count(0, 2)  # every look at the clock is 2 s later
    progress = PlainProgress(stream, clock=lambda: float(next(clock)))
    with progress.task("calibrate", total=4, unit="layers") as task:
        for _ in range(4):
            task.advance()
    # started at 0; looks at 2, 4, 6 (shown: 3 of 4 after 6 s, so 2 s left), 8; finished at 10
    assert stream.getvalue().splitlines() == [
        "calibrate: 3 of 4 layers, 75%, 2.0 s left",
        "calibrate: 4 of 4 layers in 10 s",
    ]


def test_what_an_earlier_run_left_done_tells_nothing_about_the_time_that_is_left():
    stream = io.StringIO()
    now = iter([0.0, 0.0, 10.0, 10.0])
    progress = PlainProgress(stream, clock=lambda: next(now))
    with progress.task("quantize", total=32, unit="layers") as task:
        task.begin_at(20)
        task.move_to(22)  # two layers in 10 s, ten are left
    assert stream.getvalue().splitlines()[0] == "quantize: 22 of 32 layers, 69%, 50 s left"


def test_plain_lines_become_rarer_but_never_stop():
    stream = io.StringIO()
    now = [0.0]
    progress = PlainProgress(stream, clock=lambda: now[0])
    with progress.task("quantize", total=20_000) as task:
        for _ in range(10_000):
            now[0] += 1
            task.advance()
    shown = [int(line.split()[1]) for line in stream.getvalue().splitlines()]
    gaps = [later - earlier for earlier, later in pairwise(shown)]
    # 5 s up to 100 s, a twentieth of the time so far after that, a minute from 1200 s on
    assert gaps[0] == 5
    assert max(gaps) == 60
    assert sorted(gaps[:-1]) == gaps[:-1]


def test_a_task_that_fails_still_says_how_far_it_came():
    stream = io.StringIO()
    progress = PlainProgress(stream, clock=lambda: 0.0)
    with pytest.raises(RuntimeError), progress.task("convert", unit=BYTES) as task:
        task.move_to(1500, total=3000)
        raise RuntimeError
    assert stream.getvalue() == "convert: 1.5 kB of 3.0 kB in 0.0 s\n"


def test_bars_on_a_terminal_may_overlap_and_end_complete():
    stream = io.StringIO()
    progress = RichProgress(Console(file=stream, force_terminal=True, width=100))
    with progress.task("fetch", total=2, unit="files") as outer:
        with progress.task("weights", total=10, unit=BYTES) as inner:
            inner.advance(10)
        progress.note("[not markup]")
        outer.move_to(2)
    with progress.task("convert", total=1, unit="layers") as task:
        task.advance()
    shown = stream.getvalue()
    assert "2 of 2 files" in shown
    assert "10 B of 10 B" in shown
    assert "[not markup]" in shown
    assert "1 of 1 layers" in shown


def test_a_pipe_gets_lines_and_a_terminal_gets_bars():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    assert isinstance(make_progress(io.StringIO()), PlainProgress)
    assert isinstance(make_progress(Terminal()), RichProgress)
