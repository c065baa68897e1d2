import os
import signal
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get('MMSEG_VOLO_DATA', ROOT / 'data'))


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


def pytest_configure() -> None:
    torch.set_num_threads(1)  # two pytest workers share two cores, so more threads only wait for each other
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with SIGINT ignored
