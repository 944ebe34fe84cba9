"""Tests of the real task of the benchmarks, `benchmarks/json_task.py`."""

import json_task
import pytest


PERSON = {"name": "Maria", "age": 66, "city": "Oslo"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"name": "Maria", "age": 66, "city": "Oslo"}', 1.0),
        ('\n{\n  "city": "Oslo",\n  "name": "Maria",\n  "age": "66"\n}\n', 1.0),
        ('Here it is: {"name": "Maria", "age": 66, "city": "Oslo"}', 0.8),
        ('```json\n{"name": "Maria", "age": 66, "city": "Oslo"}\n```', 0.8),
        ('{"name": "Maria", "age": 66, "city": "Oslo", "country": "Norway"}', 0.8),
        ('{"name": "Maria", "age": 65, "city": "Oslo"}', 0.8),
        ('{"name": "Maria", "age": 66}', 0.6),
        ("{}", 0.2),
        ('{"name": "Maria", "age": 66, "city"', 0.0),
        ("{name: Maria}", 0.0),
        ("Maria is 66.", 0.0),
        ("", 0.0),
    ],
)
def test_score(text: str, expected: float) -> None:
    assert json_task.score(text, PERSON) == pytest.approx(expected)
    messages = [[{"role": "assistant", "content": text}]]
    assert json_task.json_reward(messages, ["Maria"], [66], ["Oslo"]) == [pytest.approx(expected)]


def test_held_out_prompts_are_never_trained_on() -> None:
    train, held_out = json_task.task_dataset(1, 300), json_task.task_dataset(0, 64, held_out=True)
    assert not set(train["age"]) & set(held_out["age"])
    assert train[:] == json_task.task_dataset(1, 300)[:]
    assert train[:] != json_task.task_dataset(2, 300)[:]
    for row in held_out:
        sentence = row["prompt"][1]["content"]
        assert all(str(row[key]) in sentence for key in ("name", "age", "city"))
