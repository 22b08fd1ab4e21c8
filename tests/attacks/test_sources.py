"""Public harmful sets: what the message for a missing file says."""

from hftlight.attacks import SOURCES, missing_source


def test_every_set_names_place_columns_licence_and_gate():
    for name, source in SOURCES.items():
        line = source.line(name)
        assert source.hub in line
        assert all(column in line for column in source.columns)
        assert source.licence in line
        assert {column for _, column in source.fields} <= set(source.columns)


def test_gates_and_unread_licences_are_said():
    assert SOURCES["hex_phi"].line("hex_phi").endswith("licence its own; manual approval on the hub")
    assert SOURCES["safe_rlhf"].line("safe_rlhf").endswith("licence CC BY-NC 4.0 (unchecked); no gate")


def test_how_to_read_unusual_columns_is_said():
    assert "--data.columns {instruction: goal, response: target}" in SOURCES["advbench"].line("advbench")


def test_an_absent_source_names_the_option():
    message = str(missing_source("Explicit", "attack"))
    assert message.startswith("Explicit: needs harmful prompts with harmful answers and got none. Give a .jsonl")
    assert "with --data.attack" in message
    assert "LLM-LAT/harmful-dataset" in message
    assert "--data.retain" in str(missing_source("X", "retain"))
