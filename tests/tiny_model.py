"""A tiny random language model with its tokenizer, and a tiny text: what tests cache and train on, made offline.

The model is Llama-shaped (3 layers of width 32, tied embeddings, context limit 64). Its tokenizer has one token per
byte and puts BOS in front by itself, as Llama's does. Everything is a pure function of its seed.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch

LAYERS = 3
WIDTH = 32
CONTEXT_LIMIT = 64
BOS, EOS, PAD = 0, 1, 2
SPECIAL_TOKENS = ("<s>", "</s>", "<pad>")


def _write_tokenizer(directory: Path) -> int:
    """Write a byte-level tokenizer; returns the size of its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=CONTEXT_LIMIT,
    ).save_pretrained(directory)
    return len(vocabulary)


def write_tiny_model(directory: Path, *, seed: int = 0, layers: int = LAYERS, width: int = WIDTH) -> Path:
    """Write model and tokenizer into a folder that `from_pretrained` loads; returns the folder.

    Hooks: `model.layers.0` to `model.layers.<layers - 1>`, each `width` wide.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    directory.mkdir(parents=True, exist_ok=True)
    vocabulary_size = _write_tokenizer(directory)
    config = LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_LIMIT,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        tie_word_embeddings=True,
        # Wide enough that layers do something; Llama's own 0.02 leaves a model this small almost linear.
        initializer_range=0.3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(directory)
    return directory


def tiny_documents(documents: int = 200, *, seed: int = 0, words: tuple[int, int] = (5, 80)) -> list[str]:
    """Texts of pseudo-words with repeating structure, `words[0]` to `words[1]` words each (about 6 tokens a word)."""
    source = random.Random(seed)
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    vocabulary = ["".join(source.choices(syllables, k=source.randint(1, 4))) for _ in range(120)]
    # Each word has few successors, so that contexts differ from noise.
    successors = {word: source.choices(vocabulary, k=4) for word in vocabulary}
    texts = []
    for _ in range(documents):
        word = source.choice(vocabulary)
        text = [word]
        for _ in range(source.randint(*words) - 1):
            word = source.choice(successors[word])
            text.append(word)
        texts.append(" ".join(text) + ".")
    return texts


def write_tiny_text(directory: Path, *, documents: int = 200, seed: int = 0, words: tuple[int, int] = (5, 80)) -> Path:
    """Write `text.jsonl` with one `{"text": ...}` per line; returns the file. 200 documents are about 52,000 tokens."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "text.jsonl"
    lines = (json.dumps({"text": text}) for text in tiny_documents(documents, seed=seed, words=words))
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path
