"""Letters of six scripts from the free fonts that matplotlib ships: few-shot images without a download."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Unpack, final

import matplotlib
import numpy as np
import torch
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from bayesmeta.randomness import rng
from bayesmeta.tasks.image_tasks import AbstractFewShot, FewShotOptions
from bayesmeta.tasks.images import ImageSet
from bayesmeta.tasks.splits import Splits, by_fractions, by_names, checked_fractions

STYLES = {
    "DejaVuSans": ("", "-Bold", "-Oblique", "-BoldOblique"), "DejaVuSansMono": ("", "-Bold", "-Oblique", "-BoldOblique"),
    "DejaVuSerif": ("", "-Bold", "-Italic", "-BoldItalic"), "STIXGeneral": ("", "Bol", "Italic", "BolIta"),
}  # fmt: skip
TYPEFACES = tuple(family + style for family, styles in STYLES.items() for style in styles)
SCRIPTS = ("Latin", "Greek", "Cyrillic", "Armenian", "Georgian", "Lao")
SPLIT = {"train": ("Latin", "Greek"), "val": ("Georgian",), "test": ("Cyrillic", "Armenian", "Lao")}
LEAST_TYPEFACES = 8
CATEGORIES = ("Lu", "Ll", "Lt", "Lo")  # capitals, small letters, both in one, and letters of scripts that have no case
EM, SIDE, FITS = 48, 56, 52  # pixels of the letters as rendered: of an em, of the canvas, and of the largest letter
ROTATION, SHEAR, SCALE, SHIFT = math.radians(12), 0.2, 0.12, 0.08  # the jitter is uniform between − and + these
BLOCK = 4096  # images turned at once


@final
class Glyphs(AbstractFewShot):
    """Few-shot tasks of letters, ink 1 on ground 0, ``(T, N, 1, 28, 28)``: a class is a letter, an image a typeface and a jitter.

    ============ =====================================================================================================
    argument
    ============ =====================================================================================================
    splits       default: Latin and Greek to train on, Georgian to validate, Cyrillic, Armenian and Lao to test on. Or three
                 fractions of the letters; or lists by split of scripts ("Greek") or letters ("GREEK SMALL LETTER PHI")
    instances    images of each letter, 20 as in Omniglot; each typeface in turn, in a random order
    size         height and width
    ============ =====================================================================================================

    Letters that exist in at least 8 of the 16 typefaces (DejaVu Sans, Sans Mono and Serif, STIX General, each upright, bold, slanted
    and both), about 1,500 in all. Rotation to 12 degrees, shear to 0.2, size to 12%, place to 8% of the side. A letter that looks
    just like an earlier one in some typeface (Greek Α, Cyrillic А after Latin A) is left out, whatever their scripts, so that none to
    test on was there to train on. ``seed`` draws the images too.

    Groups are scripts: ``within_groups=True`` makes tasks within one. Sources are the typefaces, indices into `TYPEFACES`. Options as in
    `AbstractFewShot`. Meant to be easier than Omniglot (by how little: docs/tasks.md): results here do not stand for those there.
    """

    def __init__(
        self, *, splits: Splits | None = None, instances: int = 20, size: int = 28, **options: Unpack[FewShotOptions]
    ) -> None:
        for name, value in (("instances", instances), ("size", size)):
            if not (isinstance(value, int) and value >= 1):
                raise ValueError(f"{name}: expected a whole number >= 1, got {value!r}")
        seed = options.get("seed", 0)
        data = _drawn(instances, size, seed)
        if splits is None or isinstance(splits, Mapping):
            split = by_names(SPLIT if splits is None else splits, data.names, data.groups)
        else:
            split = by_fractions(len(data.names), checked_fractions(splits), seed)
        super().__init__(data, split, **options)


@lru_cache(maxsize=2)
def _drawn(instances: int, size: int, seed: int) -> ImageSet:
    """All images, kept for the next family of the same seed."""
    names, scripts, faces, letters, first = _letters()
    counts = np.diff([*first, len(letters)])
    with rng(torch.Generator().manual_seed(seed)):
        # every letter's typefaces in a random order, again and again
        turn = torch.rand(len(names), int(counts.max())).masked_fill(torch.arange(int(counts.max())) >= torch.tensor(counts)[:, None], 2.0)
        place = torch.arange(instances) % torch.tensor(counts)[:, None]
        row = (torch.tensor(first)[:, None] + turn.argsort(1).gather(1, place)).flatten()
        jitter = 2 * torch.rand(len(row), 5) - 1
    images = [_jittered(letters[row[s : s + BLOCK]], jitter[s : s + BLOCK], size) for s in range(0, len(row), BLOCK)]
    return ImageSet(
        images=torch.cat(images), labels=torch.arange(len(names)).repeat_interleave(instances), names=names, groups=scripts,
        sources=faces[row], source="Glyphs",
    )  # fmt: skip


def _jittered(letters: Tensor, jitter: Tensor, size: int) -> Tensor:
    """``letters (M, SIDE, SIDE)`` uint8, turned, sheared, sized and moved by ``jitter (M, 5)`` in [−1, 1], to ``(M, 1, size, size)``."""
    angle, shear, scale = ROTATION * jitter[:, 0], SHEAR * jitter[:, 1], 1 + SCALE * jitter[:, 2]
    cos, sin = angle.cos() / scale, angle.sin() / scale
    rows = torch.stack([cos, cos * shear - sin, 2 * SHIFT * jitter[:, 3], sin, sin * shear + cos, 2 * SHIFT * jitter[:, 4]], 1)
    grid = torch.nn.functional.affine_grid(rows.view(-1, 2, 3), [len(letters), 1, size, size], align_corners=False)
    x = torch.nn.functional.grid_sample(letters[:, None].float(), grid, align_corners=False)
    return x.round().clamp(0, 255).to(torch.uint8)


@lru_cache(maxsize=1)
def _letters() -> tuple[tuple[str, ...], tuple[str, ...], Tensor, Tensor, list[int]]:
    """Names and scripts of ``K`` letters; of all letters in all their typefaces, those of a letter one after the other, the typeface
    ``(R,)`` and the picture ``(R, SIDE, SIDE)`` uint8; and where each letter's begin.
    """
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    paths = [str(folder / f"{name}.ttf") for name in TYPEFACES]
    found: dict[int, list[int]] = {}
    for face, path in enumerate(paths):
        for code in FT2Font(path).get_charmap():
            if unicodedata.category(chr(code)) in CATEGORIES and _script(code) in SCRIPTS:
                found.setdefault(code, []).append(face)
    fonts = [ImageFont.truetype(path, EM, layout_engine=ImageFont.Layout.BASIC) for path in paths]
    seen: set[tuple[int, tuple[int, int], bytes]] = set()
    names, scripts, pictures = [], [], []
    faces: list[int] = []
    first: list[int] = []
    for code in sorted((code for code in found if len(found[code]) >= LEAST_TYPEFACES), key=lambda c: (SCRIPTS.index(_script(c)), c)):
        drawn = [_ink(fonts[face], chr(code)) for face in found[code]]
        keys = {(face, ink.size, ink.tobytes()) for face, ink in zip(found[code], drawn, strict=True)}
        if keys & seen or any(not ink.size[0] for ink in drawn):
            continue
        seen |= keys
        first.append(len(faces))
        names.append(unicodedata.name(chr(code)))
        scripts.append(_script(code))
        faces += found[code]
        pictures += [np.asarray(_centred(ink)) for ink in drawn]
    return tuple(names), tuple(scripts), torch.tensor(faces), torch.from_numpy(np.stack(pictures)), first


def _script(code: int) -> str:
    return unicodedata.name(chr(code), "").split(" ")[0].capitalize()


def _ink(font: ImageFont.FreeTypeFont, letter: str) -> Image.Image:
    """A letter cut out at its ink; empty where it has none."""
    canvas = Image.new("L", (4 * EM, 4 * EM))
    ImageDraw.Draw(canvas).text((EM, 2 * EM), letter, font=font, fill=255, anchor="ls")
    return canvas.crop(canvas.getbbox() or (0, 0, 0, 0))


def _centred(ink: Image.Image) -> Image.Image:
    """In the middle of the canvas; made smaller where it is too large."""
    ratio = min(1.0, FITS / max(ink.size))
    if ratio < 1:
        ink = ink.resize((max(1, round(ink.size[0] * ratio)), max(1, round(ink.size[1] * ratio))), Image.Resampling.BILINEAR)
    canvas = Image.new("L", (SIDE, SIDE))
    canvas.paste(ink, ((SIDE - ink.size[0]) // 2, (SIDE - ink.size[1]) // 2))
    return canvas
