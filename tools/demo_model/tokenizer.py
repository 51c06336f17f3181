"""The demo model's tokenizer: byte-level BPE over few words, Llama 3's special tokens and chat format.

Ids are laid out as in the published tokenizers: text tokens, then the special tokens in Meta's order,
then the image token, whose id equals the vocabulary size (it has an input embedding and no row in the
output layer).
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from mllama.demo.questions import vocabulary_texts

IMAGE_TOKEN = "<|image|>"
BOS, EOS, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"
EOM, EOT = "<|eom_id|>", "<|eot_id|>"
_START, _END = "<|start_header_id|>", "<|end_header_id|>"
SPECIAL_TOKENS = (
    BOS,
    EOS,
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    PAD,
    "<|step_id|>",
    _START,
    _END,
    EOM,
    EOT,
    "<|python_tag|>",
    "<|reserved_special_token_2|>",
)
_MAX_TEXT_TOKENS = 512 - len(SPECIAL_TOKENS)
# Llama 3's split of text into words, numbers of up to three digits, punctuation and white space.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Content is a string, or a list of image and text parts. An image anywhere rules system turns out,
# as published.
CHAT_TEMPLATE = """\
{%- set has_image = namespace(value=false) -%}
{%- for message in messages -%}
  {%- if message['content'] is not string -%}
    {%- for part in message['content'] if part['type'] == 'image' -%}
      {%- set has_image.value = true -%}
    {%- endfor -%}
  {%- endif -%}
{%- endfor -%}
{{- bos_token -}}
{%- for message in messages -%}
  {%- if message['role'] == 'system' and has_image.value -%}
    {{- raise_exception('Prompting with images is incompatible with system messages.') -}}
  {%- endif -%}
  {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}
  {%- if message['content'] is string -%}
    {{- message['content'] -}}
  {%- else -%}
    {%- for part in message['content'] -%}
      {%- if part['type'] == 'image' -%}
        {{- '<|image|>' -}}
      {%- elif part['type'] == 'text' -%}
        {{- part['text'] -}}
      {%- else -%}
        {{- raise_exception('A content part is an image or a text, got ' + part['type']) -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {{- '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""


def build_tokenizer() -> Tokenizer:
    """Trains the tokenizer; the result depends on nothing but the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_MAX_TEXT_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = vocabulary_texts()
    words = ["user", "assistant", "system", "\n\n"] * 10
    lower = [text.lower() for text in texts]
    tokenizer.train_from_iterator(texts + lower + words, trainer)
    tokenizer.add_special_tokens([*SPECIAL_TOKENS, IMAGE_TOKEN])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS}:1 $B:1",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return tokenizer


def vocab_size(tokenizer: Tokenizer) -> int:
    """Number of ids the model can answer with: all but the image token, which is the last."""
    image_id = tokenizer.token_to_id(IMAGE_TOKEN)
    if image_id != tokenizer.get_vocab_size() - 1:
        raise ValueError(f"the image token must have the last id, got {image_id}")
    return image_id


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json, special_tokens_map.json and chat_template.json."""
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": BOS, "eos_token": EOT, "pad_token": PAD}
    config = {
        **special,
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(token)): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for token in (*SPECIAL_TOKENS, IMAGE_TOKEN)
        },
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 2048,
        "padding_side": "right",
        "processor_class": "MllamaProcessor",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    for name, content in (
        ("special_tokens_map.json", special),
        ("tokenizer_config.json", config),
        ("chat_template.json", {"chat_template": CHAT_TEMPLATE}),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
