"""Where the known part of a prompt with images, audio or video ends.

In: the prompt as the template renders it, and once more with a text of ours in place of each image. Out: the position
up to which the engine's token ids are those of the text.

vLLM 0.29 tokenizes the text with the template's placeholders, and its multimodal processor then replaces the first
tokens that it takes for one (`apply_token_matches` in multimodal/processing/processor.py), a placeholder that a client
typed into a message included. How many tokens come instead depends on the image and the model, so nothing is known from
there on; and nothing needs to be: vLLM puts the image's hash into the extra keys of every block that it touches, and
chains the blocks behind. What stands before is not touched, whatever the model makes of the image:

    <|im_start|>system ...<|im_end|>\\n<|im_start|>user\\nLook: <image> What is it?<|im_end|>\\n
    ---------------- known --------------------------------^

Which tokens a placeholder is made of shows in the comparison: they are in the one text, and missing in the other. Only
added tokens that the tokenizer splits off before all else are trusted (`Cutter`); a placeholder of ordinary letters
would be found by decoding the whole prompt and encoding it again.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter

from serve_app.errors import PromptError
from serve_app.prompts.cuts import Cutter
from serve_app.prompts.hf import model_config
from serve_app.types import TokenizerSource

STAND_IN = (
    "\ue000media\ue000"  # private use: neither whitespace, which templates strip, nor the start of any placeholder
)
# Per image, audio or video; a guess: SmolVLM has 64 and more, LLaVA 1.5 576, Qwen2.5-VL one in 28 x 28 pixels.
MEDIA_TOKENS = 500

# Their processors write at the beginning of the prompt, or write all of it anew (`PromptInsertion`,
# `_postprocess_prompt` and `_apply_prompt_updates` in vLLM's model_executor/models).
_REWRITTEN = frozenset({"blip-2", "molmo", "molmo2", "openvla", "paligemma", "phi3_v", "minicpmv", "minicpmo"})
_JOINS_NEWLINES = frozenset({"gemma3", "gemma3n"})  # with those that it puts in front of an image


def media_start(text: str, other: str, cutter: Cutter, tokenizer: TokenizerSource) -> int:
    """Where the first placeholder in `text` starts, or a little before: a position at which it may be cut.

    Args:
        text: the rendered prompt.
        other: the same with `STAND_IN` for every placeholder.
        cutter: of the tokenizer.
        tokenizer: where it is from; the model's configuration is beside it.

    Raises:
        PromptError: it is not certain.
    """
    model_type = model_config(tokenizer).get("model_type")
    if model_type in _REWRITTEN:
        raise PromptError("media", f"with an image, prompts of {model_type} are not what the template renders")
    found = list(cutter.added_tokens(text))
    placeholder = Counter(token for _, token in found) - Counter(token for _, token in cutter.added_tokens(other))
    first = min((at for at, token in found if token in placeholder), default=None)
    if first is None:
        raise PromptError("media", "the template's placeholder is no special token")
    end = min(first, _common_chars(text, other))
    if model_type in _JOINS_NEWLINES:
        end = len(text[:end].rstrip("\n"))
    return cutter.last_cut(text, end)


def _common_chars(one: str, other: str) -> int:
    """Length of the common prefix; `bisect` compares slices, which is faster than a loop over characters."""
    return bisect_left(range(1, min(len(one), len(other)) + 1), True, key=lambda n: one[:n] != other[:n])
