# SPDX-License-Identifier: Apache-2.0
"""The report: whole and offline, honest in its summary, safe against any string."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from irem_bids.bids import Excluded
from irem_bids.reconstruction.geometry import Grid, RigidTransform
from irem_bids.report import (
    ReportInput,
    bibliography,
    build_report,
    choices,
    cohort,
    make_figures,
    methods_text,
    plots,
    summary,
    tables,
    views,
    wording,
    write_citation,
)
from irem_bids.report import material as report_material
from irem_bids.report.latex import document, latex
from irem_bids.report.methods import citation_keys, readable
from irem_bids.settings import Settings

from .report_material import PLANES, SCALE, fitted_input, group, make_input, prepared, stack

HOSTILE = "<script>alert('x')</script> & \"q\" ünïcødé 脳 {subject} {{ 7*7 }} $x^2$"


class Page(HTMLParser):
    """Tags with their attributes, and the text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text += data

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[ReportInput, Path, Path]:
    """(input, output folder, page) of a complete group with two methods."""
    root = tmp_path_factory.mktemp("report")
    inp = make_input(root / "work")
    (root / "out").mkdir()
    return inp, root / "out", build_report([inp], root / "out", "sub-01")


def test_page_and_figures_are_where_they_belong(built):
    _, out, page = built
    assert page == out / "sub-01.html"
    assert sorted(p.name for p in out.iterdir()) == ["sub-01", "sub-01.html"]
    names = sorted(p.name for p in (out / "sub-01" / "figures").iterdir())
    assert all(re.fullmatch(r"sub-01_desc-[A-Za-z0-9]+_T1w\.(png|svg)", n) for n in names), names
    assert len(names) > 20


def test_every_section_is_there_and_linked(built):
    page = Page(built[2])
    wanted = [
        "summary",
        "inputs",
        "registration",
        "reconstruction",
        "training",
        "metrics",
        "settings",
        "provenance",
        "methods",
        "errors",
    ]
    assert [a["id"] for a in page.all("section")] == wanted
    links = [a["href"] for a in page.all("a") if (a["href"] or "").startswith("#")]
    assert {f"#{name}" for name in wanted} <= set(links)
    for text in ("near-isotropic voxels", "sub-01_acq-iso_T1w.nii.gz", "30.00", "torch", "2.13.0"):
        assert text in page.text


def test_cost_of_each_step_is_shown(built):
    text = Page(built[2]).text
    assert re.search(r"Step\s+Seconds\s+Memory, peak \(GB\)", text)
    assert re.search(r"normalise\s+3.2\s+n/a", text)
    assert re.search(r"optimise irem\s+10.0\s+1.2\s", text)


def test_every_picture_exists_and_has_words(built):
    _, out, path = built
    images = Page(path).all("img")
    assert len(images) > 20
    for image in images:
        source = out / unquote(image["src"] or "")
        assert source.stat().st_size > 200, source
        assert len(image["alt"] or "") > 20
        if source.suffix == ".png":
            pixels = np.asarray(Image.open(source))
            assert pixels.std() > 5, f"{source} shows nothing"


def assert_offline(path: Path) -> None:
    """No tag or style makes a browser fetch something from elsewhere."""
    html = path.read_text(encoding="utf-8")
    scripts = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    assert len(scripts) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in html
    assert not re.search(r"fetch\(|XMLHttpRequest|WebSocket|import\(|https?:", scripts[0])
    for tag, attributes in Page(path).tags:
        assert tag not in ("iframe", "object", "embed", "link", "base")
        assert tag != "script" or attributes == {}
        for name in ("src", "href", "data", "srcset", "poster", "action"):
            value = attributes.get(name) or ""
            assert not re.match(r"\s*([a-z+.-]+:|//)", value, re.IGNORECASE), (tag, value)
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"@import|url\(", html)


def test_nothing_is_loaded_from_elsewhere(built):
    _, out, path = built
    assert_offline(path)
    for figure in (out / "sub-01" / "figures").glob("*.svg"):
        assert not re.search(r"(xlink:)?href=[\"']https?:|<script|url\(http", figure.read_text())


def test_hostile_strings_are_text(tmp_path):
    inp = make_input(tmp_path / "work")
    first, *others = inp.group.stacks
    bad = replace(first, uri=f"bids:raw:{HOSTILE}", path=HOSTILE, thickness_source=HOSTILE)
    inp = replace(
        inp,
        group=replace(
            inp.group,
            subject="01<b>&'",
            stacks=(bad, *others),
            excluded=(Excluded(HOSTILE.replace("/", ""), f"reason {HOSTILE}"),),
            warnings=(f"warning {HOSTILE}",),
        ),
        settings=Settings.from_dict({"selection": {"derivatives": [HOSTILE]}}),
        provenance={"command_line": HOSTILE, "versions": {HOSTILE: HOSTILE}, HOSTILE: "1"},
        errors=[{"step": HOSTILE, "message": HOSTILE, "traceback": HOSTILE + "\udc80"}],
    )
    (tmp_path / "out").mkdir()
    path = build_report([inp], tmp_path / "out", "01<b>&'")
    assert path.name == "sub-01<b>&'.html"
    page = Page(path)
    assert_offline(path)
    assert not page.all("b") or all(not a for a in page.all("b"))
    assert path.read_text(encoding="utf-8").count("<script") == 1
    assert page.text.count(HOSTILE) >= 8
    assert "sub-01<b>&'" in page.text
    for image in page.all("img"):
        assert (tmp_path / "out" / unquote(image["src"] or "")).exists()


def test_hostile_labels_in_a_finding_are_text(tmp_path):
    """A name that contradicts its image is quoted in the summary, whatever it holds."""
    inp = make_input(tmp_path / "work", names=("irem",))
    first, *others = inp.group.stacks
    name = "sub-01_acq-cor<script>alert('x')&\"ü_T1w.nii.gz"
    odd = replace(first, path=f"/data/<i>&/{name}", slice_thickness=2.0)
    inp = replace(inp, group=replace(inp.group, stacks=(odd, *others)))
    (tmp_path / "out").mkdir()
    path = build_report([inp], tmp_path / "out", "01")
    page = Page(path)
    assert_offline(path)
    assert f"{name} says coronal but its affine is axial" in page.text
    assert page.all("i") == []


def test_a_failed_group_has_a_page(tmp_path):
    errors = [{"step": "normalise", "message": "no foreground", "traceback": "Traceback: line 7"}]
    inp = ReportInput(group(session="a"), None, {}, Settings(), {}, errors, tmp_path)
    path = build_report([inp], tmp_path, "01", "ses-a")
    assert path.name == "sub-01_ses-a.html"
    page = Page(path)
    assert "Needs a look" in page.text
    assert "The run failed in normalise." in page.text
    assert "Traceback: line 7" in page.text
    assert page.all("img") == []


def test_viewer_holds_every_volume_on_one_grid(built):
    """The pictures in the page decode to the head, in radiological order of tiles."""
    page = Page(built[2])
    (root,) = [a for _, a in page.tags if a.get("class") == "viewer"]
    x, y, z = (int(v) for v in (root["data-shape"] or "").split())
    start = [int(v) for v in (root["data-start"] or "").split()]
    assert max(x, y, z) <= 192
    holders = page.all("template")
    assert [h["data-name"] for h in holders] == [
        "irem", "bspline", "axial1", "coronal1", "sagittal1",
    ]  # fmt: skip
    volumes = []
    for holder in holders:
        sheet = Image.open(io.BytesIO(base64.b64decode(holder["data-image"] or "")))
        columns = int(holder["data-columns"] or 0)
        assert sheet.width == columns * x and sheet.height % y == 0
        pixels = np.asarray(sheet.convert("L")).astype(float)
        tiles = pixels.reshape(-1, y, columns, x).swapaxes(1, 2).reshape(-1, y, x)[:z]
        assert tiles[start[2], start[1], start[0]] > 30
        assert tiles[0, 0, 0] < 20
        volumes.append(tiles)
    for tiles in volumes[1:]:
        assert np.corrcoef(tiles.ravel(), volumes[0].ravel())[0, 1] > 0.85
    half = x // 2
    assert volumes[0][:, :, half:].mean() > volumes[0][:, :, :half].mean(), "right is brighter"
    assert len(page.all("canvas")) == 3
    assert all(c["aria-label"] and c["tabindex"] == "0" for c in page.all("canvas"))
    names = [label for label in ("▶ irem", "axial1") if label in page.text]
    assert len(names) == 2


def test_no_viewer_without_a_result(tmp_path):
    inp = make_input(tmp_path / "work", names=("irem",))
    (inp.methods["irem"] / "volume.nii.gz").unlink()
    page = Page(build_report([inp], tmp_path, "01"))
    assert page.all("canvas") == [] and page.all("template") == []


def test_half_a_method_is_shown_as_such(tmp_path):
    inp = make_input(tmp_path / "work")
    (inp.methods["irem"] / "volume.nii.gz").write_bytes(b"not an image")
    (inp.methods["bspline"] / "fit.json").write_text("{")
    path = build_report([inp], tmp_path, "01")
    text = Page(path).text
    assert "No image was left by irem and bspline" in text
    assert "the result of irem cannot be read: ImageError" in text
    assert "the result of bspline cannot be read: JSONDecodeError" in text


def test_prepared_folder_that_cannot_be_read(tmp_path):
    inp = make_input(tmp_path / "work")
    (inp.prepared / "prepared.json").write_text(json.dumps({"stacks": [{"label": "x"}]}))
    path = build_report([inp], tmp_path, "01")
    page = Page(path)
    assert "the prepared stacks cannot be read" in page.text
    assert any("mosaic" in (a["src"] or "") for a in page.all("img"))


def test_two_contrasts_share_a_page(tmp_path):
    first = make_input(tmp_path / "a", names=("srr",))
    second = make_input(tmp_path / "b", names=("srr",))
    second = replace(second, group=replace(second.group, suffix="T2w", session=None))
    path = build_report([first, second], tmp_path, "01")
    page = Page(path)
    assert page.text.count("sub-01_T1w") >= 10
    assert page.text.count("sub-01_T2w") >= 10
    ids = [a["id"] for _, a in page.tags if a.get("id")]
    assert len(ids) == len(set(ids))


# ------------------------------------------------------------------------------ summary
def findings(inp: ReportInput) -> dict[str, summary.Finding]:
    return {f.name: f for f in summary.check(report_material.load(inp)) if f.look}


def test_a_sound_group_asks_for_no_look(built):
    assert findings(built[0]) == {}
    assert "Nothing here asks for a look" in Page(built[2]).text


def test_each_defect_is_named(tmp_path):
    ready = prepared(far=5.0)
    metrics = {**ready.metrics, "ncc_before": 0.47, "ncc_after": 0.40}
    inp = make_input(tmp_path / "work", replace(ready, metrics=metrics), ("bspline", "irem"))
    fit = json.loads((inp.methods["irem"] / "fit.json").read_text())
    fit["gains"]["coronal1"] = 2.0
    (inp.methods["irem"] / "fit.json").write_text(json.dumps(fit))
    kept = [replace(s, thickness_source="spacing") for s in inp.group.stacks[:2]]
    inp = replace(
        inp, group=replace(inp.group, stacks=tuple(kept), warnings=("only two orientations",))
    )
    found = findings(inp)
    assert set(found) == {
        "Orientations",
        "Slice thickness",
        "Registration gain",
        "Agreement",
        "Movement between stacks",
        "Held-out voxels",
        "Gain of stacks",
        "Field of view",  # 15 mm away, the phantom leaves its stack
    }
    assert "axial and coronal" in found["Orientations"].text
    assert "sagittal1 by 15.0 mm and 11.5°" in found["Movement between stacks"].text
    assert "coronal1 (2.00 by irem)" in found["Gain of stacks"].text
    assert "irem (29.0 dB)" in found["Held-out voxels"].text


def test_one_pair_that_got_worse_is_named(tmp_path):
    ready = prepared()
    pairs = [dict(p) for p in ready.metrics["ncc_pairs"]]
    pairs[1]["after"] = 0.5
    inp = make_input(tmp_path / "w", replace(ready, metrics={**ready.metrics, "ncc_pairs": pairs}))
    found = findings(inp)
    assert set(found) == {"Registration of pairs", "Misregistered stack"}
    assert "axial1 with sagittal1 (0.660 to 0.500)" in found["Registration of pairs"].text


def test_metrics_stand_beside_the_range_of_the_cohort(tmp_path):
    inp = replace(make_input(tmp_path / "w", names=("irem",)), out_dir=tmp_path / "out")
    (tmp_path / "out").mkdir()
    text = Page(build_report([inp], tmp_path / "out", "01")).text
    assert "No range of a cohort yet" in text
    lines = ["participant_id\tmethod\theld_out_psnr\theld_out_ncc"]
    lines += [f"sub-{i}\tirem\t{33 + 0.1 * i}\tn/a" for i in range(9)]
    (tmp_path / "out" / "group_T1w.tsv").write_text("\n".join(lines) + "\n")
    text = Page(build_report([inp], tmp_path / "out", "01")).text
    assert "No range" not in text
    row = re.search(r"Held-out PSNR \(dB\)\s+30.00\s+33.40\s+33.04 to 33.76\s+below\s+9", text)
    assert row is not None
    assert "◆" in text


def test_bar_places_the_value_in_the_range_of_all():
    others = [float(v) for v in range(1, 12)]
    assert cohort.bar(6.0, others) == {"start": 5.0, "width": 90.0, "middle": 50.0, "here": 50.0}
    assert cohort.bar(21.0, others) == {"start": 2.5, "width": 45.0, "middle": 25.0, "here": 100.0}
    assert cohort.bar(2.0, [2.0] * 5)["here"] == 50.0


# ------------------------------------------------------------------------------ methods
def test_methods_text_says_what_ran():
    methods = {"output": {"method": ["irem", "irem2021", "srr", "bspline"]}}
    settings = Settings.from_dict({**methods, "normalise": {"n4": True}})
    text = methods_text(settings, groups=[group()], versions={"torch": "2.13.0"})
    keys = citation_keys(text)
    for key in ("wu2021irem", "tancik2020fourier", "ebner2020automated", "tustison2010n4"):
        assert key in keys
    assert "PyTorch 2.13.0" in text
    assert "T1w: 1 axial, 1 coronal, 1 sagittal" in text
    bib = bibliography(text)
    assert sorted(re.findall(r"^@\w+\{(\w+),", bib, re.MULTILINE)) == sorted(keys)
    assert bib.count("{") == bib.count("}")


def test_methods_text_leaves_out_what_did_not_run():
    settings = Settings.from_dict(
        {
            "output": {"method": ["bspline"]},
            "normalise": {"registration": False, "reference": "random"},
        }
    )
    text = methods_text(settings, metrics={"masked": {"axial1": "given"}})
    assert "tustison2010n4" not in text
    assert "paszke2019pytorch" not in text
    assert "the positions in their headers were trusted" in text
    assert "was given by a mask" in text


def test_readable_text_names_authors():
    text = readable(methods_text(Settings.from_dict({"output": {"method": ["srr", "irem"]}})))
    assert "(Gholipour et al. 2010; Ebner et al. 2020)" in text
    assert "@" not in text
    assert "`" not in text


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("setting", "was given by the user"),
        ("spacing", "was taken to be the slice spacing."),
        ("sidecar", "was read from the sidecars"),
    ],
)
def test_methods_text_says_where_the_thickness_is_from(source, words):
    stacks = tuple(replace(s, thickness_source=source) for s in group().stacks)
    assert words in methods_text(Settings(), groups=[group(stacks=stacks)])


def test_values_as_text():
    assert wording.plain({"a": [1, 2.5]}) == "a: 1 2.5"
    assert wording.plain("\udcff") == "?"
    assert wording.number(None) == "n/a"
    assert wording.number(float("inf")) == "n/a"
    assert wording.number(-0.001, "+.2f") == "0.00"
    assert wording.number(0.123, "+.2f") == "+0.12"
    assert wording.number("many") == "many"


def _write_often(job: tuple[Path, int]) -> None:
    for number in range(40):
        write_citation(job[0], f"# Methods of run {job[1]}, {number}\n")


def test_runs_side_by_side_write_the_methods_text_whole(tmp_path: Path) -> None:
    jobs = [(tmp_path / "logs", run) for run in range(4)]
    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("fork")) as pool:
        assert list(pool.map(_write_often, jobs)) == [None] * 4
    assert re.fullmatch(r"# Methods of run \d, 39\n", (tmp_path / "logs/CITATION.md").read_text())
    assert len(list((tmp_path / "logs").iterdir())) == 3


def test_citation_files(tmp_path):
    text = methods_text(Settings())
    paths = write_citation(tmp_path / "logs", text)
    assert [p.name for p in paths] == ["CITATION.md", "CITATION.tex", "CITATION.bib"]
    assert paths[0].read_text() == text
    assert r"\citep{wu2021irem}" in paths[1].read_text()
    assert "wu2021irem" in paths[2].read_text()


def test_latex_is_escaped_and_whole():
    text = "5 % of `a_b` & {x} #1 $2^3 ~ \\ [@one2020a; @two2021b]"
    assert latex(text) == (
        r"5 \% of \texttt{a\_b} \& \{x\} \#1 \$2\textasciicircum{}3 \textasciitilde{} "
        r"\textbackslash{} \citep{one2020a,two2021b}"
    )
    whole = document(methods_text(Settings()))
    body = re.sub(r"\\[{}]", "", whole)
    assert body.count("{") == body.count("}")
    assert not re.search(r"(?<!\\)[%&#_]", re.sub(r"\\\w+\{[^}]*\}", "", whole))


# -------------------------------------------------------------------------------- views
@pytest.mark.parametrize("codes", ["RAS", "LPS", "PSR", "SAL"])
def test_pictures_are_radiological_whatever_the_file_order(codes):
    """A bright spot at the patient's left, front, top lies where the letters say."""
    directions = {"R": 0, "L": 0, "A": 1, "P": 1, "S": 2, "I": 2}
    affine = np.eye(4)
    for column, code in enumerate(codes):
        affine[:3, column] = 0
        affine[directions[code], column] = 1.0 if code in "RAS" else -1.0
    grid = Grid((12, 12, 12), affine)
    affine[:3, 3] = -(affine[:3, :3] @ np.full(3, 5.5))
    grid = Grid((12, 12, 12), affine)
    data = np.zeros(grid.shape, dtype=np.float32)
    spot = np.round(grid.to_index([-4.5, 4.5, 4.5])).astype(int)
    data[tuple(spot)] = 1.0
    volume = views.canonical(data, grid)
    index = np.round(volume.grid.to_index([-4.5, 4.5, 4.5])).astype(int)
    for plane, place in (("axial", (1, 10)), ("coronal", (1, 10)), ("sagittal", (1, 1))):
        axis = views.NORMAL[plane]
        found = np.argwhere(views.picture(volume.data, plane, index[axis]) > 0)
        assert found.tolist() == [list(place)], (codes, plane)
        points = views.slice_points(volume.grid, plane, int(index[axis]))
        assert np.allclose(points[place], [-4.5, 4.5, 4.5])
    for axis in range(3):
        assert volume.file_index(axis, int(index[axis])) == spot[volume.file_axis[axis]]


def test_stack_is_sampled_at_its_pose():
    pose = RigidTransform.from_vector([0, 0, 0.2, 4.0, -2.0, 1.0])
    still, moved = stack("axial1", RigidTransform()), stack("axial1", pose)
    points = still.grid.to_world(np.stack(np.meshgrid(range(8, 32), range(8, 32), [5]), -1))
    there = views.sample_stack(moved, pose, points, order=1)
    here = views.sample_stack(still, RigidTransform(), points, order=1)
    away = views.sample_stack(moved, RigidTransform(), points, order=1)
    assert np.corrcoef(there.ravel(), here.ravel())[0, 1] > 0.9
    assert np.corrcoef(away.ravel(), here.ravel())[0, 1] < 0.8


def test_window_and_grey_levels():
    assert views.window(np.array([])) == (0.0, 1.0)
    levels = views.window(np.linspace(0, 200, 1001))
    assert levels[0] == 0.0
    assert levels[1] == pytest.approx(199.0)
    assert views.grey(np.array([-1.0, 0.0, 99.5, 400.0]), levels).tolist() == [0, 0, 128, 255]


def test_enlarged_pixels_are_square_and_unmixed():
    large = views.enlarge(np.array([[1, 2], [3, 4]]), (4.0, 1.0), 0.5)
    assert large.shape == (16, 4)
    assert np.unique(large).tolist() == [1, 2, 3, 4]
    assert (large[:8, :2] == 1).all()


def test_long_curves_are_thinned():
    x, y = plots.thin(range(10_000), [1.0] * 9_999 + [float("nan")])
    assert len(x) == len(y) == 800
    assert np.isfinite(y).all()


def test_figures_tell_what_could_not_be_drawn(tmp_path):
    inp = make_input(tmp_path / "work", names=("irem",))
    fit = json.loads((inp.methods["irem"] / "fit.json").read_text())
    fit["history"]["loss"] = ["broken"] * 30
    (inp.methods["irem"] / "fit.json").write_text(json.dumps(fit))
    material = report_material.load(inp)
    figures = make_figures(inp, tmp_path / "figures", material)
    assert [f.path.name for f in figures if f.section == "mosaic"] == [
        "sub-01_desc-mosaicirem_T1w.png"
    ]
    assert len(material.problems) == 1
    assert "training of irem" in material.problems[0]


def test_methods_that_really_ran(tmp_path):
    """Curves, refined poses, predicted slices and metrics come from real fits."""
    inp = fitted_input(tmp_path / "work", ("irem", "srr", "bspline"))
    page = Page(build_report([inp], tmp_path, "01"))
    assert "could not be" not in page.text
    folder = tmp_path / "sub-01" / "figures"
    contrast = {}
    for name in ("irem", "srr", "bspline"):
        image = np.asarray(Image.open(folder / f"sub-01_desc-residual{name}axial1_T1w.png"))
        acquired, _, residual = np.array_split(image.astype(float), 3, axis=1)
        assert np.ptp(acquired, axis=2).max() == 0
        contrast[name] = np.ptp(residual, axis=2).mean()
    assert contrast["irem"] < contrast["bspline"]
    assert contrast["srr"] < contrast["bspline"]
    assert (folder / "sub-01_desc-trainingirem_T1w.svg").exists()
    sources = [image["src"] or "" for image in page.all("img")]
    assert len([s for s in sources if "residual" in s]) == 9
    for text in ("Held-out PSNR", "Self-consistency (NCC)", "Residual", "Per stack and method"):
        assert text in page.text
    assert "What the data chose" in page.text
    assert "Slices move one by one" in page.text


def test_what_the_data_chose_is_told_with_its_errors():
    info = {
        "motion": "stack", "held_out_by_motion": {"stack": 0.002, "slice": 0.0019},
        "width": "learned", "held_out_by_width": {"stated": 0.002, "learned": 0.0015},
        "spectrum_share": 0.618, "rehearsed_error": {"edges": 0.002, "spectrum": 0.001},
        "network": "not used",
    }  # fmt: skip
    result = report_material.MethodResult(
        "irem", Path(), info=info, history={"held_out": [0.0012, 0.0012]},
        fit={"widths": dict.fromkeys(PLANES, 1.2)},
    )  # fmt: skip
    inp = SimpleNamespace(settings=Settings())
    material = report_material.Material(inp=inp, prepared=prepared(), methods={"irem": result})
    assert choices.table_of(material)["rows"] == [
        ["irem", "Slices move one by one", "no, each stack as a whole",
         "slice 0.0019, stack 0.002"],
        ["irem", "Width of the slice profiles", "learned", "learned 0.0015, stated 0.002"],
        ["irem", "Gaps between slices",
         "bridged 62 % by the spectrum, else by edges (total variation)",
         "edges 0.002, spectrum 0.001"],
        ["irem", "Network", "not used", "with 0.0012, without 0.0012"],
    ]  # fmt: skip
    inp.settings = Settings.from_dict({"irem": {"motion": "slice"}})  # then no data chose it
    assert "move" not in str(choices.table_of(material)["rows"])
    stacks, names = tables._per_stack(material, {})
    assert "profile_width" in names
    assert [row[-1] for row in stacks["rows"]] == ["6.00"] * 3
    material.methods["irem"] = replace(result, fit={"widths": dict.fromkeys(PLANES, 1.0)})
    assert "profile_width" not in tables._per_stack(material, {})[1]


def test_scaled_results_share_the_window_of_the_stacks(built):
    """A result in the reference's units is as bright in its picture as the stack is."""
    folder = built[1] / "sub-01" / "figures"
    of_stack, of_result = (
        np.asarray(Image.open(folder / f"sub-01_desc-reconaxial{name}_T1w.png"))
        for name in ("axial1", "irem")
    )
    assert SCALE > 100
    assert np.median(of_stack[of_stack > 20]) == pytest.approx(
        np.median(of_result[of_result > 20]), abs=12
    )
