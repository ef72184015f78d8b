"""CSV files: clear errors for broken ones, and the real ones load."""

import os
from pathlib import Path

import pytest
import torch

from bayesmeta.tasks import Panel

DATA = Path(os.environ.get("BAYESMETA_DATA", Path(__file__).parents[2].parent / "shared" / "data")) / "panel"


def load(path, text=None, **changes):
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return Panel.from_csv(path, **{"group": "county", "features": ["floor"], "target": "radon", **changes})


GOOD = "county,floor,radon,people\nA,0,1.5,10\n\nA,1,,20\nB,NA,2.5,30\n B ,0,3.5,40\n"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "homes.csv"


def test_a_good_file(path):
    panel = load(path, GOOD, missing={"floor": 9})
    assert panel.task_names() == ["A", "B"] and panel.num_rows == 2 and panel.num_rows_missing == 2
    panel = load(path, GOOD.replace("NA", "9").encode("utf-8-sig"), missing={"floor": [8, 9]})
    assert panel.num_rows_missing == 2
    assert load(path, GOOD.replace("NA", "9")).num_rows_missing == 1
    assert load(path, '"county","floor","radon"\r\n"St. Louis, MN",0,1\r\n').task_names() == ["St. Louis, MN"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "homes.csv, line 1: expected a header line"),
        ("\nA,1,2\n", "homes.csv, line 1: expected a header line"),
        ("county,floor,radon\n", "homes.csv: expected rows below the header, got none"),
        ("county,floor,floor\nA,1,2\n", "line 1: these columns appear more than once: 'floor'"),
        ("county,floor,radon\nA,1,2\nA,1\n", "homes.csv, line 3: expected 3 cells, got 2"),
        ("county,floor,radon\nA,1,2\n\nA,1,2,3\n", "homes.csv, line 4: expected 3 cells, got 4"),
        ("county,floor,radon\nA,1,2\nA,first,3\n", "line 3, column 'floor': expected a number, got 'first' .*encoded"),
        ("county,floor,radon\nA,1,2,\n", "line 2: expected 3 cells, got 4"),
        ("county,floor,radon\nA,1,2\n,1,2\n", "line 3, column 'county': expected the name of a group, got ''"),
        ("county,floor,radon\nA,1,inf\n", "line 2, column 'radon': expected a finite number, got inf"),
        ("county,floor,radon\nA,,1\n", "homes.csv: expected complete rows, but every row lacks a value"),
        ("county,floors,radon\nA,1,2\n", "no column 'floor'; did you mean 'floors'.*columns: county, floors, radon"),
        ("County,FLOOR,radon\nA,1,2\n", "no column 'county'; did you mean 'County'"),
        ("county;floor;radon\nA;1;2\n", r"no column 'county' \(columns: county;floor;radon\)"),
        ('county,floor,radon\nA,"1"x,2\n', "homes.csv, line 2: "),
        ("county,floor,radon\nÅ,1,2\n".encode("latin-1"), "homes.csv: expected text in UTF-8"),
    ],
)
def test_broken_files(path, text, message):
    with pytest.raises(ValueError, match=message):
        load(path, text)


def test_wrong_arguments(path):
    with pytest.raises(FileNotFoundError, match=r"homes\.csv"):
        load(path)
    with pytest.raises(ValueError, match="no column 'peopel'; did you mean 'people'"):
        load(path, GOOD, exposure="peopel")
    with pytest.raises(ValueError, match="no column 'flor'; did you mean 'floor'"):
        load(path, GOOD, missing={"flor": 9})
    with pytest.raises(ValueError, match="line 5, column 'people': expected an exposure above 0, got 0"):
        load(path, GOOD.replace(",30", ",0"), exposure="people")
    with pytest.raises(ValueError, match=r"line 2, column 'radon': expected a whole number, got 1\.5"):
        load(path, GOOD, target_type="int")
    with pytest.raises(TypeError, match="features: expected a list of column names, got the text 'floor'"):
        load(path, GOOD, features="floor")


def test_names_of_groups(path):
    text = "fips,county,floor,radon\n1,Lake,0,1\n2,Lake,0,1\n3,Cook,0,1\n3,Other,0,1\n4,,0,1\n"
    assert load(path, text, group="fips", group_name="county").task_names() == ["Lake (1)", "Lake (2)", "Cook", "4"]
    text = "state,fips,floor,radon\nMN,1,0,1\nR5,1,0,1\nMN,1,0,1\n"
    assert load(path, text, group=["state", "fips"]).task_names() == ["MN 1", "R5 1"]


# file: (arguments, groups, rows, rows with a missing value); of one of radon_us's 468 counties no floor is known
REAL = {
    "radon_mn.csv": ({"group": "county_fips", "features": ["floor", "log_uranium"], "target": "log_radon"}, 85, 919, 0),
    "radon_us.csv": (
        {
            "group": "county_fips",
            "group_name": "county",
            "features": ["floor"],
            "target": "log_radon",
            "missing": {"floor": 9},
        },
        467,
        12573,
        284,
    ),
    "hsb82.csv": (
        {"group": "school", "features": ["ses", "catholic", "school_mean_ses"], "target": "math"},
        160,
        7185,
        0,
    ),
    "wages.csv": ({"group": "person", "features": ["experience_years", "ged"], "target": "log_wage"}, 888, 6402, 0),
    "chickweight.csv": ({"group": "chick", "features": ["day", "diet"], "target": "weight_g"}, 50, 578, 0),
    "verbagg.csv": (
        {"group": "person", "features": ["anger", "male", "do_not_want"], "target": "agrees", "target_type": "int"},
        316,
        7584,
        0,
    ),
    "contraception.csv": (
        {"group": "district", "features": ["age_centred", "urban"], "target": "uses", "target_type": "int"},
        60,
        1934,
        0,
    ),
    "grouseticks.csv": (
        {"group": "brood", "features": ["height_m", "year"], "target": "ticks", "target_type": "int"},
        118,
        403,
        0,
    ),
    "county_murders.csv": (
        {
            "group": "county_fips",
            "features": ["pct_male", "real_personal_income_per_head"],
            "target": "murders",
            "exposure": "population",
            "target_type": "int",
        },
        2197,
        37349,
        3,
    ),
}


@pytest.mark.parametrize("name", REAL)
def test_real_files(name):
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{path} is not there; set BAYESMETA_DATA to the folder that holds panel/{name}")
    arguments, groups, rows, missing = REAL[name]
    panel = Panel.from_csv(path, **arguments, standardize=True)
    assert panel.num_tasks == groups and panel.num_rows_missing == missing and panel.num_rows == rows - missing
    assert len(set(panel.task_names())) == groups
    assert panel.num_groups_missing == (name == "radon_us.csv")
    episode = panel.episodes(generator=torch.Generator().manual_seed(0))
    episode.check()
    assert episode.union().counts.sum() == rows - missing
    target = episode.query.y[episode.query.mask]
    if name in ("verbagg.csv", "contraception.csv"):
        assert set(target.tolist()) == {0, 1}
    elif "target_type" in arguments:
        assert target.dtype == torch.int64 and target.min() >= 0 and target.max() > 1
    else:
        assert target.is_floating_point()
    assert sum(panel.split(part).num_tasks for part in ("train", "val", "test")) == groups


def test_every_real_file_is_tested():
    if not DATA.exists():
        pytest.skip(f"{DATA} is not there; set BAYESMETA_DATA")
    assert {path.name for path in DATA.glob("*.csv")} == set(REAL)
