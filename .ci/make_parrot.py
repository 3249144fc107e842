"""Train a tiny Qwen3 that recites a few conversations: a real vLLM is then exact at temperature 0.

usage: make_parrot.py OUT_DIR    (90 s on two cores, in the Python of vLLM; exit 1: not learned)
"""

import json
import sys
import time

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

STEPS = 500
LEARNING_RATE = 3e-3
LOSS_GOAL = 2e-4
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MARKS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
TEMPLATE = """{%- if tools %}<|im_start|>system
{%- if messages[0].role == 'system' %}
{{ messages[0].content }}
{%- endif %}
# Tools
{%- for tool in tools %}
{{ tool.function.name }}
{%- endfor %}<|im_end|>
{% elif messages[0].role == 'system' %}<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif %}
{%- for m in messages %}
{%- if m.role == 'user' %}<|im_start|>user
{{ m.content }}<|im_end|>
{% elif m.role == 'assistant' %}<|im_start|>assistant
{{ m.content or '' }}
{%- for c in m.tool_calls or [] %}
<tool_call>
{"name": "{{ c.function.name }}", "arguments": \
{{ c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>
{% elif m.role == 'tool' %}<|im_start|>user
<tool_response>
{{ m.content }}
</tool_response><|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "get_weather", "description": "get_weather", "parameters": CITY},
    }
]
COUNT = " ".join(str(number) for number in range(1, 101))


def says(role: str, content: str, **fields: object) -> dict:
    """Return one message."""
    return {"role": role, "content": content, **fields}


def called(*cities: str) -> dict:
    """Return the assistant's message that has asked for the weather of `cities`."""
    functions = [{"name": "get_weather", "arguments": {"city": city}} for city in cities]
    calls = [
        {"id": f"call_{n}", "type": "function", "function": item}
        for n, item in enumerate(functions, 1)
    ]
    return says("assistant", "", tool_calls=calls)


def think(reasoning: str, answer: str) -> str:
    """Return what the model writes: its reasoning, then its answer."""
    return f"<think>\n{reasoning}\n</think>\n\n{answer}"


def call(city: str) -> str:
    """Return a tool call as the model writes it."""
    return (
        f'<tool_call>\n{{"name": "get_weather", "arguments": {{"city": "{city}"}}}}\n</tool_call>'
    )


SUM = says("user", "What is 2+2?")
PARIS = says("user", "What is the weather in Paris?")
BOTH = says("user", "What is the weather in Paris and Rome?")
SUNNY = says("tool", "sunny, 21 C", tool_call_id="call_1")
RAIN = says("tool", "rain, 15 C", tool_call_id="call_2")
ADA = [
    says("user", "My name is Ada."),
    says("assistant", "Hello Ada."),
    says("user", "What is my name?"),
]
BROKEN = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Par\n</tool_call>'
FOUR = think("Two plus two equals four.", "2 + 2 = 4")

# messages, tools, answer
CONVERSATIONS: list[tuple[list[dict], list[dict] | None, str]] = [
    ([SUM], None, FOUR),
    ([says("system", "You are a helpful assistant."), SUM], None, FOUR),
    (
        [says("system", "Answer like a pirate."), SUM],
        None,
        think("A pirate counts too.", "Arr, it be 4!"),
    ),
    ([says("user", "Hello")], None, think("A greeting.", "Hello! How can I help you today?")),
    (
        [says("user", "Say hello in Japanese.")],
        None,
        think("Use hiragana.", "こんにちは、世界 🌸🚀"),
    ),
    ([says("user", "Count to 100.")], None, think("Count.", COUNT)),
    (ADA, None, think("They told me.", "Your name is Ada.")),
    ([PARIS], TOOLS, think("I need the tool.", call("Paris"))),
    ([BOTH], TOOLS, think("Two calls.", call("Paris") + "\n" + call("Rome"))),
    (
        [PARIS, called("Paris"), SUNNY],
        TOOLS,
        think("The tool answered.", "It is sunny in Paris, 21 C."),
    ),
    (
        [BOTH, called("Paris", "Rome"), SUNNY, RAIN],
        TOOLS,
        think("Both answered.", "Paris is sunny, Rome has rain."),
    ),
    ([says("user", "Call a broken tool.")], TOOLS, think("Broken.", BROKEN)),
]
# The first three tokens are the prompt.
PROMPTS = [
    "The capital of France is Paris.",
    "What is 2+2? 4",
    "Once upon a time there was a small model that could count: " + COUNT,
]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer trained on the texts above."""
    texts = PROMPTS + [
        json.dumps(messages, ensure_ascii=False) + answer for messages, _, answer in CONVERSATIONS
    ]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=700, special_tokens=SPECIAL, initial_alphabet=alphabet),
    )
    bpe.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in MARKS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_examples(tokenizer: PreTrainedTokenizerFast) -> list[tuple[list[int], list[int]]]:
    """Return what to memorise: the tokens of each prompt and of its answer."""

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    examples = []
    for messages, tools, answer in CONVERSATIONS:
        prompt = tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=True, tokenize=False
        )
        examples.append((ids(prompt), [*ids(answer), tokenizer.eos_token_id]))
    for text in PROMPTS:
        tokens = [*ids(text), tokenizer.eos_token_id]
        examples.append((tokens[:3], tokens[3:]))
    return examples


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Return an untrained model of 1.5 million parameters, the same each time."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=(len(tokenizer) + 63) // 64 * 64,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config)


def make_batch(examples: list[tuple[list[int], list[int]]], pad: int) -> dict[str, torch.Tensor]:
    """Return all examples as one padded batch; only the answers count in the loss."""
    shape = (len(examples), max(len(prompt) + len(answer) for prompt, answer in examples))
    inputs, labels = torch.full(shape, pad), torch.full(shape, -100)
    mask = torch.zeros(shape, dtype=torch.long)
    for row, (prompt, answer) in enumerate(examples):
        length = len(prompt) + len(answer)
        inputs[row, :length] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : length] = torch.tensor(answer)
        mask[row, :length] = 1
    return {"input_ids": inputs, "labels": labels, "attention_mask": mask}


def train(model: Qwen3ForCausalLM, batch: dict[str, torch.Tensor]) -> None:
    """Train until the loss is as small as it needs to be."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS)
    started = time.monotonic()
    model.train()
    for step in range(STEPS):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or loss.item() < LOSS_GOAL:
            print(
                f"step {step}: loss {loss.item():.5f} after {time.monotonic() - started:.0f} s",
                flush=True,
            )
        if loss.item() < LOSS_GOAL:
            break
    model.eval()


def recites(model: Qwen3ForCausalLM, prompt: list[int], answer: list[int]) -> bool:
    """Return whether the model answers `prompt` with `answer`."""
    tokens = model.generate(
        torch.tensor([prompt]), max_new_tokens=len(answer) + 5, do_sample=False
    )[0].tolist()
    return tokens[len(prompt) : len(prompt) + len(answer)] == answer


def main(out: str) -> int:
    """Make the model and its tokenizer in the folder `out`; return 0 if it recites all, else 1."""
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(out)
    examples = make_examples(tokenizer)
    model = make_model(tokenizer)
    train(model, make_batch(examples, tokenizer.pad_token_id))
    model.to(torch.bfloat16).save_pretrained(out)
    memorised = sum(recites(model, prompt, answer) for prompt, answer in examples)
    print(f"memorised {memorised} of {len(examples)}")
    return int(memorised < len(examples))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
