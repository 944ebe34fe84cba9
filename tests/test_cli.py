import json

from mama_hf.cli import main


def test_report_prints_a_table_or_json(tiny_llama, tmp_path, capsys):
    tiny_llama.save_pretrained(tmp_path)
    assert main(["report", str(tmp_path)]) == 0
    assert "down_proj" in capsys.readouterr().out
    assert main(["report", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["targets"]["zeros"] == 0


def test_report_of_a_folder_without_a_model_fails_with_the_reason(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err
