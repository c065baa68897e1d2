import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get('MMSEG_VOLO_DATA', ROOT / 'data'))

BROWSER_FLAGS = [
    *('--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run'),
    '--autoplay-policy=no-user-gesture-required',
    *('--disable-background-networking', '--disable-component-update', '--disable-sync'),
]


def data_folder(name: str) -> Path:
    """Folder of real data, or skip with the reason."""
    folder = DATA / name
    if not folder.is_dir():
        pytest.skip(f'no real data at {folder}: set MMSEG_VOLO_DATA to the folder that holds {name} (docs/data.md)')
    return folder


@pytest.fixture(scope='session')
def camvid() -> Path:
    return data_folder('camvid')


@pytest.fixture(scope='session')
def ade20k() -> Path:
    return data_folder('ade20k')


@pytest.fixture(scope='module')
def browser():
    playwright = pytest.importorskip('playwright.sync_api', reason='no playwright')
    chromium = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
    if chromium is None:
        pytest.skip('no Chromium: apt-get install chromium')
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=BROWSER_FLAGS)
        yield browser
        browser.close()


def pytest_configure() -> None:
    torch.set_num_threads(1)  # two pytest workers share two cores, so more threads only wait for each other
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with SIGINT ignored
