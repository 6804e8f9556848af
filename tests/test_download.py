"""A checkpoint of a URL is that URL's, whole, and what its name says."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from mmengine.runner import CheckpointLoader
from torch import nn

from mmdistill_ext import safe_loading
from mmdistill_ext.checkpoint import load_weights
from mmdistill_ext.download import download
from mmdistill_ext.safe_loading import trust
from tests.evil import Evil


class Host:
    """Serves files from memory; counts what is asked for; can cut what it sends."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.cut = False
        host = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                host.asked.append(self.path)
                content = host.files.get(self.path)
                if content is None:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header('Content-Length', str(len(content)))
                self.end_headers()
                self.wfile.write(content[: len(content) // 2] if host.cut else content)

            def log_message(self, *args: object) -> None:
                """Say nothing."""

        self.server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def url(self, path: str) -> str:
        return f'http://127.0.0.1:{self.server.server_port}{path}'

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Two hosts, and an empty hub folder."""
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    monkeypatch.setattr(safe_loading, '_TRUSTED', set())
    hosts = Host(), Host()
    yield hosts
    for host in hosts:
        host.stop()


def weights(tmp_path: Path, value: float, **more: object) -> bytes:
    torch.save(dict(state_dict=dict(weight=torch.full((2,), value)), **more), tmp_path / 'made.pth')
    return (tmp_path / 'made.pth').read_bytes()


def kept(tmp_path: Path) -> list[str]:
    files = (path for path in (tmp_path / 'hub').rglob('*') if path.is_file())
    return [path.name for path in files if path.name != '.lock']


def test_each_url_has_a_file_of_its_own(hosts: tuple[Host, Host], tmp_path: Path):
    for value, host in enumerate(hosts):
        for query in ('', '?version=2'):
            host.files[f'/latest.pth{query}'] = weights(tmp_path, value + 10 * bool(query))
    for _ in range(2):
        for value, host in enumerate(hosts):
            for query in ('', '?version=2'):
                state = load_weights(host.url(f'/latest.pth{query}'))['state_dict']
                assert state['weight'][0] == value + 10 * bool(query)
    assert [len(host.asked) for host in hosts] == [2, 2]


def test_mmengine_loads_the_same_file(hosts: tuple[Host, Host], tmp_path: Path):
    url = hosts[0].url('/latest.pth')
    hosts[0].files['/latest.pth'] = weights(tmp_path, 1.0)
    assert CheckpointLoader.load_checkpoint(url)['state_dict']['weight'][0] == 1
    assert load_weights(url)['state_dict']['weight'][0] == 1
    assert len(hosts[0].asked) == 1


def test_a_cut_download_is_named_and_not_kept(hosts: tuple[Host, Host], tmp_path: Path):
    host, url = hosts[0], hosts[0].url('/teacher.pth')
    host.files['/teacher.pth'], host.cut = weights(tmp_path, 1.0), True
    size = len(host.files['/teacher.pth'])
    with pytest.raises(
        ValueError, match=f"`key` .*'{url}'.*/hub/.*teacher.pth.* {size} bytes|Incom"
    ):
        load_weights(url, 'key')
    assert kept(tmp_path) == []
    host.cut = False
    assert load_weights(url, 'key')['state_dict']['weight'][0] == 1


def test_a_missing_file_is_named(hosts: tuple[Host, Host]):
    with pytest.raises(ValueError, match='`key` cannot be downloaded.*none.pth.*404'):
        load_weights(hosts[0].url('/none.pth'), 'key')


NAMES = ('resnet50-{}.pth', 'pspnet_20200605_112030-{}.pth', 'a%20b-{}.pth')


@pytest.mark.parametrize('name', NAMES)
def test_the_hash_in_the_name_is_checked(hosts: tuple[Host, Host], tmp_path: Path, name: str):
    content = weights(tmp_path, 1.0)
    digest = hashlib.sha256(content).hexdigest()
    right, wrong = (f'/{name.format(x)}' for x in (digest[:8], 'abcdef12'))
    hosts[0].files[right] = hosts[0].files[wrong] = content
    assert download(hosts[0].url(right)).is_file()
    url = hosts[0].url(wrong)
    with pytest.raises(ValueError, match=f'SHA-256 {digest[:8]}.*its name says abcdef12.*--trust'):
        load_weights(url, 'key')
    trust(url)
    assert load_weights(url, 'key')['state_dict']['weight'][0] == 1


@pytest.mark.parametrize('name', ['model-20200605.pth', 'r101-d8.pth', 'latest.pth'])
def test_other_names_have_no_hash(hosts: tuple[Host, Host], tmp_path: Path, name: str):
    hosts[0].files[f'/{name}'] = weights(tmp_path, 1.0)
    assert download(hosts[0].url(f'/{name}')).name == name


def test_a_copy_of_the_right_content_serves_whoever_downloaded_it(
    hosts: tuple[Host, Host], tmp_path: Path
):
    content = weights(tmp_path, 1.0)
    name = f'resnet-{hashlib.sha256(content).hexdigest()[:8]}.pth'
    shared = tmp_path / 'hub/checkpoints' / name
    shared.parent.mkdir(parents=True)
    shared.write_bytes(content)
    assert download(hosts[0].url(f'/{name}')) == shared
    assert hosts[0].asked == []
    shared.write_bytes(content[:-1])  # cut by somebody else's download
    hosts[0].files[f'/{name}'] = content
    assert download(hosts[0].url(f'/{name}')).read_bytes() == content


def test_what_is_no_checkpoint_names_url_and_copy(hosts: tuple[Host, Host], tmp_path: Path):
    url = hosts[0].url('/page.pth')
    hosts[0].files['/page.pth'] = b'<html>please log in</html>'
    with pytest.raises(ValueError, match=f"'{url}' .kept as '.*hub.*page.pth'.*Delete the copy"):
        load_weights(url, 'key')


def test_code_in_a_download_is_refused(hosts: tuple[Host, Host], tmp_path: Path):
    url = hosts[0].url('/evil.pth')
    hosts[0].files['/evil.pth'] = weights(tmp_path, 1.0, extra=Evil(tmp_path / 'ran'))
    for load in (load_weights, CheckpointLoader.load_checkpoint):
        with pytest.raises(ValueError, match=f'needs code to unpickle.*`--trust {url}`'):
            load(url)
    assert not (tmp_path / 'ran').exists()


def test_two_at_a_time_download_once(hosts: tuple[Host, Host], tmp_path: Path):
    url = hosts[0].url('/model.pth')
    hosts[0].files['/model.pth'] = weights(tmp_path, 1.0)
    paths: list[Path] = []
    threads = [threading.Thread(target=lambda: paths.append(download(url))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(hosts[0].asked) == 1
    assert len(set(paths)) == 1
    assert kept(tmp_path) == ['model.pth']


def test_init_cfg_of_a_url_goes_the_same_way(hosts: tuple[Host, Host], tmp_path: Path):
    torch.save(nn.Linear(1, 2).state_dict(), tmp_path / 'linear.pth')
    hosts[0].files['/linear.pth'] = (tmp_path / 'linear.pth').read_bytes()
    from mmengine.model import BaseModule

    class Pretrained(BaseModule):
        def __init__(self) -> None:
            url = hosts[0].url('/linear.pth')
            super().__init__(dict(type='Pretrained', checkpoint=url))
            self.weight = nn.Parameter(torch.zeros(2, 1))

    model = Pretrained()
    model.init_weights()
    assert torch.equal(model.weight, torch.load(tmp_path / 'linear.pth')['weight'])
