"""Chat templates of many shapes, and conversations that end with a question."""

from __future__ import annotations

from folders import CHATML

from truetune.data.chat import DEFAULT_TEMPLATE
from truetune.models.gguf.chat import TRIALS, conversation

FOR = "{% for m in messages %}"
ASK = "{% endfor %}{% if add_generation_prompt %}{{ '<a>' }}{% endif %}"
ROLE = "{{ '<' + m.role + '>' + m.content + '</s>\\n' }}"
SYSTEM_BY_DEFAULT = "{% if messages[0].role != 'system' %}{{ '<system>Be good.</s>\\n' }}{% endif %}" + CHATML
TEMPLATES = {
    "chatml": CHATML,
    "default": DEFAULT_TEMPLATE,
    "a system turn of its own": SYSTEM_BY_DEFAULT,
    "bos first": "{{ bos_token }}" + FOR + ROLE + ASK,
    "instructions within the first question": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{% set s = messages[0].content + '\\n\\n' %}"
        "{% set messages = messages[1:] %}{% else %}{% set s = '' %}{% endif %}"
        + FOR
        + "{% if m.role == 'user' %}{{ '[INST] ' + (s if loop.first else '') + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
    ),
    "no instructions": (FOR + "{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + ROLE + ASK),
    "bare": FOR + "{{ m.content + '\\n' }}" + "{% endfor %}",
    "names of its own": FOR + "{{ {'user': 'Q: ', 'assistant': 'A: ', 'system': 'S: '}[m.role] + m.content }}|" + ASK,
    "quotes and braces": FOR + "{{ '\\\"{' ~ '{ ' ~ m.role ~ ' }' ~ '}\\t`' ~ m.content ~ '\\\\' }}" + ASK,
    "answers that end late": (
        FOR + "{% if m.role == 'assistant' and loop.last %}{{ '(thought)' }}{% endif %}" + ROLE + ASK
    ),
}
CHATS = [conversation(words) for words in TRIALS] + [
    conversation(("u", "a b c", "a", "{{ x }}", "u", "\"\"\" and '''", "a", "", "u", "?")),
    conversation(("s", "", "u", "<s>", "a", "</s>", "u", "last")),
]
