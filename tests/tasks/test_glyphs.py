"""Letters from fonts: what is there, what is left out, and that splits and episodes say the truth."""

import unicodedata
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.ft2font import FT2Font

from bayesmeta.tasks import Glyphs
from bayesmeta.tasks.glyphs import LEAST_TYPEFACES, SPLIT, TYPEFACES, _drawn, _letters


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_letters_exist_in_enough_typefaces_and_are_letters():
    names, scripts, faces, pictures, first = _letters()
    assert len(names) > 1200 and set(scripts) == {"Latin", "Greek", "Cyrillic", "Armenian", "Georgian", "Lao"}
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    maps = [set(FT2Font(str(folder / f"{name}.ttf")).get_charmap()) for name in TYPEFACES]
    for k, (name, start, end) in enumerate(zip(names, first, [*first[1:], len(faces)], strict=True)):
        letter = unicodedata.lookup(name)
        assert letter.isalpha() and name.startswith(scripts[k].upper())
        own = faces[start:end].tolist()
        assert len(own) >= LEAST_TYPEFACES and own == [i for i, codes in enumerate(maps) if ord(letter) in codes]
    assert pictures.shape[1:] == (56, 56) and (pictures.flatten(1).amax(1) > 100).all()


def test_no_two_letters_look_the_same_in_a_typeface():
    names, _, faces, pictures, first = _letters()
    letter = np.repeat(np.arange(len(names)), np.diff([*first, len(faces)]))
    seen = {}
    for k, face, picture in zip(letter.tolist(), faces.tolist(), pictures, strict=True):
        assert seen.setdefault((face, picture.numpy().tobytes()), k) == k, (names[k], names[seen[face, picture.numpy().tobytes()]])
    assert "LATIN CAPITAL LETTER A" in names
    assert not {"GREEK CAPITAL LETTER ALPHA", "CYRILLIC CAPITAL LETTER A"} & set(names)
    assert {"GREEK CAPITAL LETTER OMEGA", "CYRILLIC CAPITAL LETTER ZHE"} <= set(names)


def test_scripts_are_split():
    tasks = Glyphs()
    found = {name: set(tasks.split(name).group_names) for name in ("train", "val", "test")}
    assert found == {name: set(scripts) for name, scripts in SPLIT.items()}
    assert sum(tasks.split(name).num_classes for name in found) == tasks.num_classes
    other = Glyphs(splits={"train": ["Armenian"], "test": ["Lao", "GREEK SMALL LETTER PHI"]})
    assert set(other.split("test").group_names) == {"Lao", "Greek"}
    parts = [Glyphs(splits=(0.5, 0.2, 0.3)).split(name).class_names for name in ("train", "test")]
    assert len(parts[1]) == pytest.approx(0.3 * tasks.num_classes, abs=1) and not set(parts[0]) & set(parts[1])
    within = Glyphs(within_groups=True)
    classes = within.sample_tasks(50, generator=seeded())["classes"]
    assert all(len({within.group_names[k] for k in task}) == 1 for task in classes.tolist())


def test_images_are_the_same_for_the_same_seed_and_of_every_typeface_in_turn():
    first = Glyphs().images("LATIN SMALL LETTER G")
    _drawn.cache_clear()
    assert torch.equal(Glyphs(ways=3).images("LATIN SMALL LETTER G"), first)
    assert not torch.equal(Glyphs(seed=1).images("LATIN SMALL LETTER G"), first)
    assert first.shape == (20, 1, 28, 28) and len({bytes(image.numpy()) for image in first}) == 20
    sources = Glyphs()._by_class.sources[:20]  # of the first letter, which has all 16
    assert sorted(sources[:16].tolist()) == list(range(16)) and torch.equal(sources[16:], sources[:4])
    assert Glyphs(instances=40, size=20).images("LATIN SMALL LETTER G").shape == (40, 1, 20, 20)


def test_an_image_is_nearest_to_the_letter_its_label_says():
    """Jitter blurs small things; but pictures without any, found by correlation, tell most letters of an episode."""
    names, _, _, pictures, first = _letters()
    means = torch.stack([p.double().mean(0) for p in torch.tensor_split(pictures, torch.tensor(first[1:]))])
    means = torch.nn.functional.interpolate(means[:, None], (28, 28), mode="area").flatten(1)
    means = (means - means.mean(1, keepdim=True)) / means.std(1, keepdim=True)
    tasks = Glyphs(ways=10, test_shots=10)
    query = tasks.sample(20, generator=seeded()).query
    classes = tasks.sample_tasks(20, generator=seeded())["classes"]
    right = [(query.x[t].flatten(1).double() @ means[classes[t]].T).argmax(1) == query.y[t] for t in range(20)]
    assert tasks.class_names == list(names)
    assert torch.cat(right).double().mean() > 0.5  # chance is 0.1
    assert 0.1 < query.x.mean() < 0.2 and query.x.amax((2, 3, 4)).min() > 0.5  # ink is 1


def test_sources_are_typefaces():
    capitals = [f"LATIN CAPITAL LETTER {letter}" for letter in "ABCDEFGH"]
    tasks = Glyphs(splits={"train": capitals}, shots=3, test_shots=4, instances=32)
    support, query = tasks.across_sources(range(12), range(12, 16)).sample(20, generator=seeded())  # DejaVu, then STIX
    held = tasks._by_class
    known = {bytes(image.numpy()): face for image, face in zip(held.images, held.sources.tolist(), strict=True)}
    for points, faces in ((support, set(range(12))), (query, set(range(12, 16)))):
        pixels = (points.x * 255).round().to(torch.uint8).flatten(0, 1)
        assert {known[bytes(image.numpy())] for image in pixels} == faces
    with pytest.raises(ValueError, match="images for query: expected at least 4"):  # a letter that STIX lacks
        Glyphs(shots=3, test_shots=4, instances=32).across_sources(range(12), range(12, 16))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"instances": 0}, "instances: expected a whole number >= 1, got 0"),
        ({"size": 2.5}, "size: expected a whole number >= 1, got 2.5"),
        ({"instances": 10}, "Glyphs: class 'LATIN CAPITAL LETTER A' has 10 images for support and query: expected at least 16"),
        ({"splits": {"train": ["Klingon"]}}, "no class 'Klingon'"),
        ({"splits": {"train": ["Greek"], "test": ["Greek"]}}, "is in 'train' and in 'test'"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        Glyphs(**options)
