"""The file that the hook writes after a validation and that the export reads."""

import json

import pytest
import torch

from mmdistill_ext.network_scores import best_network, record_scores


def test_the_file_holds_every_validation_once(tmp_path):
    path = tmp_path / 'networks.json'
    for iteration in (2, 4, 6):
        record_scores(tmp_path, iteration, dict(best='a'))
    record_scores(tmp_path, 4, dict(best='b'))  # a resumed run: 6 was not reached
    assert json.loads(path.read_text()) == {'2': dict(best='a'), '4': dict(best='b')}
    record_scores(tmp_path, 10, dict(best='a'))
    assert list(json.loads(path.read_text())) == ['2', '4', '10']


def test_the_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / 'networks.json'
    record_scores(tmp_path, 2, dict(best='a'))
    before = path.read_text()

    def fail(self, text, **options):
        self.open('w').write(text[:5])
        raise OSError('no space left')

    monkeypatch.setattr(type(path), 'write_text', fail)
    with pytest.raises(OSError, match='no space'):
        record_scores(tmp_path, 4, dict(best='b'))
    assert path.read_text() == before
    assert [x.name for x in tmp_path.iterdir()] == ['networks.json']


DAMAGED = dict(
    empty='',
    cut='{"2": {"best": "a"',
    list='[1, 2]',
    number='7',
    name='{"two": {"best": "a"}}',
    entry='{"2": 7}',
    nothing='{"2": {}}',
    other='{"2": {"best": 7}}',
    bytes='\ufffd',
)


@pytest.mark.parametrize('kind', DAMAGED)
def test_a_damaged_file_is_named_by_the_export_and_put_aside_by_the_run(tmp_path, kind):
    path, checkpoint = tmp_path / 'networks.json', tmp_path / 'iter_4.pth'
    path.write_text(DAMAGED[kind])
    if kind == 'bytes':
        path.write_bytes(b'\xff\xfe')
    torch.save(dict(state_dict=dict(a=torch.ones(1)), meta=dict(iter=4)), checkpoint)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"'.*networks.json' should (hold|name)"):
        best_network(checkpoint)
    record_scores(tmp_path, 4, dict(best='a'))
    assert best_network(checkpoint) == 'a'
    assert (tmp_path / 'networks.json.damaged').read_bytes() == before
