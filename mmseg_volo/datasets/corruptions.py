"""Damaged images, to measure how much of its accuracy a model keeps: noise, blur, JPEG, darkness and fog."""

import zlib

import cv2
import numpy as np
from mmcv.transforms import BaseTransform
from mmseg.registry import TRANSFORMS

from .._extras import require
from ..errors import UserError

# By their names here and in imagecorruptions, which has five strengths of each (arXiv 1903.12261).
KINDS = {'noise': 'gaussian_noise', 'blur': 'defocus_blur', 'JPEG': 'jpeg_compression', 'fog': 'fog'}
DARKNESS, GAMMA = 'darkness', 2.2  # which imagecorruptions lacks
CORRUPTIONS = ('noise', 'blur', 'JPEG', DARKNESS, 'fog')
STRENGTHS = (1, 3, 5)
SMALLEST = 32  # pixels that imagecorruptions needs


@TRANSFORMS.register_module()
class Corruption(BaseTransform):
    """Damage an image, always in the same way: its pixels seed the random numbers.

    Args:
        kind: ``'noise'``, ``'blur'``, ``'JPEG'``, ``'darkness'`` or ``'fog'``: Gaussian noise, defocus blur, JPEG
            compression and fog of the package imagecorruptions, and less light.
        strength: 1 to 5, the package's severity; of darkness: how often the light is halved, with gamma 2.2.

    Raises:
        UserError: an argument has an invalid value, imagecorruptions is not installed, or the image is not 8-bit colour
            or has fewer than 32 pixels on a side.
    """

    def __init__(self, kind: str, strength: int):
        if kind not in CORRUPTIONS:
            raise UserError(f'kind of Corruption must be one of {", ".join(CORRUPTIONS)}, got {kind!r}')
        if strength not in range(1, 6):
            raise UserError(f'strength of Corruption must be 1 to 5, got {strength!r}')
        self.kind, self.strength = kind, strength
        self.library = require('imagecorruptions', 'corruptions', 'Corruption')

    def transform(self, results: dict) -> dict:
        """Damage ``img``, uint8 ``[H, W, 3]`` in BGR."""
        image = results['img']
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or min(image.shape[:2]) < SMALLEST:
            raise UserError(
                f'{results["img_path"]}: only 8-bit colour images of at least {SMALLEST} x {SMALLEST} can be damaged'
            )
        results['img'] = self._damaged(image)
        return results

    def _damaged(self, image: np.ndarray) -> np.ndarray:
        if self.kind == DARKNESS:
            return cv2.convertScaleAbs(image, alpha=0.5 ** (self.strength / GAMMA))
        before = np.random.get_state()  # the package draws from NumPy's global generator
        np.random.seed(zlib.crc32(image.tobytes()))
        try:
            damaged = self.library.corrupt(np.ascontiguousarray(image[..., ::-1]), self.strength, KINDS[self.kind])
        finally:
            np.random.set_state(before)
        return np.ascontiguousarray(damaged[..., ::-1])
