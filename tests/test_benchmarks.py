"""Scripts of `benchmarks/`: the names of their outputs, and spreads beside means."""

import json
import sys

from benchmarks import train

ROW = {"size": "14m", "contestant": "sinklm", "ranks": 1, "micro_batch_size": 1, "tokens_per_second": 8.0}
ROW |= {"seconds_per_step": 0.25, "stdev": 0.0123, "memory_gib": 0.0, "start": 1.0}


def test_an_output_with_a_dot_keeps_its_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "write_random_store", lambda folder: folder)
    monkeypatch.setattr(train, "measure", lambda *arguments: ROW)
    for name in ("E1.4", "E1.5"):
        monkeypatch.setattr(sys, "argv", ["train.py", "--contestants", "sinklm", "--output", str(tmp_path / name)])
        train.main()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["E1.4.json", "E1.4.md", "E1.5.json", "E1.5.md"]
    assert json.loads((tmp_path / "E1.4.json").read_text())["rows"] == [ROW]
    assert "| 250.0 ± 12.3 |" in capsys.readouterr().out
