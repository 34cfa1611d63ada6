"""Chat templates: what they render, and how those that cannot be applied are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gemq import cli
from gemq.assets import builtin_model
from gemq.errors import UserError
from gemq.evaluation.generate import generate
from gemq.models.chat_template import FIXED_DATE, CannotRender, chat_opening, render

torch.set_num_threads(1)
STRINGS_TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content | trim }}\n{% endfor %}"
PARTS_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% endif %}"
    "{% endfor %}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
TALK = [{"role": "user", "content": " Hello there. "}, {"role": "assistant", "content": "Hi."}]


@pytest.fixture(scope="module")
def builtin() -> tuple[Any, Any]:
    path = builtin_model()
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(path)


@pytest.fixture
def tokenizer(builtin, monkeypatch):
    monkeypatch.setattr(builtin[1], "chat_template", STRINGS_TEMPLATE)
    return builtin[1]


def test_messages_are_strings_or_parts_as_the_template_takes_them(tokenizer):
    assert render(tokenizer, TALK) == "<user> Hello there.\n<assistant> Hi.\n"
    tokenizer.chat_template = PARTS_TEMPLATE
    assert render(tokenizer, TALK, answer=True) == "<user>  Hello there. <assistant> Hi.<assistant>"
    assert chat_opening(tokenizer).answer
    tokenizer.chat_template = {"tool_use": STRINGS_TEMPLATE, "default": PARTS_TEMPLATE}
    assert render(tokenizer, TALK).startswith("<user>  Hello")


def test_what_users_say_may_be_written_in_another_form(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
    assert render(tokenizer, TALK) == " HELLO THERE. HI."


def test_calibration_does_not_depend_on_the_date(tokenizer):
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }} " + STRINGS_TEMPLATE
    assert render(tokenizer, TALK, fixed_date=True).startswith("01 Jan 2024 ")
    assert not render(tokenizer, TALK).startswith("01 Jan 2024 ")
    assert "strftime_now" in FIXED_DATE


UNUSABLE = {
    "raises": ("{{ raise_exception('a system message is needed') }}", "a system message is needed"),
    "named": (
        {"tool_use": STRINGS_TEMPLATE, "rag": STRINGS_TEMPLATE},
        "none of its templates is the default: rag, tool_use",
    ),
    "asks for more": ("{{ tools[0].name }}{{ messages[0].content }}", "UndefinedError"),
    "bad syntax": ("{% for m in messages %}{{ m.content }", "TemplateSyntaxError"),
    "fixed text": ("Hello.", "leaves out what the user says"),
    "no end": ("{% for i in range(10 ** 9) %}{{ i }}{% endfor %}", "OverflowError"),
    "escapes": ("{{ raise_exception('\x1b[2J gone') }}", r"\?\[2J gone"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_templates_that_cannot_be_applied_are_refused_in_one_line(builtin, tokenizer, name):
    tokenizer.chat_template, reason = UNUSABLE[name]
    with pytest.raises(CannotRender, match=reason):
        render(tokenizer, TALK)
    with pytest.raises(UserError, match="add --raw") as info:
        generate(builtin[0], tokenizer, "Once", max_new_tokens=2)
    assert str(info.value).isprintable()
    assert generate(builtin[0], tokenizer, "Once upon a time", max_new_tokens=4, raw=True)
    assert chat_opening(tokenizer) == ([], [])


def test_the_answer_depends_on_the_prompt(builtin, tokenizer):
    """Also where the template takes parts, as those of models that see do."""
    tokenizer.chat_template = PARTS_TEMPLATE.replace("<{{ m.role }}> ", "")
    answers = [generate(builtin[0], tokenizer, prompt, max_new_tokens=8) for prompt in ("The file is", "int main(")]
    assert answers[0] != answers[1]


def test_tokens_without_an_embedding_are_refused(builtin):
    model, path = builtin[0], builtin_model()
    larger = AutoTokenizer.from_pretrained(path)
    larger.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    with pytest.raises(UserError, match=r"the prompt holds the token '<\|im_start\|>' \(number 4096\).* 4096 rows"):
        generate(model, larger, "<|im_start|>user", max_new_tokens=2)


def test_each_of_several_prompts_is_answered_on_its_own(builtin, tokenizer, capsys):
    tokenizer.chat_template = None
    answers = [generate(builtin[0], tokenizer, prompt, max_new_tokens=5) for prompt in ("Once upon a", "int main(")]
    prompts = ["-p", "Once upon a", "-p", "int main("]
    assert cli.run(["generate", str(builtin_model()), *prompts, "--max-new-tokens", "5", "--dtype", "float32"]) == 0
    assert capsys.readouterr().out == "".join(f"{answer}\n" for answer in answers)
