import base64
import re
from dataclasses import replace
from html.parser import HTMLParser

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest

from bayesmeta.report import Report

EMPTY = {"meta", "img", "br", "hr", "link", "input"}


class Reader(HTMLParser):
    """Tags that open must close in order; collects text, tags and attributes."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.text, self.images = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "img":
            self.images.append(dict(attrs))
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)


def read(page):
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


@pytest.fixture(scope="module")
def page(report, tmp_path_factory):
    settings = dict(matplotlib.rcParams)
    text = report.to_html(tmp_path_factory.mktemp("page") / "report.html").read_text(encoding="utf-8")
    assert plt.get_fignums() == [] and dict(matplotlib.rcParams) == settings
    return text


@pytest.fixture(scope="module")
def reader(page):
    return read(page)


def test_nothing_is_loaded_and_nothing_runs(page, reader):
    assert not re.search(r"https?://|<script|<link|@import|url\(|javascript:", page)
    names = {name for _, attributes in reader.tags for name in attributes}
    assert "href" not in names and not any(name.startswith("on") for name in names)
    assert all(image["src"].startswith("data:image/png;base64,") for image in reader.images)


def test_every_text_is_escaped(page, reader):
    assert "<b>x" not in page and "&lt;b&gt;x" in page
    assert "<co>" not in page and "<elbo>" not in page and "<x86>" not in page and "<noisy>" not in page
    text = " ".join(reader.text)
    for words in ("<b>x", "Radon & <co>", "<elbo>", "<x86>", "Query targets are <noisy>."):
        assert words in text


def test_every_learner_has_its_row_settings_and_diagnostics(report, reader):
    text = " ".join(reader.text)
    headings = [tag for tag, attributes in reader.tags if tag == "th" and attributes.get("scope") == "row"]
    assert len(headings) == len(report.results) * 2 + len(report.results) - 1  # scores, intervals, differences
    assert len([tag for tag, _ in reader.tags if tag == "article"]) == len(report.results)
    for words in ("inner_steps", "max R-hat", "1.02", "2.13", "7,400"):
        assert words in text


def test_the_table_has_the_numbers_of_summary(report, page):
    for row in report.summary():
        if row["metric"] in ("nll", "coverage90"):
            shown = [row[key] for key in ("estimate", "lower", "upper")]
            cells = re.findall(r"<td>(.*?)</td>", page)
            digits = [[float(d) for d in re.findall(r"\d+\.\d+", cell)] for cell in cells]
            assert any(ds == pytest.approx(shown, abs=0.006) for ds in digits if len(ds) == 3), row


def test_pictures_are_whole_and_captions_teach(reader):
    titles = [image["alt"] for image in reader.images]
    assert len(titles) == 7 and all(titles)  # scores, calibration, PIT, bands, two sites, training
    for image in reader.images:
        png = base64.b64decode(image["src"].partition(",")[2], validate=True)
        assert png.startswith(b"\x89PNG") and png.rstrip().endswith(b"IEND\xaeB`\x82")
    text = " ".join(reader.text)
    assert text.count("How to read it.") == len(titles)
    assert "Below it, too many targets fall outside: the learner is overconfident." in text


def test_findings_are_no_stronger_than_the_intervals(report, reader):
    text = " ".join(reader.text)
    assert "NoPooling has the lowest NLL" in text
    clear = [row["learner"] for row in report.paired() if row["excludes_zero"]]
    assert clear
    sentence = next(words for words in reader.text if "worse in NLL" in words)
    assert [name for name in report.results if name in sentence] == clear


def test_the_same_report_gives_the_same_page_whatever_the_callers_style(report, page, tmp_path):
    with matplotlib.rc_context({"axes.facecolor": "black", "font.size": 30}):
        assert report.to_html(tmp_path / "again.html").read_text(encoding="utf-8") == page


def test_classification_has_reliability_and_no_pit(classification, tmp_path):
    reader = read(classification.to_html(tmp_path / "report.html").read_text(encoding="utf-8"))
    titles = [image["alt"] for image in reader.images]
    assert any("Reliability" in title for title in titles) and not any("fell" in title for title in titles)
    assert "expected calibration error" in " ".join(reader.text)


def test_failures_cost_nobody_the_page(parts, tmp_path):
    result = parts["results"]["NUTS"]
    values = {name: np.where(np.arange(8) == 2, np.nan, v) for name, v in result.metrics.items()}
    values["crps"] = np.full(8, np.inf)
    pit = result.pit.copy()
    pit[2] = np.nan
    parts["results"] = {"NUTS": replace(result, metrics=values, pit=pit, bands=())} | {"other": result}
    reader = read(Report(**parts).to_html(tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "NUTS gave no finite score on 8 of 8 tasks." in " ".join(reader.text)
