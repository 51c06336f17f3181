"""The chat template of the published Llama 3.2 Vision models, for files that come without one.

A transcription of what it writes, without its tools: a conversation with images has no system message, one
without begins with a system block that tells the date.
"""

PUBLISHED_TEMPLATE = """\
{%- set date = date_string if date_string is defined else strftime_now('%d %b %Y') -%}
{%- if tools is defined and tools -%}
  {{- raise_exception('This template writes no tools: pass chat_template= of a checkpoint that has them.') -}}
{%- endif -%}
{%- set has_image = namespace(value=false) -%}
{%- for message in messages if message['content'] is not string -%}
  {%- for part in message['content'] if part['type'] == 'image' -%}
    {%- set has_image.value = true -%}
  {%- endfor -%}
{%- endfor -%}
{%- if messages and messages[0]['role'] == 'system' -%}
  {%- set system = messages[0]['content'] | trim -%}
  {%- set turns = messages[1:] -%}
{%- else -%}
  {%- set system = '' -%}
  {%- set turns = messages -%}
{%- endif -%}
{%- if has_image.value and system -%}
  {{- raise_exception('Prompting with images is incompatible with system messages.') -}}
{%- endif -%}
{{- bos_token -}}
{%- if not has_image.value -%}
  {{- '<|start_header_id|>system<|end_header_id|>\\n\\n' -}}
  {{- 'Cutting Knowledge Date: December 2023\\n' -}}
  {{- 'Today Date: ' + date + '\\n\\n' + system + '<|eot_id|>' -}}
{%- endif -%}
{%- for message in turns -%}
  {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}
  {%- if message['content'] is string -%}
    {{- message['content'] -}}
  {%- else -%}
    {%- for part in message['content'] -%}
      {{- '<|image|>' if part['type'] == 'image' else part['text'] -}}
    {%- endfor -%}
  {%- endif -%}
  {{- '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""
