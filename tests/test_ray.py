"""Inference through Ray Data, and files in object stores."""

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image
from test_extras import hide
from test_infer import CONFIG, results_of, saved
from test_video import scene

from mmseg_volo._files import PARTIAL
from mmseg_volo._storage import existing, find_in_store
from mmseg_volo.apis import ray_inference
from mmseg_volo.apis.inference import Wanted, infer
from mmseg_volo.apis.ray_inference import DEATHS, FATAL, MODEL, SKIPPED, Setup, Worker, attempts_type
from mmseg_volo.apis.sources import load_model
from mmseg_volo.errors import UserError

WANTED = Wanted(('labels', 'overlay'), 0.5, False)


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory) -> str:
    return saved(tmp_path_factory.mktemp('ray') / 'random.pth', {})


@pytest.fixture
def folder(tmp_path) -> Path:
    """Twelve small pictures, the fourth and the ninth of which cannot be decoded."""
    folder = tmp_path / 'pictures'
    folder.mkdir()
    for i in range(12):
        Image.fromarray(scene(i, (64, 48))).save(folder / f'{i:02}.png')
    for i in (3, 8):
        (folder / f'{i:02}.png').write_bytes(b'no picture')
    return folder


@pytest.fixture
def store():
    """An empty object store in this process."""
    store = fsspec.filesystem('memory')
    yield store
    store.rm('/', recursive=True)
    MemoryFileSystem.store.clear()


def setup(weights: str, out: object, **changes: object) -> Setup:
    options = changes.pop('cfg_options', {})
    values = dict(
        model=load_model(CONFIG, changes.pop('checkpoint', weights), options),
        config=CONFIG,
        device='cpu',
        tta=False,
        amp=False,
        compile=False,
        openvino=False,
        void_below=0,
        out=str(out),
        wanted=WANTED,
    )
    return Setup(**{**values, **changes})


def batch(*files: object) -> dict[str, np.ndarray]:
    """Files as Ray Data passes them."""
    paths, names = [os.fsencode(file) for file in files], [os.fsencode(Path(file).stem) for file in files]
    return dict(path=np.array(paths, object), name=np.array(names, object))


def test_two_workers_give_the_files_of_a_single_process(folder, checkpoint, tmp_path):
    pytest.importorskip('ray.data', reason="pip install 'mmseg-volo[ray]'")
    alone, shared = tmp_path / 'alone', tmp_path / 'shared'
    bad = infer(CONFIG, checkpoint, [str(folder)], str(alone), device='cpu')
    for name in ('00.png', '07.png'):  # of a run that was interrupted
        for kind in ('pred', 'vis'):
            (shared / kind).mkdir(parents=True, exist_ok=True)
            (shared / kind / name).write_text('kept')
    (shared / 'vis/07.png').unlink()  # so that it is not finished
    arguments = [CONFIG, checkpoint, f'local://{folder}', '--out-dir', str(shared), '--device', 'cpu']  # for fsspec
    command = [sys.executable, '-m', 'mmseg_volo_cli', 'infer', *arguments, '--resume', '--ray']
    run = subprocess.run(command, capture_output=True, text=True)  # so that no thread of Ray's stays in this process
    assert run.returncode == 1, run.stderr
    output = run.stdout
    assert (
        output.index('03.png cannot')
        < output.index('08.png cannot')
        < output.index('9 of 11 images segmented on Ray (local) ')
    )
    assert [Path(path).name for path in bad] == ['03.png', '08.png'] and '2 skipped; 1 kept' in output
    assert (shared / 'pred/00.png').read_text() == 'kept'
    results = results_of(shared)
    assert len(results) == 20 and all(PARTIAL not in name for name in results)
    whole = results_of(alone)
    assert all(whole[name] == content for name, content in results.items() if not name.endswith('00.png'))


def test_resuming_keeps_what_is_finished_without_ray_too(folder, checkpoint, tmp_path, capsys):
    def run() -> list[str]:
        return infer(
            CONFIG, checkpoint, [str(folder)], str(tmp_path / 'out'), save=['labels', 'confidence'], resume=True
        )

    bad = run()
    before = results_of(tmp_path / 'out')
    (tmp_path / 'out/confidence/05.png').unlink()
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / 'out/pred').iterdir()}
    capsys.readouterr()
    assert run() == bad and '1 of 3 images segmented' in capsys.readouterr().out  # the damaged ones are tried again
    assert results_of(tmp_path / 'out') == before
    changed = [path.name for path, time in times.items() if path.stat().st_mtime_ns != time]
    assert changed == ['05.png']
    for name in ('03.png', '08.png'):
        (folder / name).unlink()
    assert run() == [] and 'all 10 results' in capsys.readouterr().out


def test_a_list_names_the_files(folder, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    (tmp_path / 'list.txt').write_text(f'02.png\n\nfile://{folder}/05.png\n')
    assert infer(CONFIG, checkpoint, [f'@{tmp_path}/list.txt', '07.png'], str(tmp_path / 'out'), save=['labels']) == []
    assert sorted(results_of(tmp_path / 'out')) == ['pred/02.png', 'pred/05.png', 'pred/07.png']
    (tmp_path / 'empty.txt').write_text('\n')
    for name, message in (('empty.txt', r'empty\.txt is empty'), ('none.txt', r'cannot read the list .*none\.txt')):
        with pytest.raises(UserError, match=message):
            infer(CONFIG, checkpoint, [f'@{tmp_path}/{name}'], str(tmp_path / 'out'))


# A worker without Ray


def test_a_worker_reads_from_a_store_and_writes_whole_objects_to_it(folder, checkpoint, tmp_path, store, monkeypatch):
    store.put(str(folder), '/bucket/in', recursive=True)
    urls = find_in_store('memory://bucket/in', ('.png',))
    assert urls == [f'memory:///bucket/in/{i:02}.png' for i in range(12)]
    assert find_in_store('memory://bucket/in/0[12].png', ('.png',)) == urls[1:3]
    assert find_in_store(urls[4], ('.png',)) == [urls[4]]
    puts, pipe_file = [], MemoryFileSystem.pipe_file
    monkeypatch.setattr(
        MemoryFileSystem, 'pipe_file', lambda self, *args: puts.append(args[0]) or pipe_file(self, *args)
    )
    rows = Worker(setup(checkpoint, 'memory://bucket/out'))(batch(*urls[:5]))
    assert rows['kind'] == ['', '', '', SKIPPED, ''] and '03.png cannot be decoded' in rows['text'][3]
    infer(CONFIG, checkpoint, [str(folder)], str(tmp_path / 'out'), device='cpu', opacity=0.5)
    names = [f'{kind}/{i:02}.png' for i in (0, 1, 2, 4) for kind in ('pred', 'vis')]
    assert sorted(puts) == sorted(f'/bucket/out/{name}' for name in names)  # one put each
    for name in names:
        assert store.cat_file(f'/bucket/out/{name}') == (tmp_path / 'out' / name).read_bytes()
    exists = existing('memory://bucket/out')
    assert exists('pred/00.png') and not exists('pred/03.png')


@pytest.mark.parametrize(
    ('changes', 'message'),
    [(dict(checkpoint='none.pth'), r'none\.pth'), (dict(cfg_options={'model.backbone.arch': 'd9'}), 'arch')],
)
def test_a_users_mistake_comes_back_as_text(changes, message, folder, checkpoint, tmp_path):
    rows = Worker(setup(checkpoint, tmp_path / 'out', **changes))(batch(folder / '00.png', folder / '01.png'))
    assert rows['kind'] == [FATAL] * 2 and message.replace('\\', '') in rows['text'][0]


def test_a_place_that_cannot_be_written_to_comes_back_as_text(folder, checkpoint, tmp_path):
    (tmp_path / 'out').write_text('a file')
    rows = Worker(setup(checkpoint, tmp_path / 'out'))(batch(folder / '00.png'))
    assert rows['kind'] == [FATAL] and 'cannot write to' in rows['text'][0]


class Handle:
    """A Ray actor's handle on an object of this process."""

    def __init__(self, actor: object):
        self.actor = actor

    def __getattr__(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(remote=getattr(self.actor, name))


@pytest.mark.parametrize('step', ['make_predictor', 'segment_files'])
def test_workers_that_die_again_and_again_come_back_as_text(step, folder, checkpoint, tmp_path, monkeypatch):
    pytest.importorskip('ray.data', reason="pip install 'mmseg-volo[ray]'")
    monkeypatch.setattr('ray.get', lambda value: value)
    attempts, files = attempts_type()(), batch(folder / '00.png', folder / '01.png')

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as deadly:
        deadly.setattr(ray_inference, step, die)
        for _ in range(2 * (DEATHS + 1) if step == 'make_predictor' else DEATHS + 1):
            with pytest.raises(KeyboardInterrupt):
                Worker(setup(checkpoint, tmp_path / 'out'), Handle(attempts), workers=2)(files)
    other = Worker(setup(checkpoint, tmp_path / 'out'), Handle(attempts), workers=2)
    rows = other(files)
    assert rows['kind'] == [FATAL] * 2 and 'workers died again and again at ' in rows['text'][0]
    assert ('the model' if step == 'make_predictor' else '00.png') in rows['text'][0]
    if step == 'segment_files':
        assert MODEL not in attempts.counts  # which other deaths have nothing to do with


# Bad input


def refused(message: str, *images: str, **settings) -> None:
    with pytest.raises(UserError, match=message):
        infer(CONFIG, 'never_read.pth', list(images), **settings)


def test_what_does_not_go_with_ray(folder, tmp_path):
    refused('label-studio does not go with', str(folder), save=['label-studio'], ray='local')
    refused('--workers must be at least 1', str(folder), workers=0, ray='local')
    refused('--workers must be at least 1, and goes with --ray', str(folder), workers=2)
    refused('s3://bucket/a.png is a URL, which needs --ray', 's3://bucket/a.png')
    refused('memory://out is a URL, which needs --ray', str(folder), out_dir='memory://out')


class Refusing(MemoryFileSystem):
    """A store without credentials."""

    protocol = 'refusing'

    def find(self, *args, **kwargs):
        raise PermissionError('Access Denied')

    def pipe_file(self, *args, **kwargs):
        raise PermissionError('Access Denied')


def test_stores_that_cannot_be_used_are_one_sentence(folder, store):
    fsspec.register_implementation('refusing', Refusing, clobber=True)
    refused(r'cannot use refusing://bucket/in \(PermissionError: Access Denied\)', 'refusing://bucket/in', ray='local')
    refused(r'cannot use refusing://out \(PermissionError', str(folder), out_dir='refusing://out', ray='local')
    refused('cannot use nonsense://bucket .*nonsense', 'nonsense://bucket', ray='local')
    refused('memory://empty has no images', 'memory://empty', ray='local')


@pytest.mark.parametrize(
    ('address', 'message'),
    [
        ('pictures', r"--ray takes HOST:PORT of a cluster.* got 'pictures'"),
        ('127.0.0.1:1', 'no Ray cluster answers at'),
    ],
)
def test_a_cluster_that_does_not_answer(address, message, folder, tmp_path):
    pytest.importorskip('ray.data', reason="pip install 'mmseg-volo[ray]'")
    refused(message, str(folder), out_dir=str(tmp_path / 'out'), ray=address)


@pytest.mark.parametrize('answer', [b'HTTP/1.1 400 Bad', b''])
def test_another_service_at_the_address(answer, folder, tmp_path):
    pytest.importorskip('ray.data', reason="pip install 'mmseg-volo[ray]'")
    with socket.create_server(('127.0.0.1', 0)) as service:

        def serve() -> None:
            with service.accept()[0] as connection:
                connection.recv(100)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        address = f'127.0.0.1:{service.getsockname()[1]}'
        refused(
            f'no Ray cluster answers at {address} .another service', str(folder), out_dir=str(tmp_path), ray=address
        )
        thread.join()


def test_a_service_that_keeps_silent_is_not_waited_for(folder, tmp_path, monkeypatch):
    pytest.importorskip('ray.data', reason="pip install 'mmseg-volo[ray]'")
    monkeypatch.setattr(ray_inference, 'PATIENCE', 0.2)
    with socket.create_server(('127.0.0.1', 0)) as service:
        address = f'127.0.0.1:{service.getsockname()[1]}'
        refused(rf'answers at {address} \(timed out', str(folder), out_dir=str(tmp_path), ray=address)


def test_ray_that_is_missing_names_its_extra(folder, tmp_path, monkeypatch):
    hide(monkeypatch, 'ray')
    refused(r"--ray needs ray: pip install 'mmseg-volo\[ray\]'", str(folder), out_dir=str(tmp_path), ray='local')
