"""A page in the browser for looking at predicted labels and correcting them."""

import errno
import hashlib
import os
import secrets
import socket
import warnings
import webbrowser
from contextlib import closing, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from .._extras import require
from .._files import IMAGE_SUFFIXES, file_sha256, find_files
from ..apis.inference import RESULTS
from ..apis.predictor import Predictor
from ..apis.sources import Model, load_model, try_out
from ..checkpoints.download import local_file
from ..config import first_test_set, make_writable
from ..errors import UserError
from ..export.loading import device_for
from .album import Album
from .labels import LabelFiles, LabelFormat, labels_in, true_labels

PORTS = 20  # to try, if the first is in use


def look(
    config: str,
    checkpoint: str | None,
    folder: str,
    labels: str | None = None,
    port: int = 8000,
    out_dir: str = 'out',
    overwrite: bool = False,
    open: bool = False,
    device: str = 'auto',
    amp: bool = False,
    cfg_options: dict | None = None,
) -> None:
    """Serve a page that shows the pictures of a folder with their labels, until Ctrl-C.

    Args:
        config: a config's path or name; ``hf://owner/name``; or a folder that ``mmseg-volo push`` wrote.
        checkpoint: the weights; None takes those of ``config``, if it has any.
        folder: pictures, also in subfolders.
        labels: folder of true labels; by default those that the config's data sets have for these pictures.
        port: on 127.0.0.1; if it is in use, the next free one is taken.
        out_dir: gets corrected labels in ``labels`` and the mean confidences in ``confidence.json``.
        overwrite: save corrected labels over the true ones.
        open: open the page in a browser.
        device: ``'auto'`` uses a GPU if one is available.
        amp: mixed precision: autocast to bfloat16, or to float16 on a GPU without bfloat16.

    Raises:
        UserError: no pictures, or the config, checkpoint, labels, port or device is unusable.
    """
    for package in ('fastapi', 'uvicorn'):
        require(package, 'look', 'mmseg-volo look')
    from .server import Server, make_app  # imports them

    warnings.filterwarnings('ignore', category=Image.DecompressionBombWarning)  # the album has a limit of its own
    with closing(listen(port)) as listener, TemporaryDirectory() as private:
        album, files = open_album(config, checkpoint, folder, labels, out_dir, overwrite, device, amp, cfg_options)
        token = secrets.token_urlsafe(32)
        address = f'http://127.0.0.1:{listener.getsockname()[1]}/#token={token}'
        print(f'{album.count} pictures of {folder} on {album.predictor.device}, {len(files.truth)} with true labels')
        print(f'look at {address}\nCtrl-C ends', flush=True)
        if open:  # through a file that only this user can read: every user can read the arguments of a browser
            link = Path(private, 'look.html')
            link.write_text(f'<meta http-equiv="refresh" content="0; url={address}">')
            webbrowser.open(link.as_uri())
        with suppress(KeyboardInterrupt):  # which uvicorn raises again once it has ended
            Server(make_app(album, files, Path(folder).resolve().name, token), album).run([listener])
    where = 'over the true ones' if overwrite else f'in {Path(out_dir) / "labels"}'
    print(f'labels of {len(files.saved)} pictures were saved {where}')


def open_album(
    config: str,
    checkpoint: str | None,
    folder: str,
    labels: str | None,
    out_dir: str,
    overwrite: bool,
    device: str,
    amp: bool,
    cfg_options: dict | None,
) -> tuple[Album, LabelFiles]:
    """Pictures and labels for ``look``, which describes the arguments."""
    if not os.path.isdir(folder):
        raise UserError(f'{folder} is not a folder of pictures')
    model = load_model(config, checkpoint, cfg_options or {})
    out = make_writable(out_dir)
    written = [str(out / name) for name in ('labels', *RESULTS.values())]
    paths = find_files([folder], {'image': IMAGE_SUFFIXES}, written)
    names = [Path(os.path.relpath(path, folder)).as_posix() for path in paths]
    predictor = Predictor(model.config, model.checkpoint, device_for(model.checkpoint, device), False, amp)
    if predictor.raster_loader:
        raise UserError(
            f'{config} reads rasters (LoadRasterFromFile), which the page cannot show; use mmseg-volo infer'
        )
    if model.is_foreign:
        try_out(predictor.model, config)
    form = LabelFormat(model.config, predictor.palette)
    stored = form.names(names)
    truth = labels_in(Path(labels), stored) if labels else {} if model.is_foreign else true_labels(model.config, paths)
    files = LabelFiles(form, truth, [out / 'labels' / name for name in stored], overwrite)
    return Album(predictor, dict(zip(names, paths, strict=True)), out / 'confidence.json', _digest(model, amp)), files


def _digest(model: Model, amp: bool) -> str:
    """Digest of everything that determines the labels and their confidence."""
    weights = file_sha256(local_file(model.checkpoint))
    parts = model.config.model, first_test_set(model.config).pipeline, weights, amp
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def listen(port: int) -> socket.socket:
    """A listening socket on the first free port from ``port`` on; raises ``UserError``."""
    if not 0 <= port <= 65535:
        raise UserError(f'--port must be between 0 and 65535, got {port}')
    for candidate in range(port, min(port + PORTS, 65536)):
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, os.name == 'posix')  # elsewhere it shares ports
        try:
            listener.bind(('127.0.0.1', candidate))
            listener.listen()
        except OSError as error:
            listener.close()
            if error.errno != errno.EADDRINUSE:
                raise UserError(f'cannot use port {candidate} ({error.strerror}); choose another --port') from None
        else:
            if candidate != port:
                print(f'port {port} is in use; taking {candidate}')
            return listener
    raise UserError(f'ports {port} to {candidate} are in use; choose another --port')
