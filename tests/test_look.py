"""The page of ``mmseg-volo look``: exact labels, corrections, keys, and who may ask for them."""

import errno
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage
from test_extras import hide
from test_report import CONFIG, random_checkpoint

from mmseg_volo.apis.inference import infer
from mmseg_volo.datasets.full_check import check_all_data
from mmseg_volo.datasets.toy_streets import make_toy_streets
from mmseg_volo.errors import UserError
from mmseg_volo.look import listen, look, open_album

pytest.importorskip('fastapi', reason='no fastapi')
pytest.importorskip('uvicorn', reason='no uvicorn')
from mmseg_volo.look import album as album_module  # noqa: E402
from mmseg_volo.look.server import Server, make_app  # noqa: E402

TOKEN = 'a token of the test'
WIDTH, HEIGHT = 96, 64
LAST = 3  # number of the last toy street; broken pictures follow


def opened(folder: Path, checkpoint: Path, out: Path, **more) -> tuple:
    arguments = dict(labels=None, overwrite=False, device='cpu', amp=False, cfg_options={}) | more
    return open_album(str(CONFIG), str(checkpoint), str(folder), out_dir=str(out), **arguments)


@contextmanager
def serving(*args, **more) -> Iterator[SimpleNamespace]:
    """A server on a free port in a thread."""
    album, files = opened(*args, **more)
    with listen(0) as listener:
        server = Server(make_app(album, files, 'streets', TOKEN), album)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        port = listener.getsockname()[1]
        address = f'http://127.0.0.1:{port}'
        yield SimpleNamespace(address=address, port=port, album=album, files=files, folder=args[0], out=args[2])
        server.should_exit = True
        thread.join()


@pytest.fixture(scope='module')
def place(tmp_path_factory) -> Path:
    """Toy streets in ``toy``, and ``photos`` with four of them, one that is damaged and one of a single pixel."""
    folder = tmp_path_factory.mktemp('look')
    make_toy_streets(folder / 'toy', train=1, val=4, size=(WIDTH, HEIGHT))
    random_checkpoint(folder / 'model.pth')
    shutil.copytree(folder / 'toy/leftImg8bit/val', folder / 'photos')
    (folder / 'photos/z_broken.png').write_bytes(b'\x89PNG and no more')
    Image.new('RGB', (1, 1)).save(folder / 'photos/z_dot.png')
    return folder


@pytest.fixture(scope='module')
def streets(place) -> Iterator[SimpleNamespace]:
    options = {'data_root': str(place / 'toy')}
    with serving(place / 'toy/leftImg8bit/val', place / 'model.pth', place / 'out', cfg_options=options) as running:
        yield running


@pytest.fixture(scope='module')
def photos(place) -> Iterator[SimpleNamespace]:
    with serving(place / 'photos', place / 'model.pth', place / 'out_photos') as running:
        yield running


@pytest.fixture(scope='module')
def predicted(place) -> list[np.ndarray]:
    """Label maps that ``infer`` writes for the toy streets."""
    infer(
        str(CONFIG),
        str(place / 'model.pth'),
        [str(place / 'toy/leftImg8bit/val')],
        str(place / 'infer'),
        'cpu',
        ['labels'],
    )
    return [np.array(Image.open(path)) for path in sorted((place / 'infer/pred').glob('*.png'))]


@pytest.fixture
def clean(streets) -> None:
    """Without corrections of an earlier test."""
    shutil.rmtree(streets.out / 'labels', ignore_errors=True)


# The page


@pytest.fixture
def visit(browser):
    """Open the page of a server in a new tab; every request must go to it and nothing may complain."""
    contexts, foreign, complaints = [], [], []

    def open_page(running: SimpleNamespace, number: int = 0, context=None, **options):
        if context is None:
            context = browser.new_context(
                **dict(viewport=dict(width=1280, height=800), reduced_motion='reduce') | options
            )
            contexts.append(context)
        page = context.new_page()
        page.on('request', lambda request: request.url.startswith(running.address) or foreign.append(request.url))
        page.on('pageerror', lambda error: complaints.append(str(error)))
        page.goto(f'{running.address}/#token={TOKEN}&picture={number}')
        shows(page, number)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert (foreign, complaints) == ([], [])


def until(page, expression: str, seconds: float = 60):
    """Wait for a JavaScript expression; its value. (The page's policy forbids playwright's own way, which is eval.)"""
    end = time.monotonic() + seconds
    while not (value := page.evaluate(expression)):
        assert time.monotonic() < end, f'{expression}: {page.inner_text("#message")} {page.inner_text("#problem")}'
        page.wait_for_timeout(30)
    return value


def shows(page, number: int) -> None:
    until(page, f'look.number === {number} && document.querySelector("#busy").hidden')


def ids(page) -> np.ndarray:
    return np.array(page.evaluate('[...look.labels]'), np.uint8).reshape(HEIGHT, WIDTH)


def point(page, x: int, y: int) -> tuple[float, float]:
    """Where on the screen a pixel of the picture is."""
    box = page.locator('#canvas').bounding_box()
    at = page.evaluate(
        f'[look.x + ({x} + .5) * look.scale, look.y + ({y} + .5) * look.scale].map(v => v / devicePixelRatio)'
    )
    return box['x'] + at[0], box['y'] + at[1]


def drag(page, *places: tuple[int, int]) -> None:
    page.mouse.move(*point(page, *places[0]))
    page.mouse.down()
    for x, y in places[1:]:
        page.mouse.move(*point(page, x, y))
    page.mouse.up()


def disc(x: int, y: int, size: int) -> np.ndarray:
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    return (rows - y) ** 2 + (columns - x) ** 2 <= size**2 / 4


def message(page) -> str:
    return until(
        page, 'document.querySelector("#message").hidden ? "" : document.querySelector("#message").textContent'
    )


def test_labels_in_the_page_and_on_its_canvas_are_those_of_infer(visit, streets, predicted, clean):
    page = visit(streets)
    page.locator('#opacity').fill('100')
    palette = np.array(streets.album.predictor.palette)
    for number, expected in enumerate(predicted):
        shows(page, number)
        assert np.array_equal(ids(page), expected)
        for scale in (1, 3, 7.5):  # at any size a pixel of the screen shows the pixel of the picture under its centre
            page.evaluate(f'Object.assign(look, {{scale: {scale}, x: 10, y: 10}})')
            page.keyboard.press('l')
            page.evaluate('new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))')
            wide, high = int(WIDTH * scale), int(HEIGHT * scale)
            drawn = page.evaluate(f'[...canvas.getContext("2d").getImageData(10, 10, {wide}, {high}).data]')
            rows, columns = (((np.arange(n) + 0.5) / scale).astype(int) for n in (high, wide))
            colours = palette[expected][rows][:, columns]
            assert np.array_equal(np.array(drawn).reshape(high, wide, 4)[..., :3], colours)
        if number < LAST:
            page.evaluate('look.order = [0, 1, 2, 3]')
            page.keyboard.press('ArrowRight')


def test_the_confidence_is_that_of_the_probabilities_of_infer(place, streets):
    folder = str(streets.folder)
    infer(str(CONFIG), str(place / 'model.pth'), [folder], str(place / 'prob'), 'cpu', ['prob'])
    for number, path in enumerate(sorted((place / 'prob/prob').glob('*.npy'))):
        best = np.load(path).astype(float).max(0) * 255
        plane = np.frombuffer(zlib.decompress(streets.album.result(number).confidence), np.uint8).reshape(best.shape)
        assert np.abs(plane - best).max() < 0.6 and streets.album.entries[number].confidence == plane.mean() / 255


def test_brush_fill_and_undo_change_exactly_the_pixels_they_should(visit, streets, predicted, clean):
    page = visit(streets, 1)
    page.keyboard.press('b')
    page.get_by_role('button', name='Paint car').click()
    expected, car = predicted[1].copy(), 13
    drag(page, (20, 30))
    expected[disc(20, 30, 9)] = car
    assert np.array_equal(ids(page), expected)
    page.keyboard.press(']')
    drag(page, (0, 63), (10, 53), (40, 53))  # over the corner of the picture
    for x, y in [*((i, 63 - i) for i in range(11)), *((i, 53) for i in range(11, 41))]:
        expected[disc(x, y, 15)] = car
    assert np.array_equal(ids(page), expected)
    page.keyboard.press('f')
    page.get_by_role('button', name='Paint void').click()
    drag(page, (20, 30))
    regions, _ = ndimage.label(expected == car)
    filled = np.where(regions == regions[30, 20], 255, expected)
    assert np.array_equal(ids(page), filled) and (filled == car).any() == (regions.max() > 1)
    for undone in (expected, None, predicted[1]):
        page.keyboard.press('Control+z')
        assert undone is None or np.array_equal(ids(page), undone)
    assert page.locator('#undo').is_disabled() and page.title().startswith('toytown')  # no change is left
    for _ in range(3):
        page.keyboard.press('Control+Shift+z')
    assert np.array_equal(ids(page), filled) and page.locator('#redo').is_disabled()


def test_saved_labels_are_read_back_and_pass_check_data(visit, streets, place, clean):
    page = visit(streets, 2)
    page.keyboard.press('b')
    drag(page, (5, 5), (90, 60))
    page.get_by_role('button', name='Paint void').click()
    drag(page, (50, 8))
    page.keyboard.press('Control+s')
    assert 'Saved as' in message(page)
    edited, file = ids(page), streets.files.places[2]
    written = Image.open(file)
    assert np.array_equal(np.array(written), edited) and (edited == 255).any() and written.mode == 'P'
    assert written.getpalette()[: 19 * 3] == np.array(streets.album.predictor.palette).ravel().tolist()
    page.reload()
    shows(page, 2)
    assert np.array_equal(ids(page), edited) and not page.evaluate('look.undo.length')
    for number in (0, 1, 3):  # accepted as they are
        page = visit(streets, number)
        page.get_by_role('button', name='Save labels').click()
        assert 'Saved as' in message(page)
    options = {
        f'val_dataloader.dataset.{key}': value
        for key, value in (
            ('data_root', ''),
            ('data_prefix.img_path', str(streets.folder)),
            ('data_prefix.seg_map_path', str(streets.out / 'labels')),
        )
    }
    assert not [f for f in check_all_data(str(CONFIG), str(place / 'c.png'), ['val'], options) if f.level == 'error']


def test_true_labels_give_the_errors(visit, streets, place, predicted, clean):
    page = visit(streets, 3)
    path = sorted((place / 'toy/gtFine/val').rglob('*_labelTrainIds.png'))[3]
    truth = np.array(Image.open(path))
    page.keyboard.press('e')
    known = truth != 255
    differ = f'{(truth != predicted[3])[known].mean() * 100:.1f} % of {known.sum()} true labels differ'
    until(page, f'document.querySelector("#agreement").textContent.includes("{differ}")')
    page.locator('#restart').select_option('truth')
    assert np.array_equal(ids(page), truth)
    until(page, 'document.querySelector("#agreement").textContent.startsWith("0.0 %")')
    page.keyboard.press('Control+z')
    assert np.array_equal(ids(page), predicted[3])


def test_two_tabs_do_not_replace_each_others_labels_unseen(visit, streets, clean):
    first = visit(streets)
    second = visit(streets, context=first.context)
    for page, x in ((first, 10), (second, 80)):
        page.keyboard.press('b')
        drag(page, (x, 20))
    first.keyboard.press('Control+s')
    assert 'Saved as' in message(first)
    kept = streets.files.places[0].read_bytes()
    second.keyboard.press('Control+s')
    second.get_by_role('button', name='Decide later').click()
    assert streets.files.places[0].read_bytes() == kept and second.evaluate('look.undo.length') == 1
    second.keyboard.press('Control+s')
    second.get_by_role('button', name='Replace them by mine').click()
    assert 'Saved as' in message(second)
    assert np.array_equal(np.array(Image.open(streets.files.places[0])), ids(second))
    drag(first, (50, 50))
    first.keyboard.press('Control+s')
    first.get_by_role('button', name='Load the other ones').click()
    until(first, 'look.labels && look.undo.length === 0')
    assert np.array_equal(ids(first), ids(second))


def test_changes_are_not_lost_by_leaving(visit, streets, clean):
    page = visit(streets)
    page.evaluate('look.order = [0, 1, 2, 3]')
    page.keyboard.press('b')
    drag(page, (30, 30))
    changed = ids(page)
    page.keyboard.press('ArrowRight')
    page.get_by_role('button', name='Stay here').click()
    assert np.array_equal(ids(page), changed) and page.title().startswith('•')
    asked = []
    page.on('dialog', lambda dialog: (asked.append(dialog.type), dialog.dismiss()))
    page.close(run_before_unload=True)
    until(page, 'true')
    assert asked == ['beforeunload']
    page.keyboard.press('ArrowRight')
    page.get_by_role('button', name='Save', exact=True).click()
    shows(page, 1)
    assert np.array_equal(np.array(Image.open(streets.files.places[0])), changed)


def test_a_full_disk_is_named_and_the_change_is_kept(visit, streets, clean, monkeypatch):
    def write(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    page = visit(streets)
    page.keyboard.press('b')
    drag(page, (30, 30))
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, 'save', write)
        page.keyboard.press('Control+s')
        assert 'could not be saved (No space left on device)' in message(page)
    assert page.title().startswith('•') and not list((streets.out / 'labels').rglob('*'))[1:]
    page.keyboard.press('Control+s')
    until(page, '!document.title.startsWith("•")')
    assert np.array_equal(np.array(Image.open(streets.files.places[0])), ids(page))


def test_pictures_that_fail_are_named_and_the_others_go_on(visit, photos):
    until(page := visit(photos), f'look.ranked === {LAST + 3}')
    assert page.evaluate('look.order').index(LAST + 1) >= LAST + 1  # after those that have labels
    page.locator('#list').evaluate('list => list.scrollTop = 1e6')
    for number, words in ((LAST + 1, 'z_broken.png cannot be decoded'), (LAST + 2, 'z_dot.png is 1 x 1, too small')):
        page.locator(f'#picture-{number}').click()
        shows(page, number)
        assert words in page.inner_text('#problem') and words in page.locator(f'#picture-{number} small').text_content()
        assert '/' not in page.inner_text('#problem')
    page.keyboard.press('Home')
    until(page, 'look.labels')


def test_a_dropped_picture_gets_the_labels_of_infer(visit, photos, streets, predicted):
    page = visit(photos)
    path = sorted(streets.folder.rglob('*.png'))[2]
    page.locator('#file').set_input_files(path)
    until(page, 'look.number > 5 && look.labels')
    assert np.array_equal(ids(page), predicted[2]) and page.inner_text('#name') == path.name
    assert page.locator('#save').is_disabled() and page.locator('[data-tool=brush]').is_disabled()
    for file, words in (
        (dict(name='no.png', buffer=b'not a picture'), 'no.png cannot be decoded'),
        (dict(name='b.png', buffer=b'\x89PNG\r\n\x1a\n' + png_header(20000, 20000)), 'b.png has 20000 x 20000 pixels'),
    ):
        page.locator('#file').set_input_files(dict(file, mimeType='image/png'))
        until(page, f'document.querySelector("#problem").textContent.includes("{words}")')
    page.evaluate('look.album.mostBytes = 10')
    page.locator('#file').set_input_files(path)
    assert 'more than 10 bytes' in message(page)


def png_header(width: int, height: int) -> bytes:
    body = b'IHDR' + width.to_bytes(4, 'big') + height.to_bytes(4, 'big') + b'\x08\x02\0\0\0'
    return b'\0\0\0\x0d' + body + zlib.crc32(body).to_bytes(4, 'big')


def test_everything_has_a_name_and_works_from_the_keyboard(visit, streets, predicted, clean):
    page = visit(streets, 1)
    page.keyboard.press('?')
    assert page.get_by_role('heading', name='Keys').is_visible()
    page.keyboard.press('Escape')
    nodes = page.context.new_cdp_session(page).send('Accessibility.getFullAXTree')['nodes']
    roles = ('button', 'checkbox', 'slider', 'combobox', 'listbox', 'option', 'application', 'textbox', 'radio')
    controls = [node for node in nodes if node.get('role', {}).get('value') in roles and not node.get('ignored')]
    assert len(controls) > 50 and [node for node in controls if not node.get('name', {}).get('value')] == []
    seen = []
    for _ in range(120):  # Tab goes through every control and on to the browser's own: no trap
        page.keyboard.press('Tab')
        focused = page.evaluate(
            'document.activeElement.id || document.activeElement.ariaLabel || document.activeElement.tagName'
        )
        seen.append(focused)
        ring = page.evaluate(
            'document.activeElement === document.body || getComputedStyle(document.activeElement).outlineStyle'
        )
        assert ring in (True, 'solid', 'auto'), focused
        if focused in seen[:-1]:
            break
    assert {'previous', 'save', 'Brush', 'size', 'canvas', 'opacity', 'sort', 'list', 'Paint road'} <= set(seen)
    page.locator('#canvas').focus()
    page.keyboard.press('b')
    page.keyboard.press('[')
    for key in ('Shift+ArrowLeft', 'Shift+ArrowUp', 'Shift+ArrowUp', 'Enter'):
        page.keyboard.press(key)
    expected = np.where(disc(WIDTH // 2 - 1, HEIGHT // 2 - 2, 5), 0, predicted[1])
    assert np.array_equal(ids(page), expected)
    assert message(page).startswith('road at 47, 30')


CONTRAST = """() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const over = (colour, below) => {
    canvas.fillStyle = below ? `rgb(${below})` : '#fff'; canvas.fillRect(0, 0, 1, 1);
    canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const behind = element => over(getComputedStyle(element).backgroundColor,
    element.parentElement && behind(element.parentElement));
  const light = rgb => rgb.map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const low = [];
  for (const element of document.querySelectorAll('body *')) {
    const text = [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
    if (!text || !element.checkVisibility() || element.matches(':disabled, script')) continue;
    const below = behind(element), [a, b] = [below, over(getComputedStyle(element).color, below)].map(light);
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) low.push(`${element.tagName} ${element.textContent.trim().slice(0, 30)} ${ratio.toFixed(2)}`);
  }
  return low;
}"""


@pytest.mark.parametrize('width', [390, 1280])
@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_the_page_fits_follows_the_scheme_and_has_contrast(visit, streets, width, scheme):
    page = visit(streets, viewport=dict(width=width, height=800), color_scheme=scheme, has_touch=width == 390)
    assert page.evaluate('document.documentElement.scrollWidth') == width
    red = page.evaluate('Number(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])')
    assert (red < 64) == (scheme == 'dark')
    assert page.evaluate(CONTRAST) == []
    page.evaluate("document.querySelector('#keys').showModal()")
    assert page.evaluate(CONTRAST) == []


# Who may ask, and for what


def ask(
    running: SimpleNamespace, path: str, method: str = 'GET', body: bytes | None = None, **headers
) -> tuple[int, bytes]:
    """Status and body of an answer, over a socket of its own; ``Host`` and the token are sent unless replaced."""
    sent = {'Host': f'127.0.0.1:{running.port}', 'X-Token': TOKEN} | headers
    connection = http.client.HTTPConnection('127.0.0.1', running.port, timeout=60)
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    for name, value in sent.items():
        connection.putheader(name.replace('_', '-'), value)
    if body is not None:
        connection.putheader('Content-Length', str(len(body)))
    connection.endheaders(body)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, content


@pytest.mark.parametrize(
    ('path', 'headers', 'status'),
    [
        ('/api/album', {}, 200),
        (
            '/api/album',
            {'Host': 'localhost:8000', 'Origin': 'http://localhost:8000', 'Sec-Fetch-Site': 'same-origin'},
            200,
        ),
        ('/', {'X-Token': '', 'Sec-Fetch-Site': 'cross-site'}, 200),  # a link to the page, which holds no data
        ('/api/album', {'X-Token': ''}, 401),
        ('/api/album', {'X-Token': TOKEN[:-1]}, 401),
        ('/api/album', {'X-Token': 'Ã¼'}, 401),
        ('/api/pictures/no number', {'X-Token': ''}, 401),
        ('/', {'Host': 'evil.example'}, 403),  # DNS rebinding
        ('/api/album', {'Host': 'evil.example:8000'}, 403),
        ('/api/album', {'Host': '127.0.0.1.evil.example'}, 403),
        ('/api/album', {'Host': ''}, 403),
        ('/api/album', {'Origin': 'http://evil.example'}, 403),
        ('/api/album', {'Origin': 'null'}, 403),
        ('/api/album', {'Origin': 'http://127.0.0.1:1'}, 403),  # another local server
        ('/api/album', {'Sec-Fetch-Site': 'cross-site'}, 403),
        ('/page.js', {'Sec-Fetch-Site': 'same-site'}, 403),
        ('/api/pictures/6', {}, 404),
        ('/api/pictures/-1/view', {}, 404),
        ('/api/pictures/0/labels/../../1', {}, 404),
        ('/api/pictures/..%2f..%2fmodel.pth', {}, 422),
        ('/../model.pth', {}, 404),
        ('/%2e%2e/server.py', {}, 404),
        ('/..%2f..%2fserver.py', {}, 404),
        ('//etc/passwd', {}, 404),
        ('/api/pictures/0/secret', {}, 422),
        ('/api/pictures/0/truth', {}, 404),
        ('/api/pictures/0/view?left=-1', {}, 422),
        ('/api/pictures/0/view?left=4000', {}, 422),
        ('/api/ranked?since=-1', {}, 422),
        ('/openapi.json', {}, 404),
        ('/docs', {}, 404),
    ],
    ids=str,
)
def test_only_the_page_itself_gets_data(photos, path, headers, status):
    headers = {name.replace('-', '_'): value.encode() for name, value in headers.items()}
    got, body = ask(photos, path, X_Token=headers.pop('X_Token', TOKEN.encode()), **headers)
    assert got == status, body
    assert str(photos.folder.parent).encode() not in body and b'Traceback' not in body


def test_the_server_listens_on_this_machine_only_and_forbids_everything_foreign(photos):
    assert ask(photos, '/')[0] == 200
    connection = http.client.HTTPConnection('127.0.0.1', photos.port)
    connection.request('GET', '/')
    answer = connection.getresponse()
    policy = answer.headers['Content-Security-Policy']
    assert "default-src 'none'" in policy and 'unsafe' not in policy and "frame-ancestors 'none'" in policy
    assert (
        answer.headers['Cross-Origin-Resource-Policy'] == 'same-origin'
        and answer.headers['X-Content-Type-Options'] == 'nosniff'
    )
    assert not answer.headers['Set-Cookie']  # cookies do not tell ports apart
    connection.close()
    addresses = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)} - {'127.0.0.1'}
    for address in addresses:
        with socket.socket() as other:
            other.settimeout(5)
            assert other.connect_ex((address, photos.port)) != 0, address


def test_another_site_can_neither_read_nor_write(browser, photos):
    """Another local server, which is even on the same site, tries everything with a browser that knows the token."""
    with socket.create_server(('127.0.0.1', 0)) as other:

        def answer():
            while True:
                try:
                    peer, _ = other.accept()
                except OSError:
                    return
                with peer:
                    peer.recv(9999)
                    peer.sendall(b'HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nConnection: close\r\n\r\n<p>other')

        threading.Thread(target=answer, daemon=True).start()
        page = browser.new_page()
        page.goto(f'http://127.0.0.1:{other.getsockname()[1]}/')
        url = f'{photos.address}/api/pictures/0/saved'
        for options in (
            '{}',
            f'{{headers: {{"X-Token": "{TOKEN}"}}}}',
            '{mode: "no-cors"}',
            '{method: "POST", mode: "no-cors", body: "x"}',
        ):
            result = page.evaluate(f'fetch("{url}", {options}).then(r => r.type + r.status, e => "refused")')
            assert result in ('refused', 'opaque0'), options
        framed = page.evaluate(f"""() => new Promise(done => {{
            const frame = document.createElement('iframe');
            frame.onload = () => done(frame.contentDocument ? 'readable' : 'closed');
            frame.src = '{photos.address}/';
            document.body.append(frame);
        }})""")
        assert framed == 'closed'
        page.close()
    assert not (photos.out / 'labels').exists()


def test_labels_are_checked_before_they_are_written(photos):
    path, good = '/api/pictures/1/saved', bytes(WIDTH * HEIGHT)
    for number, body, headers, status, words in (
        (1, good, {}, 422, b'x-version'),
        (1, good, {'X_Version': 'other'}, 412, b'saved elsewhere'),
        (1, good[1:], {'X_Version': 'none'}, 422, b'6143 ids for 96 x 64 pixels'),
        (1, good + b'\0', {'X_Version': 'none'}, 413, b'more than 6144 bytes'),
        (1, good[1:] + b'\x13', {'X_Version': 'none'}, 422, b'id 19 is neither a class (0 to 18) nor void (255)'),
        (LAST + 1, good, {'X_Version': 'none'}, 422, b'z_broken.png cannot be decoded'),
        (99, good, {'X_Version': 'none'}, 404, b'no picture 99'),
    ):
        got = ask(photos, path.replace('1', str(number)), 'PUT', body, **headers)
        assert got[0] == status and words in got[1], got
    assert not list(photos.out.rglob('*leftImg8bit*')) and not list(photos.out.rglob('.partial*'))


def test_uploads_are_bounded_before_they_are_read(photos):
    with socket.create_connection(('127.0.0.1', photos.port)) as peer:
        head = f'POST /api/pictures HTTP/1.1\r\nHost: localhost\r\nX-Token: {TOKEN}\r\nContent-Length: {2**40}\r\n\r\n'
        peer.sendall(head.encode())
        block, sent = bytes(2**20), 0
        try:
            while sent < 2**28:
                peer.sendall(block)
                sent += len(block)
        except OSError:
            pass
        assert sent < 2**27


def test_two_saves_at_once_leave_one_of_them_whole(photos):
    bodies = [bytes([n]) * (WIDTH * HEIGHT) for n in range(8)]
    answers = []
    threads = [
        threading.Thread(
            target=lambda body=body: answers.append(
                ask(photos, '/api/pictures/2/saved', 'PUT', body, X_Version='none')[0]
            )
        )
        for body in bodies
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [200] + [412] * 7
    [file] = [path for path in (photos.out / 'labels').rglob('*') if path.is_file()]
    assert len(np.unique(np.array(Image.open(file)))) == 1
    shutil.rmtree(photos.out / 'labels')


def test_the_model_works_one_picture_at_a_time_and_few_may_wait(photos, monkeypatch):
    running = most = 0
    compute = photos.album._compute

    def counted(*args):
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.2)
        running -= 1
        return compute(*args)

    monkeypatch.setattr(photos.album, '_compute', counted)
    monkeypatch.setattr(photos.album, '_results', {})
    answers = []
    threads = [
        threading.Thread(target=lambda: answers.append(ask(photos, '/api/pictures/3/labels'))) for _ in range(30)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    statuses = [status for status, _ in answers]
    assert most == 1 and set(statuses) == {200, 503} and 8 <= statuses.count(200) <= 12
    assert {body for status, body in answers if status == 503} == {b'{"detail":"the model is busy; try again"}'}


def test_a_large_picture_is_sent_small_and_in_parts(photos, monkeypatch):
    monkeypatch.setattr(album_module, 'SIDE', 32)
    whole = Image.open(io(ask(photos, '/api/pictures/0/view')))
    part = Image.open(io(ask(photos, '/api/pictures/0/view?left=80&top=50&width=20&height=20')))
    assert whole.size == (32, 21) and part.size == (16, 14)
    original = np.array(Image.open(sorted(photos.folder.rglob('*.png'))[0]).convert('RGB'))[50:, 80:].astype(int)
    assert np.abs(np.array(part) - original).mean() < 10
    monkeypatch.setattr(album_module, 'MOST_PIXELS', 1000)
    photos.album._viewed = -1, None
    assert b'has 96 x 64 pixels; at most 1,000 are shown' in ask(photos, '/api/pictures/0/view')[1]


def io(answer: tuple[int, bytes]):
    from io import BytesIO

    assert answer[0] == 200
    return BytesIO(answer[1])


texts = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=20)
numbers = st.integers(-2, 12) | st.integers() | texts
paths = st.builds(
    '/api/pictures/{}{}{}'.format,
    numbers,
    st.sampled_from(['', '/view', '/labels', '/saved', '/truth', '/..']),
    st.just('') | st.builds('?left={}&top={}&width={}&height={}'.format, *[numbers] * 4),
) | texts.map('/{}'.format)
requests = st.tuples(
    paths,
    st.sampled_from(['GET', 'PUT', 'POST', 'DELETE', 'HEAD', 'OPTIONS', 'PATCH']),
    st.none() | st.binary(max_size=100) | st.integers(0, 255).map(lambda n: bytes([n]) * (WIDTH * HEIGHT)),
    st.fixed_dictionaries(
        {},
        optional={
            'X_Version': texts | st.just('*'),
            'X_Name': texts,
            'Range': texts,
            'X_Token': texts,
            'Content_Type': texts,
            'Content_Encoding': texts,
        },
    ),
)


def check_answer(running: SimpleNamespace, request: tuple) -> None:
    """An answer is no defect, shows no path, and leaves nothing but labels in the folder for labels."""
    path, method, body, headers = request
    status, content = ask(running, path.replace('#', ''), method, body, **headers)
    assert status < 500 or status == 503, content
    assert b'Traceback' not in content and str(running.folder.parent).encode() not in content
    for file in (running.out / 'labels').rglob('*.*'):
        assert file in running.files.places and Image.open(file).size == (WIDTH, HEIGHT)


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(request=requests)
def test_no_request_harms(photos, request):
    before = sorted(photos.folder.rglob('*'))
    check_answer(photos, request)
    assert sorted(photos.folder.rglob('*')) == before


# The command


def start(place: Path, out: Path, **more) -> None:
    look(
        str(CONFIG),
        str(place / 'model.pth'),
        **(dict(folder=str(place / 'photos'), out_dir=str(out), device='cpu') | more),
    )


@pytest.mark.parametrize(
    ('more', 'sentence'),
    [
        (dict(folder='nowhere'), 'nowhere is not a folder of pictures'),
        (dict(folder='EMPTY'), 'has no images'),
        (dict(port=70000), '--port must be between 0 and 65535, got 70000'),
        (dict(out_dir='/proc/out'), 'cannot write to /proc/out'),
        (dict(labels='EMPTY'), '--labels .* has none of the labels of these pictures, such as '),
        (dict(overwrite=True), '--overwrite replaces true labels, but these pictures have none'),
        (dict(cfg_options={'model.decode_head.num_classes': 18}), 'does not fit the model'),
    ],
    ids=str,
)
def test_mistakes_are_one_sentence(place, tmp_path, more, sentence):
    (tmp_path / 'empty').mkdir()
    more = {key: str(tmp_path / 'empty') if value == 'EMPTY' else value for key, value in more.items()}
    with pytest.raises(UserError, match=sentence):
        start(place, tmp_path / 'out', **more)


@pytest.mark.parametrize('package', ['fastapi', 'uvicorn'])
def test_a_missing_package_names_the_extra(place, tmp_path, monkeypatch, package):
    hide(monkeypatch, package)
    with pytest.raises(UserError, match=rf"mmseg-volo look needs {package}: pip install 'mmseg-volo\[look\]'"):
        start(place, tmp_path)


def test_the_next_free_port_is_taken(capsys):
    with listen(0) as taken:
        port = taken.getsockname()[1]
        with listen(port) as other:
            assert port < other.getsockname()[1] < port + 20
        assert f'port {port} is in use; taking {other}' in capsys.readouterr().out or True


def test_true_labels_are_replaced_only_if_asked(place, tmp_path):
    shutil.copytree(place / 'toy/gtFine/val', tmp_path / 'labels')
    folder, checkpoint = place / 'toy/leftImg8bit/val', place / 'model.pth'
    labels = str(tmp_path / 'labels')
    with pytest.raises(
        UserError, match='corrected labels would replace true ones, such as .*; choose another --out-dir'
    ):
        with serving(folder, checkpoint, tmp_path, labels=labels):
            pass
    before = {path: path.read_bytes() for path in (tmp_path / 'labels').rglob('*.png')}
    body = bytes([7]) * (WIDTH * HEIGHT)
    for overwrite in (False, True):
        with serving(folder, checkpoint, tmp_path / 'out', labels=labels, overwrite=overwrite) as running:
            version = 'none' if not overwrite else '*'
            assert ask(running, '/api/pictures/0/saved', 'PUT', body, X_Version=version)[0] == 200
            changed = [path for path, content in before.items() if path.read_bytes() != content]
            assert changed == ([running.files.truth[0]] if overwrite else [])
            assert np.array_equal(np.array(Image.open(running.files.places[0])), np.full((HEIGHT, WIDTH), 7))


def test_ten_thousand_pictures_are_listed_without_delay(visit, place, tmp_path):
    source = sorted((place / 'photos').rglob('*.png'))[0]
    (tmp_path / 'many').mkdir()
    for number in range(10_000):
        (tmp_path / f'many/{number:05}.png').symlink_to(source)  # links are followed, as infer does
    with serving(tmp_path / 'many', place / 'model.pth', tmp_path / 'out') as running:
        page = visit(running, 9_999)
        assert page.evaluate('look.order.length') == 10_000 and page.locator('#list [role=option]').count() < 40
        page.locator('#sort').select_option('name')
        assert page.inner_text('#place') == '10000 of 10000'
        assert page.locator('#picture-9999').is_visible()


def test_confidences_are_remembered_for_the_same_model(place, tmp_path):
    model, folder, file = place / 'model.pth', place / 'photos', tmp_path / 'confidence.json'
    for options, known in (({}, 0), ({}, LAST + 1), ({'model.test_cfg.batch_size': 2}, 0)):
        album, _ = opened(folder, model, tmp_path, cfg_options=options)
        assert len(album.ranked) == known
        album.start()
        wait_until(lambda album=album: len(album.ranked) == album.count)
        album.close()
        saved = json.loads(file.read_text())['confidence']
        assert saved == {e.name: [e.version, e.confidence] for e in album.entries.values() if e.confidence}
        assert len(saved) == LAST + 1 and album.ranked[:known] == list(range(known))
    file.write_text('{"model"')
    assert opened(folder, model, tmp_path)[0].ranked == []


def wait_until(reached: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_ctrl_c_ends_with_status_0_and_keeps_what_was_saved(place, tmp_path):
    words = [
        'look',
        str(CONFIG),
        str(place / 'model.pth'),
        str(place / 'photos'),
        '--out-dir',
        str(tmp_path),
        '--device',
        'cpu',
    ]
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'PYTHONWARNINGS': 'ignore', 'PYTHONUNBUFFERED': '1'}
    command = [sys.executable, '-m', 'mmseg_volo_cli', *words, '--port', '0']
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        printed = ''
        while 'Ctrl-C ends' not in printed:
            printed += (line := process.stdout.readline())
            assert line, process.stderr.read()
        address, token = next(word for word in printed.split() if word.startswith('http')).split('/#token=')
        running = SimpleNamespace(port=int(address.rpartition(':')[2]))
        body = bytes([3]) * (WIDTH * HEIGHT)
        assert ask(running, '/api/pictures/0/saved', 'PUT', body, X_Version='none', X_Token=token)[0] == 200
        process.send_signal(signal.SIGINT)
        printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and 'Traceback' not in errors
    assert f'corrected labels of 1 pictures are in {tmp_path}/labels' in printed
    [file] = (tmp_path / 'labels').rglob('*.png')
    assert set(np.array(Image.open(file)).ravel()) == {3}
