# SPDX-License-Identifier: Apache-2.0
"""Settings, their TOML and the command line made from them."""

from __future__ import annotations

import dataclasses
import tomllib

import pytest

from irem_bids.config import read_config, settings_to_toml, with_absolute_paths
from irem_bids.exitcodes import ExitCode, UserError
from irem_bids.parser import build_parser, parse, settings_from
from irem_bids.settings import SECTIONS, Settings, SettingsError

POSITIONALS = ["bids", "out", "participant"]
AWKWARD = {
    "selection": {
        "participant_label": ['quote " and \\', "tab\tend", "größe", "\x7f\x01"],
        "derivatives": ["/a b/c", "/d"],
    },
    "acquisition": {"slice_thickness": 3.25},
    "normalise": {"n4": True},
    "irem": {"learning_rate": 1e-7, "steps": 3},
    "output": {"method": ["srr", "bspline"], "output_resolution": 0.8},
}


def from_flags(*flags: str) -> Settings:
    return settings_from(parse([*POSITIONALS, *flags]), Settings())


def test_each_option_has_one_name_and_help():
    names = [f.name for cls in SECTIONS.values() for f in dataclasses.fields(cls)]
    helps = [f.metadata["help"] for cls in SECTIONS.values() for f in dataclasses.fields(cls)]
    assert len(names) == len(set(names)) > 40
    assert all(helps)


def test_every_default_passes_its_own_check():
    assert Settings.from_dict(Settings().to_dict()) == Settings()


@pytest.mark.parametrize("tables", [{}, AWKWARD])
def test_toml_is_taken_back(tables, tmp_path):
    settings = Settings.from_dict(tables)
    path = tmp_path / "settings.toml"
    path.write_text(settings_to_toml(settings), encoding="utf-8")
    assert read_config(path) == settings
    assert set(tomllib.loads(path.read_text(encoding="utf-8"))) == set(SECTIONS)


def test_command_line_wins_over_toml_over_default(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text("[output]\noutput_resolution = 1.5\nmargin = 2\n[normalise]\nn4 = true\n")
    arguments = parse([*POSITIONALS, "--config-file", str(path), "--output-resolution", "0.7"])
    settings = settings_from(arguments, read_config(arguments.config_file))
    assert settings.output.output_resolution == 0.7
    assert settings.output.margin == 2.0
    assert settings.normalise.n4
    assert settings.output.method == ("irem",)


def test_every_option_is_a_flag():
    flags = {flag for action in build_parser()._actions for flag in action.option_strings}
    for cls in SECTIONS.values():
        for option in dataclasses.fields(cls):
            assert f"--{option.name.replace('_', '-')}" in flags


@pytest.mark.parametrize(
    ("flags", "section", "key", "value"),
    [
        (
            ["--participant-label", "01", "sub-02"],
            "selection",
            "participant_label",
            ("01", "sub-02"),
        ),
        (["--participant_label", "01"], "selection", "participant_label", ("01",)),
        (["--participant_label=01"], "selection", "participant_label", ("01",)),
        (["--session-id", "1"], "selection", "session_label", ("1",)),
        (["-d", "a", "b", "-d", "c"], "selection", "derivatives", ("a", "b", "c")),
        (["--n4"], "normalise", "n4", True),
        (["--model-out"], "output", "model_out", True),
        (["--method", "irem", "srr"], "output", "method", ("irem", "srr")),
        (["--seed", "7"], "run", "random_seed", 7),
        (["--n_cpus", "3"], "run", "nprocs", 3),
        (["--nthreads", "3"], "run", "nprocs", 3),
        (["-w", "x"], "run", "work_dir", "x"),
        (["--mem_gb", "8"], "run", "mem", "8"),
        (["--slice-thickness", "3"], "acquisition", "slice_thickness", 3.0),
    ],
)
def test_flags(flags, section, key, value):
    assert getattr(getattr(from_flags(*flags), section), key) == value


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--outptu-resolution", "1"], "did you mean --output-resolution"),
        (["--output-res", "1"], "did you mean --output-resolution"),
        (["--output-resolution", "fine"], "invalid float value: 'fine'"),
        (["--output-resolution", "100"], "expected at most 10"),
        (["--output-resolution", "nan"], "expected a finite number"),
        (["--method", "magic"], "expected one of irem, irem2021, srr, bspline"),
        (["--batch-size", "1.5"], "invalid int value"),
        (["--held-out"], "expected one argument"),
    ],
)
def test_usage_errors(flags, words):
    with pytest.raises(UserError, match=words) as caught:
        from_flags(*flags)
    assert caught.value.code is ExitCode.USAGE


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"outputs": {}}, "unknown section: 'outputs'; did you mean 'output'"),
        ({"output": {"metod": "srr"}}, "did you mean 'method'"),
        ({"output": 3}, "expected a table"),
        ({"irem": {"layers": 2.5}}, "expected int"),
        ({"irem": {"layers": True}}, "expected int"),
        ({"normalise": {"n4": 1}}, "expected bool"),
    ],
)
def test_wrong_tables(table, words):
    with pytest.raises(SettingsError, match=words):
        Settings.from_dict(table)


def test_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = with_absolute_paths(from_flags("-d", "masks", "-w", "work"))
    assert settings.selection.derivatives == (str(tmp_path / "masks"),)
    assert settings.run.work_dir == str(tmp_path / "work")
    assert settings.selection.bids_filter_file is None


def test_a_user_error_survives_pickling():
    import pickle

    error = pickle.loads(pickle.dumps(UserError("what", ExitCode.BAD_DATA)))
    assert (str(error), error.code) == ("what", 65)
