"""The folder of a run: its lock, what killed runs leave, the checkpoint to go on from."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmdistill_ext.checkpoint import TEMPORARY, write_atomic
from mmdistill_ext.work_dir import LATEST, latest_checkpoint, locked

HOLD = """
import sys, time
from mmdistill_ext.work_dir import locked
with locked(sys.argv[1]):
    print('locked', flush=True)
    time.sleep(60)
"""


def save(folder: Path, *names: str) -> list[str]:
    for name in names:
        torch.save(dict(state_dict={}), folder / name)
    return [str(folder / name) for name in names]


def test_goes_on_from_what_the_last_run_named(tmp_path):
    first, _ = save(tmp_path, 'iter_2.pth', 'iter_10.pth')
    (tmp_path / LATEST).write_text(first)
    assert latest_checkpoint(tmp_path) == first


@pytest.mark.parametrize('note', [None, '', 'gone', 'cut'])
def test_goes_on_from_the_newest_whole_one_where_the_note_is_of_no_use(note, tmp_path):
    _, whole, cut = save(tmp_path, 'iter_2.pth', 'iter_10.pth', 'iter_12.pth')
    save(tmp_path, 'best_mIoU_iter_14.pth', 'exported.pth')
    Path(cut).write_bytes(Path(cut).read_bytes()[:-9])
    if note is not None:
        text = dict(gone=str(tmp_path / 'iter_16.pth'), cut=cut).get(note, note)
        (tmp_path / LATEST).write_text(text)
    assert latest_checkpoint(tmp_path) == whole


def test_starts_anew_without_any_checkpoint(tmp_path):
    (tmp_path / LATEST).write_text('')
    (tmp_path / 'iter_2.pth').write_bytes(b'PK')
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / 'none') is None


def test_a_second_run_is_refused_until_the_first_one_is_killed(tmp_path):
    first = subprocess.Popen(
        [sys.executable, '-c', HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert first.stdout.readline() == 'locked\n'
        with pytest.raises(ValueError, match='`work_dir`.*no other run'), locked(tmp_path):
            pass
    finally:
        first.kill()
        first.wait()
        first.stdout.close()
    with locked(tmp_path):
        pass


def test_what_killed_runs_left_half_written_is_swept(tmp_path):
    kept = tmp_path / 'vis_data' / 'fit.png'
    left = kept.with_name(f'{TEMPORARY}1-fit.png')
    kept.parent.mkdir()
    for file in (kept, left):
        file.touch()
    with locked(tmp_path):
        assert kept.exists()
        assert not left.exists()


@pytest.mark.parametrize('umask', [0o022, 0o077, 0o002])
def test_files_have_the_rights_of_the_umask(umask, tmp_path):
    before = os.umask(umask)
    try:
        write_atomic(tmp_path / 'a.txt', lambda path: path.write_text('a'))
    finally:
        os.umask(before)
    assert (tmp_path / 'a.txt').stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / 'a.txt').write_text('old')

    def fail(path: Path) -> None:
        path.write_text('new')
        raise OSError('disk full')

    with pytest.raises(OSError, match='disk full'):
        write_atomic(tmp_path / 'a.txt', fail)
    assert [p.name for p in tmp_path.iterdir()] == ['a.txt']
    assert (tmp_path / 'a.txt').read_text() == 'old'
