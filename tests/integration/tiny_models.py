"""Model folders with a real tokenizer and chat template of each family, and no weights (`--load-format dummy`).

In: a family's name. Out: a folder that vLLM and transformers load like any checkpoint. The tokenizers are trained here,
on the text of `pydoc`'s topics and on lines of other scripts; their parts are those of the models they are named after,
and so are the tokenizer classes, since transformers 5 rebuilds the tokenizer of some classes from its vocabulary.
The chat templates are short ones in the manner of these models.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CONTEXT = 8192  # tokens
VOCABULARY = 1500  # tokens, about
OTHER_SCRIPTS = [
    "Grüße aus Köln: naïve café, Ça va? Ångström, İstanbul ve ısı, ﬁne e\u0301tude",
    "Съешь же ещё этих мягких французских булок, да выпей чаю",
    "日本語のテキストと漢字、東京都。今天天气很好。 한국어 문장입니다 ไทย עברית العربية हिन्दी",
    "👩‍👩‍👧‍👦 🇩🇪 🎉🔥 12345 67 890 3.14e-10 {'a': 1} \t\t x\r\n\r\n",
] * 40

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n\\nYou are provided with function signatures within <tools></tools> XML tags:\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last_query=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- if message.role == "user" and message.content is string %}
        {%- set ns.last_query = (messages|length - 1) - loop.index0 %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content or '' %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- if reasoning and loop.index0 > ns.last_query %}
            {{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content }}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if tool_call.function %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' + tool_call.name + '", "arguments": ' }}
            {{- tool_call.arguments if tool_call.arguments is string else tool_call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or messages[loop.index0 - 1].role != "tool" %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != "tool" %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is defined and tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" + system_message + "<|eot_id|>" }}
{%- if tools is defined and tools is not none %}
    {{- "<|start_header_id|>user<|end_header_id|>\\n\\nGiven the following functions, answer in JSON.\\n\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
    {%- if messages | length == 0 %}
        {{- raise_exception("Cannot put tools in the first user message when there's no first user message!") }}
    {%- endif %}
    {{- messages[0]['content'] | trim + "<|eot_id|>" }}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + tool_call.name + '", "parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}<|eot_id|>" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim }}
        {{- '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}"
    "{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA2_TOOLS = (
    "{{ bos_token }}{% for tool in tools %}{{ tool.function.name }}: {{ tool.function.parameters | tojson }}\n"
    "{% endfor %}{% for m in messages %}{{ m.role | upper }}: {{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call | tojson }}{% endfor %}{{ eos_token }}\n{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
# Content parts, documents, what the assistant wrote: vLLM finds the "openai" content format in it.
PARTS = """{%- for message in messages %}
{{- '[' + message.role | upper + ']' }}
{%- if message.content is string %}{{ message.content }}
{%- else %}
    {%- for part in message.content %}
        {%- if part.type == 'text' %}{{ part.text }}{% if part.cache_control %}<cache>{% endif %}
        {%- elif part.type == 'tool_reference' %}<ref>{{ part.name }}</ref>
        {%- endif %}
        {%- if not loop.last %} | {% endif %}
    {%- endfor %}
{%- endif %}
{%- if message.role == 'assistant' %}
    {%- generation %}{{ message.reasoning or '' }}{% endgeneration %}
    {%- for call in message.tool_calls or [] %}<call {{ call.id }}>
        {%- for key, value in call.function.arguments.items() %} {{ key }}={{ value | tojson }}{% endfor %}
    {%- endfor %}
{%- endif %}[SEP]
{% endfor %}
{%- for document in documents or [] %}<doc {{ loop.index }}>{% for k, v in document | dictsort %}{{ k }}: {{ v }};
{%- endfor %}</doc>{% endfor %}
{%- if add_generation_prompt %}[ASSISTANT]{% endif %}"""
# Everything that a template can see.
SHOW_ALL = (
    "{%- for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{%- if message.content is string %}{{ message.content }}"
    "{%- else %}{% for part in message['content'] %}[{{ part | tojson }}]{% endfor %}{% endif %}"
    "{%- for key in message %}{% if key not in ('role', 'content') %}|{{ key }}={{ message[key] | tojson }}{% endif %}"
    "{%- endfor %}<|im_end|>\n{% endfor %}"
    "tools={{ (tools or []) | tojson }} docs={{ (documents or []) | tojson }} thinking={{ enable_thinking }} "
    "effort={{ reasoning_effort }} color={{ color }} bos={{ bos_token }} size={{ size }}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The same for templates that take strings, and know the developer.
SHOW_STRINGS = (
    "{% set developer = 'developer' %}{% for m in messages %}{{ m | tojson }}</s>\n{% endfor %}"
    "{{ tools | tojson(indent=2) if tools else 'no tools' }}{% if add_generation_prompt %}{{ eos_token }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "qwen": QWEN,
    "llama 3": LLAMA3,
    "llama 2": LLAMA2,
    "gemma": GEMMA,
    "parts": PARTS,
    "show all": SHOW_ALL,
    "show strings": SHOW_STRINGS,
}
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_PATTERN = QWEN_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


@dataclass(frozen=True)
class Family:
    """How to build one tokenizer, and what its model card says."""

    tokenizer: Callable[[], Tokenizer]
    config: Mapping[str, Any]  # tokenizer_config.json
    special: tuple[str, ...]  # added after training, not normalized
    files: Mapping[str, Any] = field(default_factory=dict)  # more JSON files in the folder


def corpus() -> list[str]:
    return [*topics.values(), *OTHER_SCRIPTS]


def _byte_level(pattern: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        corpus(), trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


def _qwen() -> Tokenizer:
    tokenizer = _byte_level(QWEN_PATTERN)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in ("<tool_call>", "</tool_call>", "<think>")])
    return tokenizer


def _llama3() -> Tokenizer:
    tokenizer = _byte_level(LLAMA3_PATTERN)
    tokenizer.add_special_tokens([AddedToken("<|begin_of_text|>", normalized=False)])
    bos = tokenizer.token_to_id("<|begin_of_text|>")
    template = processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", bos)])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
    return tokenizer


def _llama2() -> Tokenizer:
    """SentencePiece BPE: spaces are letters, the first word gets one, what has no token falls back to bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(
        corpus(), trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def _word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(
        corpus(), trainers.WordPieceTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def _unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    special = ["<pad>", "</s>", "<unk>", "<bos>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=VOCABULARY // 2, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator((line for text in corpus() for line in text.splitlines()), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


FAMILIES = {
    "qwen": Family(
        _qwen,
        {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    ),
    "llama 3": Family(
        _llama3,
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        {  # a multimodal processor, whose template vLLM prefers for requests without tools
            "preprocessor_config.json": {
                "feature_extractor_type": "WhisperFeatureExtractor",
                "processor_class": "Qwen2AudioProcessor",
            },
            "chat_template.json": {"chat_template": PARTS},
        },
    ),
    "llama 2": Family(
        _llama2,
        {
            "tokenizer_class": "LlamaTokenizer",
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
        },
        (),
    ),
    "word piece": Family(
        _word_piece,
        {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "cls_token": "[CLS]", "sep_token": "[SEP]"},
        ("[USER]", "[ASSISTANT]", "<|im_start|>"),
    ),
    "unigram": Family(
        _unigram,
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "</s>"},
        ("<start_of_turn>", "<end_of_turn>"),
    ),
}
_OWN_TEMPLATE: dict[str, Any] = {
    "qwen": QWEN,
    "llama 3": LLAMA3,
    "llama 2": [{"name": "default", "template": LLAMA2}, {"name": "tool_use", "template": LLAMA2_TOOLS}],
    "word piece": PARTS,
    "unigram": GEMMA,
}


# In the manner of SmolVLM's.
VISION = """{%- for message in messages %}<|im_start|>{{ message['role'] | capitalize }}
{%- if message['content'] is not string and message['content'] and message['content'][0]['type'] == 'image' %}:
{%- else %}: {% endif %}
{%- if message['content'] is string %}{{ message['content'] }}
{%- else %}
    {%- for part in message['content'] %}
        {%- if part['type'] == 'text' %}{{ part['text'] }}
        {%- elif part['type'] == 'image' %}{% if numbered %}Picture: {% endif %}<image>
        {%- endif %}
    {%- endfor %}
{%- endif %}<end_of_utterance>
{% endfor %}
{%- if add_generation_prompt %}Assistant:{% endif %}"""
IMAGE_TOKEN = "<image>"
_VISION_TOKENS = ("<|im_start|>", IMAGE_TOKEN, "<fake_token_around_image>", "<end_of_utterance>", "<global-img>")
_IMAGE_SIDE = 32  # pixels


def build_vision(folder: Path) -> str:
    """Idefics3, whose processor needs no torchvision. Writes the model into `folder` and returns its path."""
    tokenizer = _qwen()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in ("<|endoftext|>", *_VISION_TOKENS)])
    tokenizer.save(str(folder / "tokenizer.json"))
    text = _llama(tokenizer) | {"pad_token_id": 0}
    vision = {"model_type": "idefics3_vision", "image_size": _IMAGE_SIDE, "patch_size": 8, "num_attention_heads": 2}
    files = {
        "tokenizer_config.json": {
            "model_max_length": CONTEXT,
            "tokenizer_class": "Qwen2Tokenizer",
            "eos_token": "<end_of_utterance>",
            "pad_token": "<|endoftext|>",
            "chat_template": VISION,
        },
        "preprocessor_config.json": {
            "image_processor_type": "Idefics3ImageProcessor",
            "processor_class": "Idefics3Processor",
            "do_image_splitting": True,
            "size": {"longest_edge": 2 * _IMAGE_SIDE},
            "max_image_size": {"longest_edge": _IMAGE_SIDE},
        },
        "processor_config.json": {"processor_class": "Idefics3Processor", "image_seq_len": 4},
        "config.json": {
            "architectures": ["Idefics3ForConditionalGeneration"],
            "model_type": "idefics3",
            "image_token_id": tokenizer.token_to_id(IMAGE_TOKEN),
            "scale_factor": 2,
            "torch_dtype": "bfloat16",
            "vocab_size": text["vocab_size"],
            "text_config": text,
            "vision_config": vision | {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1},
        },
    }
    for file, content in files.items():
        (folder / file).write_text(json.dumps(content))
    return str(folder)


def build(name: str, folder: Path) -> str:
    """Writes the model into `folder` and returns its path."""
    family = FAMILIES[name]
    tokenizer = family.tokenizer()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in family.special])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"model_max_length": CONTEXT, "chat_template": _OWN_TEMPLATE[name], **family.config}
    for file, content in {"tokenizer_config.json": config, **family.files}.items():
        (folder / file).write_text(json.dumps(content))
    (folder / "config.json").write_text(json.dumps(_llama(tokenizer)))
    return str(folder)


def _llama(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": tokenizer.get_vocab_size() + 8,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
