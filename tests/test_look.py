"""The page of ``mmseg-volo look``: exact labels, corrections, keys, and who may ask for them."""

import base64
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
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from mmengine.config import Config
from PIL import Image
from scipy import ndimage
from soak import bad_input
from test_extras import hide
from test_report import CONFIG, random_checkpoint

from mmseg_volo.apis.inference import infer
from mmseg_volo.apis.push import push
from mmseg_volo.apis.sources import load_model
from mmseg_volo.datasets.full_check import check_all_data
from mmseg_volo.datasets.toy_streets import make_toy_streets
from mmseg_volo.errors import UserError
from mmseg_volo.look import _digest, listen, look, open_album
from mmseg_volo.look import album as album_module
from mmseg_volo.look.album import Album
from mmseg_volo.look.labels import LabelFiles, LabelFormat

pytest.importorskip('fastapi', reason='no fastapi')
pytest.importorskip('uvicorn', reason='no uvicorn')
from mmseg_volo.look.server import Server, make_app  # noqa: E402

TOKEN = 'a token of the test'
WIDTH, HEIGHT = 96, 64
LAST = 2  # number of the last toy street
BROKEN, DOT = LAST + 1, LAST + 2
NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def serving(album: Album, files: LabelFiles, place: Path) -> Iterator[SimpleNamespace]:
    """A server on a free port in a thread."""
    with listen(0) as listener:
        server = Server(make_app(album, files, 'streets', TOKEN), album)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        port = listener.getsockname()[1]
        yield SimpleNamespace(address=f'http://127.0.0.1:{port}', port=port, album=album, files=files, place=place)
        server.should_exit = True
        thread.join()


@pytest.fixture(scope='module')
def place(tmp_path_factory) -> Path:
    """A checkpoint, and toy streets in ``toy`` with a damaged picture and one of a single pixel beside them."""
    folder = tmp_path_factory.mktemp('look')
    make_toy_streets(folder / 'toy', train=1, val=LAST + 1, size=(WIDTH, HEIGHT))
    random_checkpoint(folder / 'model.pth')
    (folder / 'pictures').symlink_to(folder / 'toy/leftImg8bit/val')
    (folder / 'pictures/z_broken.png').write_bytes(b'\x89PNG and no more')
    Image.new('RGB', (1, 1)).save(folder / 'pictures/z_dot.png')
    return folder


@pytest.fixture(scope='module')
def streets(place) -> Iterator[SimpleNamespace]:
    album, files = open_album(
        str(CONFIG),
        str(place / 'model.pth'),
        str(place / 'pictures'),
        labels=None,
        out_dir=str(place / 'out'),
        overwrite=False,
        device='cpu',
        amp=False,
        cfg_options={'data_root': str(place / 'toy')},
    )
    with serving(album, files, place) as running:
        yield running


@pytest.fixture(scope='module')
def predicted(place) -> list[tuple[np.ndarray, np.ndarray]]:
    """Labels and confidence of the toy streets and the single pixel, as ``infer`` writes them."""
    kinds = dict(labels='pred', confidence='confidence')
    infer(str(CONFIG), str(place / 'model.pth'), [str(place / 'pictures')], str(place / 'infer'), 'cpu', [*kinds])
    maps = [[np.array(Image.open(f)) for f in sorted((place / 'infer' / kind).iterdir())] for kind in kinds.values()]
    return list(zip(*maps, strict=True))


@pytest.fixture
def clean(streets) -> None:
    """Without corrections of an earlier test."""
    shutil.rmtree(streets.place / 'out/labels', ignore_errors=True)


# The page


@pytest.fixture
def visit(browser):
    """Open the page of a server in a new tab; every request must go to it and nothing may complain."""
    contexts, foreign, complaints = [], [], []

    def open_page(running: SimpleNamespace, number: int = 0, context=None, **options):
        if context is None:
            defaults = dict(viewport=dict(width=1280, height=800), reduced_motion='reduce')
            context = browser.new_context(**defaults | options)
            contexts.append(context)
        page = context.new_page()
        page.on('request', lambda request: request.url.startswith(running.address) or foreign.append(request.url))
        page.on('pageerror', lambda error: complaints.append(str(error)))
        page.goto(f'{running.address}/#token={TOKEN}&picture={number}')
        shows(page, number)
        page.locator('#sort').select_option('name')
        page.locator('#canvas').focus()
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


def fetched(page, expression: str) -> np.ndarray:
    """An array of bytes in the page; as numbers in JSON, it would take seconds."""
    text = page.evaluate(f'btoa(Array.from({expression}, value => String.fromCharCode(value)).join(""))')
    return np.frombuffer(base64.b64decode(text), np.uint8)


def plane(page, name: str = 'labels') -> np.ndarray:
    return fetched(page, f'look.{name}').reshape(HEIGHT, WIDTH)


def drawn(page, scale: float) -> np.ndarray:
    """Colours on the canvas, where the picture is enlarged by ``scale``."""
    page.evaluate(f'Object.assign(look, {{scale: {scale}, x: 10, y: 10}})')
    page.keyboard.press('l')
    page.evaluate('new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))')
    wide, high = int(WIDTH * scale), int(HEIGHT * scale)
    pixels = fetched(page, f'canvas.getContext("2d").getImageData(10, 10, {wide}, {high}).data')
    return pixels.reshape(high, wide, 4)[..., :3]


def point(page, x: int, y: int) -> tuple[float, float]:
    """Where on the screen a pixel of the picture is."""
    box = page.locator('#canvas').bounding_box()
    at = page.evaluate(f'[look.x + ({x} + .5) * look.scale, look.y + ({y} + .5) * look.scale]')
    return box['x'] + at[0], box['y'] + at[1]


def drag(page, *places: tuple[int, int], release: bool = True) -> None:
    page.mouse.move(*point(page, *places[0]))
    page.mouse.down()
    for x, y in places[1:]:
        page.mouse.move(*point(page, x, y))
    if release:
        page.mouse.up()


def disc(x: int, y: int, size: int) -> np.ndarray:
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    return (rows - y) ** 2 + (columns - x) ** 2 <= size**2 / 4


def message(page) -> str:
    return until(
        page, 'document.querySelector("#message").hidden ? "" : document.querySelector("#message").textContent'
    )


def saved(running: SimpleNamespace, number: int) -> np.ndarray:
    return np.array(Image.open(running.files.places[number]))


def test_page_and_canvas_show_what_infer_writes(visit, streets, predicted, clean):
    page = visit(streets)
    page.locator('#opacity').fill('100')
    page.locator('#canvas').focus()
    palette, classes = np.array(streets.album.predictor.palette), streets.album.predictor.classes
    for number, (labels, confidence) in enumerate(predicted[: LAST + 1]):
        shows(page, number)
        assert np.array_equal(plane(page), labels) and np.array_equal(plane(page, 'confidence'), confidence)
        assert streets.album.entries[number].confidence == confidence.mean() / 255
        for scale in (1, 3, 7.5) if number == 0 else (1,):  # a pixel of the screen shows the one under its centre
            colours = drawn(page, scale)
            rows, columns = (((np.arange(n) + 0.5) / scale).astype(int) for n in colours.shape[:2])
            assert np.array_equal(colours, palette[labels][rows][:, columns])
        if number < LAST:
            page.keyboard.press('ArrowRight')
    shown = np.bincount(labels.ravel()).argmax()
    page.get_by_role('checkbox', name=f'Show {classes[shown]}', exact=True).uncheck()
    colours, photo = drawn(page, 1), np.array(Image.open(streets.album.entries[LAST].path).convert('RGB')).astype(int)
    assert np.array_equal(colours[labels != shown], palette[labels[labels != shown]])
    assert np.abs(colours - photo)[labels == shown].mean() < 10  # JPEG
    page.keyboard.press('0')
    page.mouse.move(*point(page, 20, 30))
    [truth] = streets.files.form.read(streets.files.truth[LAST], (HEIGHT, WIDTH))[30:31, 20]
    assert page.locator('#readout').text_content().splitlines() == [
        f'{classes[labels[30, 20]]} at 20, 30',
        f'confidence {confidence[30, 20] / 2.55:.0f} %',
        f'truth: {[*classes, *["void"] * 237][truth]}',
    ]


def test_brush_fill_and_undo_change_exactly_the_pixels_they_should(visit, streets, predicted, clean):
    page, labels = visit(streets, 1), predicted[1][0]
    page.keyboard.press('b')
    page.get_by_role('button', name='Paint car').click()
    expected, car = labels.copy(), 13
    drag(page, (20, 30))
    expected[disc(20, 30, 9)] = car
    assert np.array_equal(plane(page), expected)
    page.keyboard.press(']')
    drag(page, (0, 63), (10, 53), (40, 53))  # over the corner of the picture
    for x, y in [*((i, 63 - i) for i in range(11)), *((i, 53) for i in range(11, 41))]:
        expected[disc(x, y, 15)] = car
    assert np.array_equal(plane(page), expected)
    page.keyboard.press('f')
    page.get_by_role('button', name='Paint void').click()
    drag(page, (20, 30))
    regions, _ = ndimage.label(expected == car)
    filled = np.where(regions == regions[30, 20], 255, expected)
    assert np.array_equal(plane(page), filled) and (filled == car).any() == (regions.max() > 1)
    for undone in (expected, None, labels):
        page.keyboard.press('Control+z')
        assert undone is None or np.array_equal(plane(page), undone)
    assert page.locator('#undo').is_disabled() and page.title().startswith('toytown')  # no change is left
    for _ in range(3):
        page.keyboard.press('Control+Shift+z')
    assert np.array_equal(plane(page), filled) and page.locator('#redo').is_disabled()


def test_errors_are_counted_and_saved_labels_pass_check_data(visit, streets, predicted, clean):
    page, labels = visit(streets, LAST), predicted[LAST][0]
    truth = np.array(Image.open(sorted((streets.place / 'toy/gtFine/val').rglob('*_labelTrainIds.png'))[LAST]))
    page.keyboard.press('e')
    known = truth != 255
    differ = f'{(truth != labels)[known].mean() * 100:.1f} % of {known.sum():,} true labels differ'
    until(page, f'document.querySelector("#agreement").textContent.includes("{differ}")')
    page.locator('#restart').select_option('truth')
    until(page, 'document.querySelector("#agreement").textContent.startsWith("0.0 %")')
    assert np.array_equal(plane(page), truth)
    page.locator('#restart').select_option('labels')
    until(page, 'look.undo.length === 2')
    assert np.array_equal(plane(page), labels)
    page.keyboard.press('b')
    page.get_by_role('button', name='Paint void').click()
    drag(page, (50, 8))
    edited = np.where(disc(50, 8, 9), 255, labels)
    page.evaluate('for (let i = 0; i < 2; i++) document.querySelector("#save").click()')  # the second is no other tab
    assert 'Saved as' in message(page) and not page.locator('#dialog').is_visible()
    assert np.array_equal(saved(streets, LAST), edited)
    written = Image.open(streets.files.places[LAST])
    palette = np.array(streets.album.predictor.palette)
    assert written.mode == 'P' and written.getpalette()[: palette.size] == palette.ravel().tolist()
    page.reload()
    shows(page, LAST)
    assert np.array_equal(plane(page), edited) and not page.evaluate('look.undo.length')
    for number in range(LAST):
        body = predicted[number][0].tobytes()
        assert ask(streets, f'/api/pictures/{number}/saved', 'PUT', body, X_Version='none')[0] == 200
    dataset = {
        'data_root': '',
        'data_prefix.img_path': str(streets.place / 'pictures'),
        'data_prefix.seg_map_path': str(streets.place / 'out/labels'),
    }
    options = {f'val_dataloader.dataset.{key}': value for key, value in dataset.items()}
    findings = check_all_data(str(CONFIG), str(streets.place / 'check.png'), ['val'], options)
    assert [finding for finding in findings if finding.level == 'error'] == []


def test_two_tabs_do_not_replace_each_others_labels_unseen(visit, streets, clean):
    first = visit(streets)
    second = visit(streets, context=first.context)
    for page, x in ((first, 10), (second, 80)):
        page.keyboard.press('b')
        drag(page, (x, 20))
    first.keyboard.press('Control+s')
    assert 'Saved as' in message(first)
    kept = saved(streets, 0)
    second.keyboard.press('Control+s')
    second.get_by_role('button', name='Decide later').click()
    assert np.array_equal(saved(streets, 0), kept) and second.evaluate('look.undo.length') == 1
    second.keyboard.press('Control+s')
    second.get_by_role('button', name='Replace them by mine').click()
    assert 'Saved as' in message(second)
    assert np.array_equal(saved(streets, 0), plane(second)) and not np.array_equal(kept, plane(second))
    drag(first, (50, 50))
    first.keyboard.press('Control+s')
    first.get_by_role('button', name='Load the other ones').click()
    until(first, 'look.labels && look.undo.length === 0')
    assert np.array_equal(plane(first), plane(second))


def test_changes_are_lost_neither_by_leaving_nor_by_a_full_disk(visit, streets, predicted, clean, monkeypatch):
    def write(*_, **__):
        raise NO_SPACE

    page = visit(streets)
    page.keyboard.press('b')
    drag(page, (30, 30), release=False)
    page.keyboard.press('ArrowRight')  # in the middle of a stroke, which is a change, too
    page.mouse.up()
    page.get_by_role('button', name='Stay here').click()
    changed = np.where(disc(30, 30, 9), 0, predicted[0][0])
    assert np.array_equal(plane(page), changed) and page.title().startswith('•')
    asked = []
    page.on('dialog', lambda dialog: (asked.append(dialog.type), dialog.dismiss()))
    page.close(run_before_unload=True)
    until(page, 'true')
    assert asked == ['beforeunload']
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, 'save', write)
        page.keyboard.press('Control+s')
        assert 'could not be saved (No space left on device). The changes are still here' in message(page)
    assert page.title().startswith('•') and not [*(streets.place / 'out/labels').rglob('*.png')]
    page.keyboard.press('ArrowRight')
    page.get_by_role('button', name='Save', exact=True).click()
    shows(page, 1)
    assert np.array_equal(saved(streets, 0), changed)


def test_other_pictures_go_on_after_those_that_fail_and_dropped_ones_are_segmented(
    visit, streets, predicted, clean, monkeypatch
):
    until(page := visit(streets), f'look.ranked === {DOT + 1}')
    page.locator('#sort').select_option('confidence')
    mean = [confidence.mean() for _, confidence in predicted]
    mean.insert(BROKEN, 256)
    assert page.evaluate('look.order') == np.argsort(mean).tolist()
    page.locator(f'#picture-{BROKEN}').click()
    shows(page, BROKEN)
    note = page.locator(f'#picture-{BROKEN} small').text_content()
    assert page.inner_text('#problem') == note == 'z_broken.png cannot be decoded as an image'
    page.locator(f'#picture-{DOT}').click()
    shows(page, DOT)
    page.keyboard.press('b')
    drag(page, (0, 0))
    assert page.evaluate('[...look.labels]') == [0] and not page.locator('#problem').is_visible()
    page.keyboard.press('Control+z')
    assert page.evaluate('[...look.labels]') == predicted[-1][0].tolist()[0]
    path = Path(streets.album.entries[1].path)
    page.locator('#file').set_input_files(path)
    until(page, f'look.number > {DOT} && look.labels')
    assert np.array_equal(plane(page), predicted[1][0]) and page.inner_text('#name') == path.name
    assert page.locator('#save').is_disabled() and page.locator('[data-tool=brush]').is_disabled()
    page.evaluate("""
        const dataTransfer = new DataTransfer();
        dataTransfer.items.add(new File(['not a picture'], 'no.png'));
        dispatchEvent(new DragEvent('drop', {dataTransfer}))""")
    until(page, 'document.querySelector("#problem").textContent.includes("no.png cannot be decoded")')
    bomb = dict(name='b.png', buffer=b'\x89PNG\r\n\x1a\n' + png_header(20000, 20000), mimeType='image/png')
    page.locator('#file').set_input_files(bomb)
    until(page, 'document.querySelector("#problem").textContent === "b.png has more than 134,217,728 pixels"')
    page.evaluate('look.album.mostBytes = 10')
    page.locator('#file').set_input_files(path)
    assert 'more than 10 bytes' in message(page)


def png_header(width: int, height: int) -> bytes:
    body = b'IHDR' + width.to_bytes(4, 'big') + height.to_bytes(4, 'big') + b'\x08\x02\0\0\0'
    return b'\0\0\0\x0d' + body + zlib.crc32(body).to_bytes(4, 'big') + b'\0\0\0\0IDAT'


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
        focused, ring = page.evaluate("""[document.activeElement].flatMap(element => [
            element.id || element.ariaLabel || element.textContent,
            element === document.body ? 'none needed' : getComputedStyle(element).outlineStyle])""")
        seen.append(focused)
        assert ring in ('none needed', 'solid', 'auto'), focused
        if focused in seen[:-1]:
            break
    assert {'previous', 'save', 'Brush', 'size', 'canvas', 'opacity', 'sort', 'list', 'Paint road'} <= set(seen)
    page.locator('#canvas').focus()
    page.keyboard.press('b')
    page.keyboard.press('[')
    for key in ('Shift+ArrowLeft', 'Shift+ArrowUp', 'Shift+ArrowUp', 'Enter'):
        page.keyboard.press(key)
    expected = np.where(disc(WIDTH // 2 - 1, HEIGHT // 2 - 2, 5), 0, predicted[1][0])
    assert np.array_equal(plane(page), expected)
    page.keyboard.press('Shift+ArrowUp')
    assert message(page).startswith('road at 47, 29')


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


def test_without_the_token_the_page_says_what_to_open(browser, streets):
    page = browser.new_page()
    page.goto(streets.address)
    until(page, 'document.querySelector("#problem").textContent.startsWith("open the whole address")')
    assert page.locator(':is(button, select, input):enabled:visible').count() == 0
    page.close()


@pytest.mark.parametrize('width', [390, 1280])
def test_the_page_fits_follows_the_scheme_and_has_contrast(visit, streets, width):
    page = visit(streets, viewport=dict(width=width, height=800), has_touch=width == 390)
    assert page.evaluate('document.documentElement.scrollWidth') == width
    page.evaluate("document.querySelector('#keys').showModal()")
    for scheme in ('light', 'dark'):
        page.emulate_media(color_scheme=scheme)
        red = page.evaluate('Number(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])')
        assert (red < 64) == (scheme == 'dark')
        assert page.evaluate(CONTRAST) == []


def test_ten_thousand_pictures_with_any_name_are_listed_without_delay(visit, streets, tmp_path):
    names = [f'{number:05}.png' for number in range(9_999)] + ['<b>&\udcff ü.png']  # and not valid UTF-8
    pictures = dict.fromkeys(names, streets.album.entries[0].path)
    album = Album(streets.album.predictor, pictures, tmp_path / 'confidence.json', 'model')
    files = LabelFiles(streets.files.form, {}, [tmp_path / name for name in names], False)
    with serving(album, files, tmp_path) as running:
        page = visit(running, 9_999)
        assert page.evaluate('look.order.length') == 10_000 and page.locator('#list [role=option]').count() < 40
        assert page.inner_text('#place') == '10000 of 10000'
        assert '<b>&' in page.inner_text('#picture-9999')


# Who may ask, and for what


def ask(
    running: SimpleNamespace, path: str, method: str = 'GET', body: bytes | None = None, **headers
) -> tuple[int, bytes]:
    """Status and body of an answer, over a socket of its own; ``Host`` and the token are sent unless replaced."""
    headers = {name.replace('_', '-'): value for name, value in headers.items()}
    return bad_input.ask(running.port, (path, method, body, headers), TOKEN)


@pytest.mark.parametrize(
    ('path', 'headers', 'status'),
    [
        ('/api/album', {}, 200),
        ('/api/album', dict(Host='localhost:8', Origin='http://localhost:8', Sec_Fetch_Site='same-origin'), 200),
        ('/', dict(X_Token='', Sec_Fetch_Site='cross-site'), 200),  # a link to the page, which holds no data
        ('/api/album', dict(X_Token=''), 401),
        ('/api/album', dict(X_Token=TOKEN[:-1]), 401),
        ('/api/album', dict(X_Token='Ã¼'), 401),
        ('/api/pictures/no_number', dict(X_Token=''), 401),
        ('/', dict(Host='evil.example'), 403),  # DNS rebinding
        ('/api/album', dict(Host='evil.example:8000'), 403),
        ('/api/album', dict(Host='127.0.0.1.evil.example'), 403),
        ('/api/album', dict(Host=''), 403),
        ('/api/album', dict(Origin='http://evil.example'), 403),
        ('/api/album', dict(Origin='null'), 403),
        ('/api/album', dict(Origin='http://127.0.0.1:1'), 403),  # another local server
        ('/api/album', dict(Sec_Fetch_Site='cross-site'), 403),
        ('/page.js', dict(Sec_Fetch_Site='same-site'), 403),
        ('/api/pictures/99', {}, 404),
        ('/api/pictures/-1/view', {}, 404),
        ('/api/pictures/0/labels/../../1', {}, 404),
        ('/api/pictures/..%2f..%2fmodel.pth', {}, 404),
        ('/../model.pth', {}, 404),
        ('/%2e%2e/server.py', {}, 404),
        ('/..%2f..%2fserver.py', {}, 404),
        ('//etc/passwd', {}, 404),
        ('/api/pictures/0/secret', {}, 422),
        ('/api/pictures/0/saved', {}, 404),
        ('/api/pictures/0/view?left=-1', {}, 422),
        ('/api/pictures/0/view?left=4000', {}, 422),
        ('/api/ranked?since=-1', {}, 422),
        ('/openapi.json', {}, 404),
        ('/docs', {}, 404),
    ],
    ids=str,
)
def test_only_the_page_itself_gets_data(streets, clean, path, headers, status):
    got, body = ask(streets, path, **{name: value.encode() for name, value in headers.items()})
    assert got == status, body
    assert str(streets.place).encode() not in body and b'Traceback' not in body


def test_the_server_listens_on_this_machine_only_and_forbids_everything_foreign(streets):
    connection = http.client.HTTPConnection('127.0.0.1', streets.port)
    connection.request('GET', '/')
    answer = connection.getresponse()
    policy = answer.headers['Content-Security-Policy']
    assert "default-src 'none'" in policy and 'unsafe' not in policy and "frame-ancestors 'none'" in policy
    assert answer.headers['Cross-Origin-Resource-Policy'] == 'same-origin'
    assert answer.headers['X-Content-Type-Options'] == 'nosniff'
    assert not answer.headers['Set-Cookie']  # cookies do not tell ports apart
    connection.close()
    addresses = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)} - {'127.0.0.1'}
    for address in addresses:
        with socket.socket() as other:
            other.settimeout(5)
            assert other.connect_ex((address, streets.port)) != 0, address


def test_another_site_can_neither_read_nor_write(browser, streets, clean):
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
        url = f'{streets.address}/api/pictures/0/saved'
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
            frame.src = '{streets.address}/';
            document.body.append(frame);
        }})""")
        assert framed == 'closed'
        page.close()
    assert not (streets.place / 'out/labels').exists()


def test_labels_are_checked_before_they_are_written(streets, clean):
    good = bytes(WIDTH * HEIGHT)
    for number, body, headers, status, words in (
        (1, good, {}, 422, b'x-version'),
        (1, good, dict(X_Version='other'), 412, b'saved elsewhere'),
        (1, good[1:], dict(X_Version='none'), 422, b'6143 ids for 96 x 64 pixels'),
        (1, good + b'\0', dict(X_Version='none'), 413, b'more than 6144 bytes'),
        (1, good[1:] + b'\x13', dict(X_Version='none'), 422, b'id 19 is neither a class (0 to 18) nor void (255)'),
        (BROKEN, good, dict(X_Version='none'), 422, b'z_broken.png cannot be decoded'),
        (99, good, dict(X_Version='none'), 404, b'no picture 99'),
    ):
        got = ask(streets, f'/api/pictures/{number}/saved', 'PUT', body, **headers)
        assert got[0] == status and words in got[1], got
    assert not (streets.place / 'out/labels').exists()


def test_the_label_of_a_single_pixel_is_saved_and_read_again(streets, clean):
    assert streets.album.entries[DOT].path.endswith('z_dot.png')
    status, version = ask(streets, f'/api/pictures/{DOT}/saved', 'PUT', b'\x05', X_Version='none')
    assert status == 200
    label = Image.open(streets.files.places[DOT])
    assert (label.mode, label.size, label.getpixel((0, 0))) == ('P', (1, 1), 5)
    content, stored = streets.files.read(DOT, 'saved', (1, 1))
    assert zlib.decompress(content) == b'\x05' and json.loads(version)['version'] == stored


def test_uploads_are_bounded_and_the_oldest_are_forgotten(streets, monkeypatch):
    with socket.create_connection(('127.0.0.1', streets.port)) as peer:
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
    picture = Path(streets.album.entries[0].path).read_bytes()
    numbers = [json.loads(ask(streets, '/api/pictures', 'POST', picture)[1])['number'] for _ in range(5)]
    [first, *others] = [ask(streets, f'/api/pictures/{number}/view') for number in numbers]
    assert first == (422, b'{"detail":"picture is forgotten: 4 pictures were dropped after it"}')
    assert [status for status, _ in others] == [200] * 4

    def write(*_):
        raise NO_SPACE

    monkeypatch.setattr(Path, 'write_bytes', write)
    full = ask(streets, '/api/pictures', 'POST', picture)
    assert full == (507, b'{"detail":"the picture could not be stored (No space left on device)"}')


def at_once(count: int, request) -> list[tuple[int, bytes]]:
    """Answers to ``request(i)`` from as many threads."""
    answers: list[tuple[int, bytes]] = []
    threads = [threading.Thread(target=lambda i=i: answers.append(request(i))) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def test_two_saves_at_once_leave_one_of_them_whole(streets, clean):
    bodies = [bytes([n]) * (WIDTH * HEIGHT) for n in range(8)]
    answers = at_once(8, lambda i: ask(streets, '/api/pictures/2/saved', 'PUT', bodies[i], X_Version='none'))
    assert sorted(status for status, _ in answers) == [200] + [412] * 7
    [file] = [path for path in (streets.place / 'out/labels').rglob('*') if path.is_file()]
    assert len(np.unique(np.array(Image.open(file)))) == 1


def test_the_model_works_one_picture_at_a_time_and_few_may_wait(streets, monkeypatch):
    running, compute = [], streets.album._compute

    def counted(*args):
        running.append(len(running))
        time.sleep(0.1)
        assert running.pop() == 0
        return compute(*args)

    monkeypatch.setattr(streets.album, '_compute', counted)
    monkeypatch.setattr(streets.album, '_results', {})
    answers = at_once(30, lambda _: ask(streets, '/api/pictures/1/labels'))
    statuses = [status for status, _ in answers]
    assert set(statuses) == {200, 503} and 8 <= statuses.count(200) <= 12
    assert {body for status, body in answers if status == 503} == {b'{"detail":"the model is busy; try again"}'}


def test_a_large_picture_is_sent_small_and_in_parts(streets, monkeypatch):
    def seen(query: str = '') -> Image.Image:
        status, content = ask(streets, f'/api/pictures/0/view{query}')
        assert status == 200
        return Image.open(BytesIO(content))

    monkeypatch.setattr(album_module, 'SIDE', 32)
    part = seen('?left=80&top=50&width=20&height=20')
    assert seen().size == (32, 21) and part.size == (16, 14)
    original = np.array(Image.open(streets.album.entries[0].path).convert('RGB'))[50:, 80:].astype(int)
    assert np.abs(np.array(part) - original).mean() < 10
    monkeypatch.setattr(album_module, 'MOST_PIXELS', 1000)
    streets.album._viewed = -1, None
    assert b'has more than 1,000 pixels' in ask(streets, '/api/pictures/0/view')[1]


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(request=bad_input.requests)
def test_no_request_harms(streets, request):
    before = sorted((streets.place / 'toy').rglob('*'))
    status, content = bad_input.ask(streets.port, request, TOKEN)
    assert status < 500 or status == 503, content
    assert b'Traceback' not in content and str(streets.place).encode() not in content
    assert sorted((streets.place / 'toy').rglob('*')) == before
    for file in (streets.place / 'out/labels').rglob('*.*'):
        assert file in streets.files.places and Image.open(file).size == (WIDTH, HEIGHT)


# The command


@pytest.mark.parametrize(
    ('more', 'sentence'),
    [
        (dict(folder='nowhere'), 'nowhere is not a folder of pictures'),
        (dict(folder='EMPTY'), 'has no images'),
        (dict(port=70000), '--port must be between 0 and 65535, got 70000'),
        (dict(out_dir='/proc/out'), 'cannot write to /proc/out'),
        (dict(checkpoint=None), 'volo_tiny_toy_streets.* has no weights of its own: give a checkpoint after it'),
        (dict(labels='EMPTY'), '--labels .* has none of the labels of these pictures, such as '),
        (
            dict(cfg_options={'test_dataloader.dataset.pipeline.0.type': 'LoadRasterFromFile'}),
            'reads rasters .* the page cannot show; use',
        ),
        (dict(overwrite=True), '--overwrite replaces true labels, but these pictures have none'),
    ],
    ids=str,
)
def test_mistakes_are_one_sentence(place, tmp_path, monkeypatch, more, sentence):
    monkeypatch.setattr(Server, 'run', lambda *_: pytest.fail('nothing was refused'))
    (tmp_path / 'empty').mkdir()
    more = {key: str(tmp_path / 'empty') if value == 'EMPTY' else value for key, value in more.items()}
    usual = dict(checkpoint=str(place / 'model.pth'), folder=str(place / 'pictures'), out_dir=str(tmp_path / 'out'))
    with pytest.raises(UserError, match=sentence):
        look(str(CONFIG), device='cpu', **usual | more)


def test_a_missing_package_names_the_extra(monkeypatch):
    hide(monkeypatch, 'uvicorn')
    with pytest.raises(UserError, match=r"mmseg-volo look needs uvicorn: pip install 'mmseg-volo\[look\]'"):
        look(str(CONFIG), None, 'pictures')


def test_the_next_free_port_is_taken(capsys, monkeypatch):
    with listen(0) as taken:
        port = taken.getsockname()[1]
        with listen(port) as other:
            number = other.getsockname()[1]
            assert port < number < port + 20
            assert capsys.readouterr().out.endswith(f'port {port} is in use; taking {number}\n')
        monkeypatch.setattr('mmseg_volo.look.PORTS', 1)
        with pytest.raises(UserError, match=f'ports {port} to {port} are in use; choose another --port'):
            listen(port)


@pytest.mark.parametrize(
    ('dataset', 'stored'),
    [
        (dict(type='ADE20KDataset', reduce_zero_label=True), {0: 1, 1: 2, 255: 0}),
        (dict(type='CityscapesDataset', metainfo=dict(classes=['car', 'road'])), {0: 13, 1: 0, 255: 1}),
        (dict(type='mmseg_volo.FolderDataset', metainfo=dict(classes=['a', 'b'])), {0: 0, 1: 1, 255: 255}),
    ],
    ids=lambda value: value.get('type', ''),
)
def test_labels_have_the_values_and_names_that_the_data_set_reads(tmp_path, dataset, stored):
    loader = dict(type='LoadAnnotations', reduce_zero_label=dataset.get('reduce_zero_label'))
    cfg = Config(dict(test_dataloader=dict(dataset=dict(dataset, pipeline=[loader]))))
    form = LabelFormat(cfg, [[0, 0, 9], [9, 0, 0]])
    ids = np.array([[0, 1, 255]], np.uint8)
    form.write(tmp_path / 'a.png', ids)
    assert np.array(Image.open(tmp_path / 'a.png')).tolist() == [[stored[i] for i in (0, 1, 255)]]
    assert np.array_equal(form.read(tmp_path / 'a.png', (1, 3)), ids)
    names = form.names(['b/a.jpg', 'b/a.bmp', 'c.jpg', 'c.bmp.png', 'c.bmp'])
    assert len(set(names)) == 5 and all(name.endswith('.png') for name in names) and names[0] == 'b/a.jpg.png'


def test_true_labels_are_replaced_only_if_asked(streets, tmp_path):
    form, truth = streets.files.form, {0: tmp_path / 'truth.png'}
    before, after = (np.full((HEIGHT, WIDTH), i, np.uint8) for i in (7, 8))
    form.write(truth[0], before)
    with pytest.raises(UserError, match='would replace true ones, such as .*truth.png; choose another --out-dir'):
        LabelFiles(form, truth, [truth[0]], overwrite=False)
    for overwrite, expected in ((False, before), (True, after)):
        LabelFiles(form, truth, [tmp_path / 'corrected.png'], overwrite).write(0, after, '*')
        assert np.array_equal(form.read(truth[0], before.shape), expected)


def test_confidences_are_remembered_for_the_same_model_and_files(streets, predicted, tmp_path):
    pictures = {}
    for number in range(LAST + 1):
        pictures[f'{number}.png'] = shutil.copy(streets.album.entries[number].path, str(tmp_path / f'{number}.png'))
    pictures['broken.png'] = str(streets.place / 'pictures/z_broken.png')
    file = tmp_path / 'confidence.json'
    for model, changed, known in (('a', None, []), ('a', None, [0, 1, 2]), ('a', 1, [0, 2]), ('b', None, [])):
        if changed:
            os.utime(tmp_path / f'{changed}.png', (0, 0))
        album = Album(streets.album.predictor, pictures, file, model)
        assert album.ranked == known
        album.start()
        end = time.monotonic() + 60
        while len(album.ranked) < album.count:
            assert time.monotonic() < end
            time.sleep(0.02)
        album.close()
        found = {name: confidence for name, (_, confidence) in json.loads(file.read_text())['confidence'].items()}
        assert found == {f'{i}.png': predicted[i][1].mean() / 255 for i in range(LAST + 1)}
    file.write_text('{"model"')
    assert Album(streets.album.predictor, pictures, file, 'b').ranked == []


def test_a_model_is_the_same_if_weights_config_and_precision_are(place):
    models = [
        load_model(str(CONFIG), str(place / 'model.pth'), options)
        for options in ({}, {'work_dir': 'w'}, {'model.test_cfg.batch_size': 2})
    ]
    [first, same, other] = [_digest(model, False) for model in models]
    assert first == same and len({first, other, _digest(models[0], True)}) == 3


def test_a_pushed_model_needs_no_checkpoint_and_ctrl_c_ends_with_status_0(place, tmp_path):
    push(str(CONFIG), str(place / 'model.pth'), str(tmp_path / 'model'))
    truth = tmp_path / 'truth'
    for path in (place / 'pictures').rglob('*_leftImg8bit.png'):
        (truth / path.parent.name).mkdir(parents=True, exist_ok=True)
        Image.new('L', (WIDTH, HEIGHT), 7).save(truth / path.parent.name / path.name)
    words = [str(tmp_path / 'model'), str(place / 'pictures'), '--port', '0', '--labels', str(truth), '--overwrite']
    words += ['--device', 'cpu', '--out-dir', str(tmp_path / 'out')]
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'PYTHONWARNINGS': 'ignore', 'PYTHONUNBUFFERED': '1'}
    command = [sys.executable, '-m', 'mmseg_volo_cli', 'look', *words]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        printed = ''
        while 'Ctrl-C ends' not in printed:
            printed += (line := process.stdout.readline())
            assert line, process.stderr.read()
        assert f'{DOT + 1} pictures of {place / "pictures"} on cpu, {LAST + 1} with true labels' in printed
        address, token = next(word for word in printed.split() if word.startswith('http')).split('/#token=')
        running = SimpleNamespace(port=int(address.rpartition(':')[2]))
        body = bytes([3]) * (WIDTH * HEIGHT)
        assert ask(running, '/api/pictures/0/saved', 'PUT', body, X_Version='*', X_Token=token)[0] == 200
        process.send_signal(signal.SIGINT)
        printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and 'Traceback' not in errors
    assert printed == 'labels of 1 pictures were saved over the true ones\n'
    values = [set(np.array(Image.open(path)).ravel().tolist()) for path in sorted(truth.rglob('*.png'))]
    assert values == [{3}, {7}, {7}] and not (tmp_path / 'out/labels').exists()
