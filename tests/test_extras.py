"""Commands without the packages that only an extra installs."""

import sys

import pytest

from mmseg_volo._extras import require
from mmseg_volo.apis.plotting import plot
from mmseg_volo.errors import UserError


def hide(monkeypatch, *modules: str) -> None:
    """Let imports of the modules fail."""
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
