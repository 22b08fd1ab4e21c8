"""A tokenizer of 256 bytes and three special tokens, built in memory: every text has ids."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}[/]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
WITH_DEFAULT_SYSTEM = "{% if messages[0]['role'] != 'system' %}[system]Be nice.[/]{% endif %}" + CHATML
WITH_BOS = "{{ bos_token }}" + CHATML


def byte_tokenizer(
    pad: bool = True, adds_bos: bool = True, adds_eos: bool = False, chat_template: str | None = None
) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer: ids 0-255 are bytes in ByteLevel's order, then <bos> 256, <eos> 257, <pad> 258.

    Args:
        pad: whether there is a <pad>.
        adds_bos: whether encoding with special tokens puts <bos> first, as Llama does.
        adds_eos: whether the same encoding puts <eos> last, as T5 does.
        chat_template: jinja text of the chat template, if any.
    """
    specials = ["<bos>", "<eos>", *(["<pad>"] if pad else [])]
    vocabulary = {token: index for index, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(specials)
    if adds_bos or adds_eos:
        pattern = f"{'<bos> ' if adds_bos else ''}$A{' <eos>' if adds_eos else ''}"
        ids = [(token, core.token_to_id(token)) for token in ("<bos>", "<eos>")]
        core.post_processor = processors.TemplateProcessing(single=pattern, special_tokens=ids)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>" if pad else None
    )
    tokenizer.chat_template = chat_template
    return tokenizer
