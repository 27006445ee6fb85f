"""The model card: front matter that is YAML, and how to run the file."""

from __future__ import annotations

import re
from dataclasses import replace

import yaml
from reports import HOSTILE, make_hostile, make_report

from edgemoe.report.model_card import render_card


def test_card_front_matter_is_yaml_and_keeps_a_hostile_name() -> None:
    card = render_card(make_hostile())
    assert card.startswith("---\n")
    front, body = card[4:].split("\n---\n", 1)
    values = yaml.safe_load(front)
    assert values["base_model"] == HOSTILE
    assert values["license"] == HOSTILE
    assert values["base_model_relation"] == "quantized"
    assert values["library_name"] == "gguf"
    assert set(values["tags"]) == {"gguf", "moe", "imatrix", "edgemoe"}
    assert "pipeline_tag" in values
    assert front.isascii()
    outside = re.sub(r"^(`{3,})\w*\n.*?\n\1$", "", body, flags=re.DOTALL | re.MULTILINE)
    assert not re.search(r"(?<!\\)<", outside)
    assert not any(line.startswith("key:") for line in body.splitlines())


def test_card_names_no_base_model_that_is_not_known() -> None:
    report = make_report()
    front = yaml.safe_load(
        render_card(replace(report, model={k: v for k, v in report.model.items() if k != "base_model"})).split("---\n")[1]
    )
    assert "base_model" not in front


def test_card_says_how_to_run_the_file_and_what_it_cost() -> None:
    report = make_report()
    card = render_card(report)
    name = report.artifact.files[0].name
    assert f"llama-server -m {name} -c 8192 --no-mmap -ub 512" in card
    assert f"llama-cli -m {name} -c 8192 --no-mmap -ub 512" in card
    assert f"FROM ./{name}\nPARAMETER num_ctx 8192\n" in card
    assert report.model["command"] in card
    assert f"| {report.artifact.size} |" in card
    assert "keeps 12 of its 16 experts" in card
    assert "| english | 4096 | 0.0310 |" in card
    assert card.index("## Limits") > card.index("## Run it")


def test_code_block_cannot_be_closed_by_its_text() -> None:
    report = make_report()
    card = render_card(replace(report, model={**report.model, "command": "x ```` y"}))
    assert "`````sh\nx ```` y\n`````" in card
