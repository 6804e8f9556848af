"""The file that the hook writes after a validation and that the export reads."""

import json

import pytest

from mmdistill_ext.network_scores import record_scores


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
