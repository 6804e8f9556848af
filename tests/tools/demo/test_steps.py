"""Running commands that need each other."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT / 'tools/demo')
    import steps

    return steps


@pytest.fixture
def run(steps, tmp_path: Path):
    """Run (name, script, needs) triples; the scripts run in one folder."""

    def run(*triples, fingerprint='same', jobs=2):
        made = [
            steps.Step(name, [sys.executable, '-c', script.replace('OUT', str(tmp_path))], needs)
            for name, script, needs in triples
        ]
        return steps.run_steps(made, tmp_path, fingerprint, jobs)

    return run


def note(word: str) -> str:
    return f'open("OUT/notes", "a").write("{word} ")'


CHAIN = (('first', note('one'), []), ('second', note('two'), ['first']))


def notes(tmp_path: Path) -> list[str]:
    return (tmp_path / 'notes').read_text().split()


def test_a_step_waits_for_what_it_needs(run, tmp_path: Path):
    slow = ('first', 'import time; time.sleep(0.3); ' + note('one'), [])
    records = run(slow, CHAIN[1])
    assert notes(tmp_path) == ['one', 'two']
    assert list(records) == ['first', 'second']
    assert records['second']['started'] >= records['first']['started'] + 0.3


def test_steps_run_side_by_side(run):
    """Each ends only once the other runs."""
    meet = """
import pathlib, time
pathlib.Path('OUT/here_MINE').touch()
end = time.monotonic() + 60
while not pathlib.Path('OUT/here_OTHER').exists():
    assert time.monotonic() < end, 'the other step does not run'
    time.sleep(0.01)
"""
    pair = (('a', 'b'), ('b', 'a'))
    triples = ((x, meet.replace('MINE', x).replace('OTHER', y), []) for x, y in pair)
    assert set(run(*triples)) == {'a', 'b'}


def test_one_at_a_time_when_asked(run):
    records = run(*((name, 'import time; time.sleep(0.2)', []) for name in 'ab'), jobs=1)
    assert records['b']['started'] >= records['a']['started'] + records['a']['seconds']


def test_finished_steps_are_not_run_again(run, tmp_path: Path, capsys: pytest.CaptureFixture):
    first = run(*CHAIN)
    assert run(*CHAIN) == first
    assert notes(tmp_path) == ['one', 'two']
    assert '[second] finished before' in capsys.readouterr().out


@pytest.mark.parametrize('text', ['', '{"command"', '7', '[]', '{}', '{"seconds": "a"}'])
def test_a_step_with_a_damaged_record_is_run_again(run, tmp_path: Path, text: str):
    run(CHAIN[0])
    (tmp_path / 'steps/first.json').write_text(text)
    run(CHAIN[0])
    assert notes(tmp_path) == ['one', 'one']
    run(CHAIN[0])
    assert notes(tmp_path) == ['one', 'one']
    assert [path.name for path in (tmp_path / 'steps').iterdir()] == ['first.json']


def test_a_change_runs_what_follows_again(run, tmp_path: Path):
    run(*CHAIN)
    run(('first', note('new'), []), CHAIN[1])
    assert notes(tmp_path) == ['one', 'two', 'new', 'two']


def test_what_comes_before_a_change_is_kept(run, tmp_path: Path):
    run(*CHAIN)
    run(CHAIN[0], ('second', note('new'), ['first']))
    assert notes(tmp_path) == ['one', 'two', 'new']


def test_another_fingerprint_runs_everything_again(run, tmp_path: Path):
    run(*CHAIN)
    run(*CHAIN, fingerprint='other')
    assert notes(tmp_path) == ['one', 'two', 'one', 'two']


def test_a_failure_shows_the_end_of_the_log_and_stops_the_rest(run, steps, tmp_path: Path):
    failing = 'import sys; print("x" * 9000); print("the reason"); sys.exit(3)'
    begin = time.time()
    with pytest.raises(steps.StepError, match=r'(?s)`bad` failed with exit status 3.*the reason'):
        run(
            ('bad', failing, []),
            ('slow', 'import time; time.sleep(600)', []),
            ('never', note('never'), ['bad']),
        )
    assert time.time() - begin < 300
    assert not (tmp_path / 'notes').exists()
    assert not list((tmp_path / 'steps').iterdir())


def test_a_failed_step_is_tried_again(run, steps, tmp_path: Path):
    script = note('try') + '; import os; assert os.path.exists("OUT/mended")'
    with pytest.raises(steps.StepError, match='AssertionError'):
        run(('shaky', script, []))
    (tmp_path / 'mended').touch()
    run(('shaky', script, []))
    assert notes(tmp_path) == ['try', 'try']


def test_progress_is_shown_and_all_output_kept(run, tmp_path: Path, capsys: pytest.CaptureFixture):
    run(('train a', 'print("12:00 - mmengine - INFO - Iter(train) [1/2]"); print("chatter")', []))
    shown = capsys.readouterr().out
    assert '[train a] Iter(train) [1/2]' in shown
    assert '\nchatter' not in shown
    assert 'chatter' in (tmp_path / 'logs/train_a.log').read_text()


@pytest.mark.skipif(sys.platform != 'linux', reason='Linux tells a process that its parent died')
@pytest.mark.parametrize('name', ['SIGTERM', 'SIGKILL'])
def test_a_killed_demo_leaves_no_training_running(name, tmp_path: Path):
    script = f"""
import os, sys
sys.path.insert(0, {str(ROOT / 'tools/demo')!r})
from pathlib import Path
from steps import Step, run_steps
train = 'import os, time; print("Iter(train)", os.getpid(), flush=True); time.sleep(60)'
run_steps([Step('train', [sys.executable, '-c', train], [])], Path({str(tmp_path)!r}), '', 1)
"""
    demo = subprocess.Popen([sys.executable, '-c', script], stdout=subprocess.PIPE, text=True)
    shown = [demo.stdout.readline() for _ in range(2)]
    training = int(shown[1].split()[-1])
    demo.send_signal(getattr(signal, name))
    demo.wait()
    demo.stdout.close()
    for _ in range(100):
        if not is_running(training):
            return
        time.sleep(0.05)
    os.kill(training, signal.SIGKILL)
    pytest.fail('the training outlived the demo')


def is_running(process: int) -> bool:
    state = Path(f'/proc/{process}/stat')
    return state.exists() and state.read_text().split()[2] != 'Z'
