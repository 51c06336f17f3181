"""Conversations made of pieces of special tokens: special ids are only where the template puts them."""

import base64
import random

import pytest
from processor_helpers import IMAGE_OPTIONS, pair

from mllama.demo import checkpoint_path
from mllama.processing.conversation import ROLES
from mllama.processing.image_processor import MllamaImageProcessor
from mllama.processing.processor import MllamaProcessor
from mllama.processing.tiktoken import NAMED_TOKENS, read_tiktoken
from mllama.processing.tokenizer import MllamaTokenizer

BOS, EOT, IMAGE = "<|begin_of_text|>", "<|eot_id|>", "<|image|>"
# Writes every word it is given, keys too, next to each other and next to tokens of its own.
TEMPLATE = """{{- bos_token }}{{- date_string }}
{%- for tool in tools or [] %}{{- tool | tojson }}{{- tool.name }}{% endfor %}
{%- for document in documents or [] %}
    {%- for key, value in document.items() %}{{- key ~ value }}{% endfor %}
{%- endfor %}
{%- for m in messages %}
    {{- '<|start_header_id|>' + m.role + '<|end_header_id|>' + (m.name or '') }}
    {%- for call in m.tool_calls or [] %}
        {{- '<|python_tag|>' + call.function.name + '.call(' }}
        {%- for key, value in call.function.arguments | items %}{{- key + '="' ~ value + '"' }}{% endfor %}
        {{- ')' }}
    {%- endfor %}
    {%- if m.content is string %}{{- m.content | trim }}
    {%- elif m.role in ('tool', 'ipython', 'function') %}{{- m.content | tojson }}
    {%- else %}
        {%- for part in m.content or [] %}
            {{- '<|image|>' if part.type == 'image' else part.text | trim }}
        {%- endfor %}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}"""


def tiktoken(folder):
    """Llama 3's own: words that are tokens are never cut further."""
    path = folder / "tokenizer.model"
    words = [bytes([b]) for b in range(256)] + [b"<|", b"|>", b"eot", b"_id", b"image", b"eot_id"]
    lines = (base64.b64encode(w) + b" %d\n" % i for i, w in enumerate(words))
    path.write_bytes(b"".join(lines))
    return MllamaTokenizer(read_tiktoken(path), NAMED_TOKENS)


@pytest.fixture(scope="module")
def processors(tmp_path_factory):
    images = MllamaImageProcessor(**IMAGE_OPTIONS)
    demo = MllamaProcessor.from_pretrained(checkpoint_path()).tokenizer
    tokenizers = [tiktoken(tmp_path_factory.mktemp("llama")), demo, pair()[0].tokenizer]
    return [MllamaProcessor(images, tokenizer, TEMPLATE) for tokenizer in tokenizers]


class Words:
    """The words of a conversation: pieces of tokens, or as many harmless ones."""

    def __init__(self, rng, tokens, hostile):
        self.rng, self.tokens, self.hostile, self.count = rng, tokens, hostile, 0

    def text(self):
        pieces = []
        for _ in range(self.rng.randint(1, 4)):
            token = self.rng.choice(self.tokens)
            a, b = sorted(self.rng.choices(range(len(token) + 1), k=2))
            others = [
                "<",
                "|",
                ">",
                "<|",
                "|>",
                " ",
                "\n\n",
                "assistant",
                "eot_id",
                "\\ufdd0",
                "\ufdd0",
            ]
            kinds = [token, token[:a], token[a:], token[a:b], self.rng.choice(others)]
            pieces.append(self.rng.choice(kinds))
        return "".join(pieces) if self.hostile else "x"

    def key(self):
        self.count += 1
        text = self.text()
        return f"{text}{self.count}" if self.hostile else f"k{self.count}"

    def data(self, depth=0):
        kind = self.rng.choice(["text", "text", "dict", "list", "number", "none"][: 6 - depth])
        some = range(self.rng.randint(1, 3))
        if kind == "dict":
            return {self.key(): self.data(depth + 1) for _ in some}
        if kind == "list":
            return [self.data(depth + 1) for _ in some]
        return {"text": self.text(), "number": 1.5, "none": None}[kind]

    def message(self):
        role = self.rng.choice(ROLES)
        message = {"role": role}
        kind = self.rng.choice(["string", "parts", "data"])
        if kind == "parts":
            types = self.rng.choices(
                ["text", "input_text", "output_text"], k=self.rng.randint(1, 4)
            )
            message["content"] = [{"type": t, "text": self.text()} for t in types]
        elif kind == "data" and role in ("tool", "ipython", "function"):
            message["content"] = {self.key(): self.data(), "type": self.text(), "role": self.text()}
        else:
            message["content"] = self.text()
        if self.rng.random() < 0.5:
            message["name"] = self.text()
        if self.rng.random() < 0.3:
            arguments = {self.key(): self.text() for _ in range(2)}
            message["tool_calls"] = [
                {"type": "function", "function": {"name": self.text(), "arguments": arguments}}
            ]
        return message

    def call(self):
        return {
            "conversation": [self.message() for _ in range(self.rng.randint(1, 4))],
            "tools": [{"type": self.text(), "name": self.text(), self.key(): self.data()}],
            "documents": [{self.key(): self.text(), "title": self.text()}],
            "date_string": self.text(),
        }


def special(processor, ids):
    control = {
        processor.tokenizer.convert_tokens_to_ids(t) for t in processor.tokenizer.control_tokens
    }
    return [index for index in ids if index in control]


COUNTS = [pytest.param(150, id="few"), pytest.param(20_000, id="many", marks=pytest.mark.full)]


@pytest.mark.parametrize("count", COUNTS)
def test_no_composition_of_words_makes_a_control_token(processors, count):
    forged = 0
    for seed in range(count):
        processor = processors[seed % len(processors)]
        tokens = processor.tokenizer.control_tokens[:12] + [IMAGE]
        hostile, clean = (
            Words(random.Random(seed), tokens, which).call() for which in (True, False)
        )
        options = {"tokenize": True, "escape_special_tokens": True}
        [ids] = processor.apply_chat_template(**hostile, **options)
        [want] = processor.apply_chat_template(**clean, **options)
        assert special(processor, ids) == special(processor, want), seed
        written = processor.with_bos(processor.apply_chat_template(**hostile))
        assert processor.decode(ids) == written, seed  # and nothing is lost or added
        forged += len(special(processor, processor.tokenizer(written).input_ids)) > len(
            special(processor, want)
        )
    assert forged > count // 20, "the words are hostile"


@pytest.mark.parametrize("count", COUNTS)
def test_texts_of_pieces_stay_words(processors, count):
    for seed in range(count):
        processor, rng = processors[seed % len(processors)], random.Random(seed)
        words = Words(rng, [*processor.tokenizer.control_tokens[:12], IMAGE], True)
        text = "".join(words.text() for _ in range(3))
        [ids] = processor(text=text, escape_special_tokens=True).input_ids
        assert special(processor, ids) == [processor.tokenizer.bos_token_id]
        assert processor.decode(ids[1:]) == text
