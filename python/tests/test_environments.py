"""The installer where it cannot install: `python3 python/tests/test_environments.py`."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
import unittest
from collections import namedtuple
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "environments.py"

spec = importlib.util.spec_from_file_location("environments", SCRIPT)
environments = importlib.util.module_from_spec(spec)
sys.modules["environments"] = environments
spec.loader.exec_module(environments)

Disk = namedtuple("Disk", "free")


class Environments(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.root = Path(folder.name)
        shutil.copytree(ROOT / "environments", self.root / "environments")

    def table(self) -> dict[str, dict]:
        text = (self.root / ".hgct" / "environments.toml").read_text()
        return {row["name"]: row for row in tomllib.loads(text)["environment"]}

    def rows(self) -> list:
        version = environments.python_version(sys.executable)
        kinds = environments.KINDS.items()
        return [environments.Environment(name, kind, self.root, sys.executable, version) for name, kind in kinds]

    def test_a_small_disk_serves_the_small_kinds_and_says_what_is_missing(self) -> None:
        rows = {row.name: row for row in self.rows()}
        with mock.patch.object(environments.shutil, "disk_usage", return_value=Disk(1_400_000_000)):
            environments.set_aside_for_disk(self.root, list(rows.values()))
        self.assertIsNone(rows["mlx"].unusable)
        self.assertIsNone(rows["jax"].unusable)
        self.assertIn("make 8.75 GB free", rows["torch"].unusable)
        self.assertIn("--kinds torch", rows["torch"].unusable)
        environments.write_table(self.root, list(rows.values()))
        self.assertIn("9.00 GB of free disk", self.table()["torch"]["unusable"])
        self.assertNotIn("unusable", self.table()["mlx"])

    def test_what_may_not_be_installed_is_set_aside_with_a_command(self) -> None:
        variables = {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}
        call = [sys.executable, SCRIPT, "--root", self.root, "--kinds", "mlx"]
        result = subprocess.run(call, env=variables, capture_output=True, text=True)
        self.assertEqual(result.returncode, 1, result.stderr)
        self.assertIn("pip install -r", self.table()["mlx"]["unusable"])
        self.assertIn("mlx:        set aside: pip download failed", result.stdout)

    def test_the_command_to_try_again_is_one_that_is_understood(self) -> None:
        row = self.rows()[-1]
        second = environments.Environment("mlx-py312", row.kind, self.root, "/a place/python3.12", "3.12.0")
        first = environments.Environment("mlx", row.kind, self.root, "/a place/python3.12", "3.12.0")
        wheel = self.root / "hgct 1.whl"
        wheel.touch()
        for environment, kinds in ((second, []), (first, ["mlx"])):
            environment.wheel = wheel
            with mock.patch.object(sys, "argv", shlex.split(environments.command(environment))[1:]):
                read = environments.parse_arguments()
            self.assertEqual((read.kinds, read.root, read.wheel), (kinds, self.root, wheel))
            python = read.python if kinds else read.second_python
            self.assertEqual((python, read.second_kind), ("/a place/python3.12", "mlx"))

    def test_a_wrong_call_is_refused(self) -> None:
        for arguments, words in ((["--kinds", "tensorflow"], "allowed: torch"), (["--wheel", "no.whl"], "not a file")):
            result = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True)
            self.assertEqual(result.returncode, 2)
            self.assertIn(words, result.stderr)

    def test_a_stamp_counts_only_with_the_same_packages_and_python(self) -> None:
        row = self.rows()[0]
        row.interpreter.parent.mkdir(parents=True)
        row.interpreter.touch()
        self.assertFalse(row.read_stamp())
        row.stamp = {**row.wanted, "framework_version": "1", "base": sys.executable}
        row.write_stamp()
        self.assertTrue(row.read_stamp())
        self.assertEqual([other.name for other in environments.standing(self.root, set())], [row.name])
        row.requirements.write_text("torch==0\n")
        self.assertFalse(row.read_stamp())
        self.assertEqual(environments.standing(self.root, set()), [])

    def test_every_requirement_is_pinned(self) -> None:
        for kind in environments.KINDS.values():
            lines = (ROOT / "environments" / f"{kind.engine}.txt").read_text().split("\n")
            for line in filter(None, lines):
                self.assertRegex(line, r"^[A-Za-z0-9_.-]+==[0-9][\w.+]*$")


if __name__ == "__main__":
    unittest.main()
