"""Toy streets: procedural street scenes with Cityscapes' layout and ids, for a demo without downloads."""

import json
import math
import re
import shutil
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from ..errors import UserError
from .annotations.drawing import clip

GENERATOR_VERSION = 1  # incremented whenever a seed gives different pixels
MIN_SIDE, MAX_SIDE = 32, 4096
MAX_SCENES = 10**6  # per split: file names have six digits

# Cityscapes' labelIds. The classes from ROAD on are evaluated.
UNLABELED, EGO_VEHICLE = 0, 1
ROAD, SIDEWALK, BUILDING, POLE, SIGN, VEGETATION, SKY, PERSON, CAR = 7, 8, 11, 17, 20, 21, 23, 24, 26
NAMES = {ROAD: 'road', SIDEWALK: 'sidewalk', BUILDING: 'building', POLE: 'pole', SIGN: 'traffic sign'}
NAMES |= {VEGETATION: 'vegetation', SKY: 'sky', PERSON: 'person', CAR: 'car'}
NAMES |= {UNLABELED: '__ignore__', EGO_VEHICLE: '__ignore__'}  # Labelme's name for what shall not count
TRAIN_IDS = {ROAD: 0, SIDEWALK: 1, BUILDING: 2, POLE: 5, SIGN: 7, VEGETATION: 8, SKY: 10, PERSON: 11, CAR: 13}

# Amplitude of fine and coarse texture per class, relative to brightness.
_TEXTURE = {ROAD: (0.06, 0.05), SIDEWALK: (0.05, 0.05), BUILDING: (0.05, 0.05), VEGETATION: (0.17, 0.12)}
_DEFAULT_TEXTURE = (0.03, 0.03)

# Colours of zenith and horizon, tint of the light, probability of a lit window, brightness of cast shadows.
_WEATHER = [
    ((86, 142, 214), (190, 214, 236), (1.05, 1.00, 0.94), 0.05, 0.62),  # day
    ((168, 176, 186), (206, 210, 214), (0.90, 0.93, 0.98), 0.15, 1.0),  # overcast
    ((88, 92, 150), (240, 176, 132), (0.92, 0.74, 0.68), 0.40, 0.80),  # dusk
]
_WALLS = [(168, 88, 70), (204, 184, 148), (176, 160, 150), (214, 164, 96), (176, 130, 118), (222, 214, 200)]
_ROOFS = [(126, 62, 50), (92, 70, 66), (146, 84, 58)]
_PAINTS = [(176, 28, 34), (32, 62, 150), (226, 228, 230), (30, 32, 36), (160, 166, 174), (224, 178, 30), (26, 104, 92)]
_CLOTHES = [(214, 54, 74), (236, 196, 60), (60, 84, 190), (240, 120, 40), (150, 60, 160), (70, 40, 40), (232, 228, 222)]
_SKINS = [(236, 190, 160), (198, 144, 108), (120, 80, 58)]


@cache
def _circle(corners: int, turn: float) -> np.ndarray:
    angle = turn + np.arange(corners) * (2 * np.pi / corners)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _disc(x: float, y: float, rx: float, ry: float, corners: int = 16, turn: float = 0) -> np.ndarray:
    return _circle(corners, turn) * (rx, ry) + (x, y)


def _box(left: float, bottom: float, right: float, top: float) -> np.ndarray:
    return np.array([(left, bottom), (right, bottom), (right, top), (left, top)])


class _Street:
    """One scene, painted from far to near at twice its size. Coordinates in metres: X right, Y up, Z ahead."""

    def __init__(self, rng: np.random.Generator, size: tuple[int, int]):
        self.rng = rng
        self.width, self.height = 2 * size[0], 2 * size[1]
        self.focal = 0.75 * self.height
        self.pixels_per_metre = np.array([self.focal, -self.focal])  # at a depth of 1 m; rows run down
        self.vanishing_point = np.array([self.width * rng.uniform(0.42, 0.58), self.height * rng.uniform(0.42, 0.51)])
        self.eye = np.array([rng.uniform(-1.3, 1.3), rng.uniform(1.5, 1.9)])
        self.kerb = rng.uniform(4.4, 5.4)
        self.wall = self.kerb + rng.uniform(3.2, 4.8)
        self.sun_side = rng.choice([-1, 1])
        weather = _WEATHER[rng.choice(len(_WEATHER), p=(0.5, 0.25, 0.25))]
        self.zenith, self.horizon, self.tint, self.lit, self.shadow = weather
        self.image = np.empty((self.height, self.width, 3), np.uint8)
        self.labels = np.full((self.height, self.width), SKY, np.uint8)
        self.polygons: list[tuple[int, np.ndarray]] = []  # painted with a label, in this order

    def colour(self, *choices: tuple[int, int, int], spread: float = 10) -> np.ndarray:
        colour = np.array(choices[self.rng.integers(len(choices))], float)
        return colour * self.rng.uniform(0.85, 1.12) + self.rng.normal(0, spread, 3)

    def project(self, points: np.ndarray, z: float | None = None) -> list[np.ndarray]:
        """Project polygons to pixels: ``[..., corners, 3]`` in space, or upright ``[corners, 2]`` at depth ``z``."""
        scale = self.pixels_per_metre / (points[..., 2:] if z is None else z)
        pixels = self.vanishing_point + (points[..., :2] - self.eye) * scale
        return list(np.rint(pixels).astype(np.int32).reshape(-1, points.shape[-2], 2))

    def fill(self, points: np.ndarray, colour: Sequence[float], label: int | None = None, z: float | None = None):
        """Fill polygons (see ``project``). Without ``label`` only the colour changes."""
        polygons = self.project(points, z)
        clear = math.exp(-(points[..., 2].min() if z is None else z) / 110)
        shade = [clear * own + (1 - clear) * far for own, far in zip(colour, self.horizon, strict=True)]
        cv2.fillPoly(self.image, polygons, shade)  # which clips the colour to 0..255
        if label is not None:
            cv2.fillPoly(self.labels, polygons, label)
            self.polygons += [(label, polygon) for polygon in polygons]

    def ground(self, left: float, right: float, near: float, far: float) -> np.ndarray:
        return np.array([(left, 0, near), (right, 0, near), (right, 0, far), (left, 0, far)])

    def paint_backdrop(self):
        """Paint the sky and the far skyline."""
        rows = np.linspace(0, 1, self.height)[:, None] * self.height / self.vanishing_point[1]
        sky = np.asarray(self.zenith) + np.clip(rows, 0, 1) * (np.subtract(self.horizon, self.zenith))
        self.image[:] = np.clip(sky + self.rng.normal(0, 5, 3), 0, 255)[:, None]
        for x in np.arange(-112, 112, 14):
            top = self.rng.uniform(4, 13)
            if self.rng.random() < 0.5:
                self.fill(_box(x, 0, x + 14, top), self.colour(*_WALLS), BUILDING, z=80)
            else:
                self.fill(_disc(x + 7, 0, 11, top), self.colour((70, 110, 56)), VEGETATION, z=78)

    def paint_ground(self):
        """Paint the pavement, the road with kerbs and lane marks, and sometimes a shadow over both."""
        rng, kerb = self.rng, self.kerb
        near = 0.9 * self.focal * self.eye[1] / (self.height - self.vanishing_point[1])
        paving = self.colour((178, 160, 156), (164, 152, 160), (190, 174, 158), spread=6)
        self.fill(self.ground(-600, 600, near, 400), paving, SIDEWALK)
        joints = np.geomspace(near, 40, 26)
        self.fill(np.stack([self.ground(-30, 30, z, 1.012 * z) for z in joints]), 0.86 * paving)
        asphalt = self.colour((88, 88, 94), (104, 102, 104), (74, 76, 84), spread=4)
        self.fill(self.ground(-kerb, kerb, near, 400), asphalt, ROAD)
        for side in (-kerb, kerb):
            self.fill(self.ground(side - 0.12, side + 0.12, near, 80), 1.12 * paving)
        white = self.colour((222, 222, 216), spread=5)
        dashes = np.arange(rng.uniform(-3, 0), 60, 5.5)
        marks = [self.ground(x - 0.07, x + 0.07, near, 80) for x in (-kerb + 0.5, kerb - 0.5)]
        marks += [self.ground(-0.1, 0.1, max(z, near), z + 3) for z in dashes if z + 3 > near]
        self.fill(np.stack(marks), white)
        if rng.random() < 0.4:  # a crossing
            stop = rng.uniform(6, 14)
            stripes = np.arange(-kerb + 0.4, kerb - 0.8, 1.1)
            self.fill(np.stack([self.ground(x, x + 0.55, stop, stop + 2.5) for x in stripes]), white)
        if self.shadow < 1:
            reach = sorted((self.sun_side * (self.wall - rng.uniform(2, 10)), self.sun_side * 60))
            mask = cv2.fillPoly(np.zeros_like(self.labels), self.project(self.ground(*reach, near, 80)), 1)
            cv2.copyTo(cv2.convertScaleAbs(self.image, alpha=self.shadow), mask, self.image)

    def paint_lots(self):
        """Both rows of buildings, with a hedge and trees in the place of some."""
        for side in (-1, 1):
            start = self.focal * (self.wall - 1.3) / self.width * 0.8
            borders = [start]
            while borders[-1] < 60:
                borders.append(borders[-1] + self.rng.uniform(6, 13))
            for near, far in reversed(list(zip(borders, borders[1:], strict=False))):
                if self.rng.random() < 0.22:
                    self.hedge(side * self.wall, near, far)
                else:
                    self.building(side, near, far)

    def hedge(self, x: float, near: float, far: float):
        green = self.colour((66, 112, 48), (84, 120, 50), (52, 96, 56))
        for z in np.linspace(far, near + 1, 3):
            self.tree(1.35 * x, z, lowest=1.5)
        z = np.linspace(near, far, 12)
        top = self.rng.uniform(1.2, 2.2) + self.rng.normal(0, 0.12, 12)
        corners = [(x, 0, far), (x, 0, near), *zip(np.full(12, x), top, z, strict=True)]
        self.fill(np.array(corners), green, VEGETATION)

    def building(self, side: int, near: float, far: float):
        rng, x, deep = self.rng, side * self.wall, side * (self.wall + 12)
        storey = rng.uniform(2.6, 3.3)
        top = storey * rng.integers(2, 5) + 0.6
        front = self.colour(*_WALLS) * (0.74 if side == self.sun_side else 1.0)
        if rng.random() < 0.6:
            ridge, middle = top + rng.uniform(1.5, 3), (x + deep) / 2
            roof = self.colour(*_ROOFS)
            self.fill(np.array([(x, top, near), (middle, ridge, near), (deep, top, near)]), 0.7 * front, BUILDING)
            slope = [(x, top, near), (x, top, far), (middle, ridge, far), (middle, ridge, near)]
            self.fill(np.array(slope), roof, BUILDING)
        self.fill(_box(x, 0, deep, top), 0.7 * front, BUILDING, z=near)
        self.fill(np.array([(x, 0, near), (x, 0, far), (x, top, far), (x, top, near)]), front, BUILDING)
        for low, high, shade in ((0, 0.35, 0.75), (storey - 0.25, storey, 1.15), (top - 0.35, top, 0.8)):
            self.fill(np.array([(x, y, z) for y, z in _box(low, near, high, far)]), shade * front, BUILDING)
        columns = np.arange(near + 0.8, far - 1.5, rng.uniform(1.9, 2.8))
        rows = np.arange(0.8, top - 1.8, storey)
        z, y = (grid.ravel() for grid in np.meshgrid(columns, rows))
        tall = np.where(y < 1, 1.5, rng.uniform(1.2, 1.6))
        panes = [np.stack([np.full_like(z, x), y + dy * tall, z + dz], axis=1) for dz, dy in _box(0, 0, 1.1, 1)]
        panes = np.stack(panes, axis=1)  # [windows, 4, 3]
        lit = rng.random(len(panes)) < self.lit
        for chosen, glass in ((panes[~lit], self.colour((66, 78, 96), (96, 116, 136))), (panes[lit], (250, 214, 140))):
            if len(chosen):
                self.fill(chosen, glass)

    def tree(self, x: float, z: float, lowest: float = 2.2):
        rng = self.rng
        radius, bottom = rng.uniform(1.1, 1.8), lowest + rng.uniform(0, 0.5)
        self.fill(_box(x - 0.16, 0, x + 0.16, bottom + 0.6), self.colour((92, 70, 52), spread=5), VEGETATION, z)
        leaves = self.colour((62, 112, 44), (92, 130, 52), (48, 92, 52), (116, 128, 48))
        turn, reach, size = rng.uniform((0, 0.2, 0.4), (2 * np.pi, 0.75, 0.64), (9, 3)).T
        across = x + radius * reach * np.cos(turn)
        up = bottom + radius * (1.1 + reach * np.sin(turn))
        for step in range(9):  # from the dark underside to the lit top
            blob = _disc(across[step], up[step] + 0.07 * step, radius * size[step], radius * size[step], corners=8)
            self.fill(blob, leaves * (0.7 + 0.055 * step), VEGETATION, z)

    def pole(self, x: float, z: float, top: float | None = None):
        """Paint a post, at least three pixels wide at 256 x 128; without ``top``, a street lamp."""
        half = max(0.1, 0.0125 * self.height * z / self.focal)
        grey = self.colour((128, 134, 130), (74, 86, 82), (160, 162, 160), spread=4)
        tip = top or self.rng.uniform(4.2, 6)
        self.fill(_box(x - half, 0, x + half, tip), grey, POLE, z)
        self.fill(_box(x, 0, x + half, tip), 0.7 * grey, z=z)
        if top is None:
            arm = x - np.sign(x) * 1.3
            self.fill(_box(min(x, arm), tip - 1.4 * half, max(x, arm), tip), grey, POLE, z)
            self.fill(_box(arm - 0.35, tip - 2.4 * half, arm + 0.35, tip), 0.8 * grey, POLE, z)

    def sign(self, x: float, z: float):
        rng, radius, y = self.rng, self.rng.uniform(0.45, 0.6), self.rng.uniform(2.3, 2.8)
        self.pole(x, z, top=y)
        red, blue, yellow, white = (204, 28, 38), (24, 84, 190), (246, 200, 24), (240, 240, 236)
        outer, inner = ((red, white), (blue, white), (yellow, (40, 40, 40)), (white, red), (red, red))[rng.integers(5)]
        corners = 4 if outer == yellow else rng.choice([3, 4, 16])
        turn = np.pi / 4 if corners == 4 and rng.random() < 0.5 else np.pi / 2
        plate = _disc(0, 0, radius, radius, int(corners), turn)
        self.fill(plate + (x, y), self.colour(outer, spread=6), SIGN, z)
        self.fill(0.55 * plate + (x, y), self.colour(inner, spread=6), z=z)

    def person(self, x: float, z: float):
        rng = self.rng
        tall, stride, swing, lean = rng.uniform((0.92, 0.02, 0, -0.05), (1.12, 0.28, 0.2, 0.05))
        trousers = self.colour((44, 50, 78), (60, 54, 50), (110, 96, 80))
        coat, skin = self.colour(*_CLOTHES), self.colour(*_SKINS, spread=5)
        self.fill(_disc(0, 0, 0.4, 0.06) + (x, 0), (52, 52, 56), z=z)
        parts = [
            (np.array([(-0.16, 0.9), (0.06, 0.9), (-stride + 0.09, 0), (-stride - 0.12, 0)]), trousers),
            (np.array([(-0.06, 0.9), (0.16, 0.9), (stride + 0.12, 0), (stride - 0.09, 0)]), 0.85 * trousers),
            (np.array([(-0.2, 1.42), (-0.08, 1.42), (-0.24 - swing, 0.8), (-0.36 - swing, 0.85)]), 0.8 * coat),
            (np.array([(0.2, 1.42), (0.08, 1.42), (0.24 + swing, 0.8), (0.36 + swing, 0.85)]), 0.8 * coat),
            (np.array([(-0.24, 1.46), (0.24, 1.46), (0.23, 0.8), (-0.23, 0.8)]), coat),
            (_disc(lean, 1.62, 0.14, 0.17, 12), skin),
            (_disc(lean, 1.72, 0.14, 0.09, 12), self.colour((60, 42, 30), (30, 26, 26), (170, 130, 80))),
        ]
        for outline, colour in parts:
            self.fill(outline * tall + (x, 0), colour, PERSON, z)

    def car(self, x: float, z: float):
        """Paint a car from the front or back, with the flank that faces the viewer."""
        paint, glass = self.colour(*_PAINTS), self.colour((44, 54, 68), spread=5)
        tyre, back = (24, 24, 26), self.rng.uniform(3.6, 4.3)
        roof = self.rng.uniform(1.4, 1.65)
        self.fill(self.ground(x - 1.05, x + 1.05, z - 0.3, z + back + 0.3), (38, 38, 42))
        flank = x - 0.88 * np.sign(x - self.eye[0])  # the side nearer to the eye

        def along(outline: Sequence[tuple[float, float]]) -> np.ndarray:
            return np.array([(flank, y, z + depth) for depth, y in outline])

        self.fill(along(_box(0, 0.25, back, 0.95)), 0.78 * paint, CAR)
        self.fill(along([(0.2, 0.9), (0.6, roof), (back - 1.8, roof), (back - 1.0, 0.9)]), 0.72 * paint, CAR)
        self.fill(along([(0.5, 0.98), (0.75, roof - 0.1), (back - 1.9, roof - 0.1), (back - 1.4, 0.98)]), glass, CAR)
        for hub in (0.75, back - 0.75):
            self.fill(along(_disc(hub, 0.32, 0.34, 0.34, 12)), tyre, CAR)
        lamp = (222, 40, 36) if x > 0 else (250, 246, 220)  # rear lamps on the right, headlamps on the left
        parts = [
            (_box(-0.85, 0, -0.6, 0.4), tyre),
            (_box(0.6, 0, 0.85, 0.4), tyre),
            (np.array([(-0.82, 0.9), (-0.62, roof), (0.62, roof), (0.82, 0.9)]), 0.95 * paint),
            (np.array([(-0.66, 0.96), (-0.54, roof - 0.12), (0.54, roof - 0.12), (0.66, 0.96)]), glass),
            (_box(-0.9, 0.22, 0.9, 0.95), paint),
            (_box(-0.9, 0.22, 0.9, 0.4), 0.55 * paint),
            (_box(-0.86, 0.66, -0.56, 0.84), lamp),
            (_box(0.56, 0.66, 0.86, 0.84), lamp),
            (_box(-0.26, 0.45, 0.26, 0.58), (226, 226, 214)),
        ]
        for outline, colour in parts:
            self.fill(outline + (x, 0), colour, CAR, z)

    def bin(self, x: float, z: float):
        """Paint a litter bin, which Cityscapes' evaluation ignores."""
        self.fill(_box(x - 0.3, 0, x + 0.3, 0.9), self.colour((60, 74, 60), (90, 60, 50)), UNLABELED, z)
        self.fill(_box(x - 0.34, 0.85, x + 0.34, 1.0), self.colour((40, 42, 44)), UNLABELED, z)

    def paint_things(self):
        """Paint all objects from far to near, except those that would be tiny or outside the picture."""
        rng, kerb = self.rng, self.kerb
        things = []

        def scatter(draw, count: int, inner: float, outer: float, near: float, far: float, tall: float):
            for side in rng.permutation(np.resize([-1, 1], count)):
                x = side * rng.uniform(inner, outer)
                margin = min(self.vanishing_point[0], self.width - self.vanishing_point[0]) * 0.94
                first = max(near, self.focal * abs(x - self.eye[0]) / margin)
                last = min(far, self.focal * tall / 5)  # at least 2.5 pixels in the final picture
                if first < last:
                    things.append((rng.uniform(first, last), x, draw))

        scatter(self.tree, rng.integers(2, 5), kerb + 0.8, kerb + 1.4, 7, 22, 4)
        scatter(self.pole, rng.integers(3, 6), kerb + 0.3, kerb + 0.6, 4, 12, 5)
        scatter(self.sign, rng.integers(3, 6), kerb + 0.3, kerb + 0.7, 4, 10, 1)
        scatter(self.person, rng.integers(4, 8), kerb + 0.5, self.wall - 0.5, 4, 11, 1.75)
        scatter(self.person, rng.integers(1, 4), 0.3, kerb, 5.5, 11, 1.75)
        scatter(self.bin, rng.integers(0, 3), kerb + 0.6, self.wall - 0.4, 5, 10, 1)
        for lane, near in ((-kerb + 1.05, 5), (-1.7, 6), (1.7, 7), (kerb - 1.05, 5)):
            for z in np.arange(near + rng.uniform(0, 5), min(24, self.focal * 1.5 / 5), 7):
                if rng.random() < 0.5:
                    things.append((z + rng.uniform(0, 1.5), lane + rng.normal(0, 0.1), self.car))
        for z, x, draw in sorted(things, key=lambda thing: -thing[0]):
            draw(x, z)

    def paint_bonnet(self):
        if self.rng.random() < 0.35:
            paint, rise = self.colour(*_PAINTS), self.rng.uniform(0.05, 0.1) * self.height
            centre, axes = (self.width // 2, self.height), (int(0.55 * self.width), int(rise))
            cv2.ellipse(self.image, centre, axes, 0, 0, 360, (0.6 * paint).tolist(), -1)
            cv2.ellipse(self.labels, centre, axes, 0, 0, 360, EGO_VEHICLE, -1)
            self.polygons.append((EGO_VEHICLE, cv2.ellipse2Poly(centre, axes, 0, 0, 360, 5)))

    def develop(self) -> tuple[np.ndarray, np.ndarray]:
        """Halve the size; add texture, clouds, lighting, blur and sensor noise."""
        rng, size = self.rng, (self.width // 2, self.height // 2)
        labels = np.ascontiguousarray(self.labels[1::2, 1::2])
        image = cv2.resize(self.image, size, interpolation=cv2.INTER_AREA).astype(np.float32)

        def waves(rows: int) -> np.ndarray:
            grid = rng.standard_normal((rows, max(2, rows * size[0] // size[1])), np.float32)
            return cv2.resize(grid, size, interpolation=cv2.INTER_CUBIC)

        strength = np.tile(np.float32(_DEFAULT_TEXTURE), (256, 1))
        strength[list(_TEXTURE)] = list(_TEXTURE.values())
        strength[SKY] = 0
        texture = 1 + strength[labels, 0] * waves(110) + strength[labels, 1] * waves(14)
        cloud = np.clip(waves(5) + 0.3 * waves(14) - 0.2, 0, 0.7) * (labels == SKY)
        image = image * texture[..., None]
        image += cloud[..., None] * (np.float32(self.horizon) * 1.06 - image)
        ramp_x, ramp_y = (np.linspace(-1, 1, n, dtype=np.float32) * rng.uniform(-0.1, 0.1) for n in size)
        light = rng.uniform(0.82, 1.12) * (1 + ramp_x[None] + ramp_y[:, None])
        image = image * light[..., None] * np.float32(self.tint)
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.25, 0.55) * max(1, size[1] / 256))
        image += rng.uniform(1.5, 5) * rng.standard_normal(image.shape, np.float32)
        return np.clip(image, 0, 255).astype(np.uint8), labels

    def labelme(self, image: str) -> dict:
        """The contents of Labelme's file for the picture ``image``."""
        width, height = self.width // 2, self.height // 2
        sky = np.array([(0, 0), (2 * width, 0), (2 * width, 2 * height), (0, 2 * height)]) - 0.5
        shapes = []
        for label, polygon in [(SKY, sky), *self.polygons]:
            corners = clip((polygon + 0.5) / 2, width, height)  # from centres of pixels, at twice the size
            if len(corners) > 2:
                points = corners.round(2).tolist()
                shapes.append(dict(label=NAMES[label], points=points, group_id=None, shape_type='polygon', flags={}))
        return dict(
            version='5.5.0',
            flags={},
            shapes=shapes,
            imagePath=image,
            imageData=None,
            imageHeight=height,
            imageWidth=width,
        )


def render_scene(seed: int | Sequence[int], size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Render one street scene. The same ``seed`` and ``size`` give the same bytes.

    Args:
        seed: anything ``np.random.default_rng`` takes as a seed.
        size: ``(width, height)`` in pixels, each from 32 to 4096.

    Returns:
        The image (uint8 RGB ``[H, W, 3]``) and its Cityscapes labelIds (uint8 ``[H, W]``).
    """
    _check_size(size)
    return _paint(seed, size).develop()


def _paint(seed: int | Sequence[int], size: tuple[int, int]) -> _Street:
    street = _Street(np.random.default_rng(seed), size)
    street.paint_backdrop()
    street.paint_ground()
    street.paint_lots()
    street.paint_things()
    street.paint_bonnet()
    return street


def make_toy_streets(
    out: str | Path, train: int, val: int, size: tuple[int, int], seed: int = 0, labelme: bool = False
) -> None:
    """Write a data set for mmseg's ``CityscapesDataset``, completely or not at all.

    Args:
        out: new or empty folder. A folder that already holds the same data set is kept unchanged.
        train: number of training scenes, at most a million.
        val: number of validation scenes, all different from the training scenes.
        size: ``(width, height)`` in pixels, each from 32 to 4096.
        seed: random seed, at least 0.
        labelme: write all scenes into one folder, each with a file of Labelme's polygons beside it instead of label
            maps, as if a person had drawn them.
    """
    _check_size(size)
    for name, value in dict(train=train, val=val).items():
        if not 1 <= value <= MAX_SCENES:
            raise UserError(f'{name} must be between 1 and {MAX_SCENES}, got {value}')
    if seed < 0:
        raise UserError(f'seed must be at least 0, got {seed}')
    out = Path(out).resolve()
    parameters = dict(train=train, val=val, size=list(size), seed=seed, version=GENERATOR_VERSION)
    if labelme:
        parameters['labelme'] = True
    try:
        if _holds(out, parameters):
            print(f'{out} already holds these toy streets')
            return
        if out.is_file() or (out.is_dir() and any(out.iterdir())):
            raise UserError(f'{out} already exists with other content; choose another folder or delete it')
        partial = out.with_name(f'{out.name}.partial')
        if partial.exists():
            raise UserError(f'{partial} was left by a killed run, or another run is writing it; delete it first')
        partial.mkdir(parents=True)
        try:
            (_write_labelme if labelme else _write_scenes)(partial, parameters)
            partial.replace(out)
        except BaseException:  # also on Ctrl-C
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except OSError as error:
        raise UserError(f'cannot write the toy streets to {out}: {error.strerror or error}') from error
    print(f'{out} holds ' + (f'{train + val} scenes' if labelme else f'{train} train and {val} val scenes'))


def parse_size(text: str) -> tuple[int, int]:
    """Parse ``256x128`` into ``(256, 128)``."""
    match = re.fullmatch(r'(\d{1,9})x(\d{1,9})', text)
    if match is None:
        raise UserError(f'size must be WIDTHxHEIGHT, such as 256x128, got {text!r}')
    return int(match[1]), int(match[2])


def _check_size(size: tuple[int, int]) -> None:
    if len(size) != 2 or not all(MIN_SIDE <= side <= MAX_SIDE for side in size):
        raise UserError(f'size must be a width and a height from {MIN_SIDE} to {MAX_SIDE} pixels, got {tuple(size)}')


def _holds(out: Path, parameters: dict) -> bool:
    try:
        return json.loads((out / 'toy_streets.json').read_text()) == parameters
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False


def _write_scenes(root: Path, parameters: dict) -> None:
    train_ids = np.full(256, 255, np.uint8)
    train_ids[list(TRAIN_IDS)] = list(TRAIN_IDS.values())
    for folder in (root / kind / split / 'toytown' for kind in ('leftImg8bit', 'gtFine') for split in ('train', 'val')):
        folder.mkdir(parents=True)
    for split, index in _scenes(parameters):
        image, labels = render_scene([parameters['seed'], int(split == 'val'), index], parameters['size'])
        name = f'{split}/toytown/toytown_{index:06d}_000000'
        _write_png(root / f'leftImg8bit/{name}_leftImg8bit.png', image[..., ::-1])  # cv2 writes BGR
        _write_png(root / f'gtFine/{name}_gtFine_labelIds.png', labels)
        _write_png(root / f'gtFine/{name}_gtFine_labelTrainIds.png', train_ids[labels])
    (root / 'toy_streets.json').write_text(json.dumps(parameters) + '\n')


def _write_labelme(root: Path, parameters: dict) -> None:
    for number, (split, index) in enumerate(_scenes(parameters)):
        street = _paint([parameters['seed'], int(split == 'val'), index], parameters['size'])
        name = f'street_{number:06d}'
        _write_png(root / f'{name}.png', street.develop()[0][..., ::-1])
        (root / f'{name}.json').write_text(json.dumps(street.labelme(f'{name}.png')))
    (root / 'toy_streets.json').write_text(json.dumps(parameters) + '\n')


def _scenes(parameters: dict) -> Iterable[tuple[str, int]]:
    scenes = [(split, index) for split in ('train', 'val') for index in range(parameters[split])]
    return tqdm(scenes, desc='toy streets', unit='scene', disable=None)  # None: no bar in a log file


def _write_png(path: Path, pixels: np.ndarray) -> None:
    path.write_bytes(cv2.imencode('.png', pixels)[1].tobytes())  # cv2.imwrite does not raise on a full disk
