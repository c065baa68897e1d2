"""Commands in an environment without the optional packages."""

import sys

import pytest

from mmseg_volo import _extras
from mmseg_volo._extras import require, without_tensorboard
from mmseg_volo.apis.plotting import plot
from mmseg_volo.config import load_config
from mmseg_volo.errors import UserError


def hide(monkeypatch, *modules: str) -> None:
    """Make imports of the modules fail."""
    for module in modules:
        for name in [name for name in sys.modules if name.partition('.')[0] == module]:
            monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.setitem(sys.modules, module, None)


def test_a_missing_package_names_its_extra(monkeypatch):
    hide(monkeypatch, 'jinja2')
    with pytest.raises(UserError, match=r"^report.html needs jinja2: pip install 'mmseg-volo\[report\]'$"):
        require('jinja2', 'report', 'report.html')


def test_plot_without_matplotlib_writes_nothing(tmp_path, monkeypatch):
    hide(monkeypatch, 'matplotlib')
    with pytest.raises(UserError, match=r"plot needs matplotlib: pip install 'mmseg-volo\[report\]'"):
        plot([str(tmp_path)], str(tmp_path / 'new' / 'plot.png'))
    assert not (tmp_path / 'new').exists()


def test_training_goes_on_without_tensorboard(monkeypatch):
    cfg = load_config('volo_tiny_toy_streets', {})
    assert not without_tensorboard(cfg) and len(cfg.visualizer.vis_backends) == 2
    monkeypatch.setattr(_extras, 'find_spec', lambda name: None)
    assert without_tensorboard(cfg) and [backend.type for backend in cfg.visualizer.vis_backends] == ['LocalVisBackend']
    assert not without_tensorboard(cfg)  # nothing is left behind
    assert not without_tensorboard(load_config('volo_tiny_toy_streets', dict(visualizer=dict(vis_backends=None))))
