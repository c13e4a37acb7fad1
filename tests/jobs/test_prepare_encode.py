"""Where rows become tokens: equal to plain transformers, loss exactly on what is to be learned, on templates of real bases."""

import json
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from kubepeft.errors import UserError
from kubepeft_jobs.prepare.encode import Encoded, Encoder, fit
from kubepeft_jobs.prepare.formats import LAST_TURN_ONLY, OPEN_PROMPT, Conversation, Pair, Text, find_format, to_example
from kubepeft_jobs.prepare.read import RowError
from tests.jobs import prepare_parts as parts

TURNS = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "The capital of France is Paris."},
    {"role": "user", "content": "  and two\n\nlines? ü€ "},
    {"role": "assistant", "content": "hello world\n"},
]
SYSTEM = {"role": "system", "content": "You are a helpful assistant."}


def base(name: str, core: str = "byte-level") -> PreTrainedTokenizerFast:
    if name == "phi3":
        return parts.phi_tokenizer()
    tokenizer = (
        parts.sentencepiece_like() if core == "sentencepiece" else parts.byte_level(trim_offsets=core == "trimmed")
    )
    return parts.tokenizer_of(
        tokenizer, parts.TEMPLATES[name], parts.EOS_OF.get(name, "</s>"), parts.BOS_OF.get(name, "<s>")
    )


def conversation(messages: list[dict[str, Any]], tools: Any = None) -> Conversation:
    row = {"messages": messages, "tools": tools}
    example = to_example(row, find_format("messages", {}, row, ""), True)
    assert isinstance(example, Conversation)
    return example


def encode(
    tokenizer: PreTrainedTokenizerFast, example: Any, task: Any = "CAUSAL_LM", loss: Any = "completion"
) -> Encoded:
    [result] = Encoder(tokenizer, task, loss).encode([example])
    assert isinstance(result, Encoded), result
    return result


def spans(encoded: Encoded) -> list[tuple[int, int]]:
    return list(zip(encoded.target[::2], encoded.target[1::2], strict=True))


@pytest.mark.parametrize("core", ["byte-level", "trimmed", "sentencepiece"])
@pytest.mark.parametrize("name", parts.TEMPLATES)
def test_ids_are_apply_chat_templates_and_each_answer_follows_exactly_what_generation_sees(
    name: str, core: str
) -> None:
    tokenizer = base(name, core)
    messages = TURNS if name == "gemma" else [SYSTEM, *TURNS]
    encoded = encode(tokenizer, conversation(messages))
    assert encoded.ids == tokenizer.apply_chat_template(messages)["input_ids"]
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    assert len(spans(encoded)) == len(answers)
    for index, (start, end) in zip(answers, spans(encoded), strict=True):
        seen = tokenizer.apply_chat_template(messages[:index], add_generation_prompt=True)["input_ids"]
        assert encoded.ids[:start] == seen
        learned = tokenizer.decode(encoded.ids[start:end])
        assert learned.strip().startswith(messages[index]["content"].strip())
        assert learned.endswith((">", ">\n"))
        assert "user" not in learned


def test_a_batch_gives_what_each_conversation_gives_alone() -> None:
    tokenizer = base("qwen2.5")
    examples = [
        conversation(TURNS[:2]),
        conversation([SYSTEM, *TURNS]),
        Text("hello"),
        Pair("a", "b"),
        conversation(TURNS),
    ]
    encoder = Encoder(tokenizer, "CAUSAL_LM", "completion")
    assert encoder.encode(examples) == [encoder.encode([example])[0] for example in examples]


def test_tool_calls_go_through_the_template_with_their_arguments_parsed() -> None:
    tokenizer = base("qwen2.5")
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]
    call = {"type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
    messages = [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "sunny"},
        {"role": "assistant", "content": "It is sunny."},
    ]
    encoded = encode(tokenizer, conversation(messages, tools))
    reference = [{**messages[1], "tool_calls": [{"function": {"name": "get_weather", "arguments": {"city": "Paris"}}}]}]
    reference = [messages[0], *reference, *messages[2:]]
    assert encoded.ids == tokenizer.apply_chat_template(reference, tools=tools)["input_ids"]
    call_text, answer = (tokenizer.decode(encoded.ids[start:end]) for start, end in spans(encoded))
    assert call_text == '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>\n'
    assert answer == "It is sunny.<|im_end|>\n"


def test_weight_zero_answers_carry_no_loss_but_stay_in_the_text() -> None:
    tokenizer = base("chatml")
    weighted = [TURNS[0], {**TURNS[1], "weight": 0}, TURNS[2], {**TURNS[3], "weight": 1}]
    encoded, all_turns = encode(tokenizer, conversation(weighted)), encode(tokenizer, conversation(TURNS))
    assert encoded.ids == all_turns.ids
    assert spans(encoded) == spans(all_turns)[1:]


def test_generation_marks_of_the_template_are_the_spans() -> None:
    tokenizer = parts.tokenizer_of(parts.byte_level(), parts.MARKED, "<|im_end|>")
    encoded = encode(tokenizer, conversation([SYSTEM, *TURNS]))
    reference = tokenizer.apply_chat_template([SYSTEM, *TURNS], return_dict=True, return_assistant_tokens_mask=True)
    mask = [0] * len(encoded.ids)
    for start, end in spans(encoded):
        mask[start:end] = [1] * (end - start)
    assert encoded.ids == reference["input_ids"]
    assert mask == reference["assistant_masks"]
    unweighted = encode(tokenizer, conversation([TURNS[0], {**TURNS[1], "weight": 0}, *TURNS[2:]]))
    assert len(spans(unweighted)) == 1


def test_where_the_template_rewrites_earlier_turns_only_the_last_is_learned_and_it_is_said() -> None:
    tokenizer = parts.tokenizer_of(parts.byte_level(), parts.QWEN3_LIKE, "<|im_end|>")
    messages = [TURNS[0], {"role": "assistant", "content": "<think>\nParis\n</think>\n\nParis."}, TURNS[2], TURNS[3]]
    encoded = encode(tokenizer, conversation(messages))
    assert encoded.note == LAST_TURN_ONLY
    [(start, end)] = spans(encoded)
    assert tokenizer.decode(encoded.ids[start:end]) == "hello world\n<|im_end|>\n"
    assert "<think>" not in tokenizer.decode(encoded.ids[:start])


def test_where_the_generation_prompt_opens_a_thinking_block_loss_begins_where_they_part() -> None:
    tokenizer = parts.tokenizer_of(parts.byte_level(), parts.OPENS_THINKING, "<|im_end|>")
    encoded = encode(tokenizer, conversation(TURNS[:2]))
    assert encoded.note == OPEN_PROMPT
    [(start, end)] = spans(encoded)
    assert tokenizer.decode(encoded.ids[start:end]) == "The capital of France is Paris.<|im_end|>\n"


def test_what_the_template_refuses_is_a_bad_row_and_the_others_are_encoded() -> None:
    encoder = Encoder(base("mistral"), "CAUSAL_LM", "completion")
    results = encoder.encode(
        [conversation(TURNS), conversation([TURNS[0], TURNS[0], TURNS[1]]), conversation(TURNS[:2])]
    )
    assert [type(result) for result in results] == [Encoded, RowError, Encoded]
    assert "conversation roles must alternate" in str(results[1])


def test_conversations_without_a_chat_template_are_refused_with_the_mend() -> None:
    tokenizer = parts.tokenizer_of(parts.byte_level())
    with pytest.raises(UserError) as caught:
        Encoder(tokenizer, "CAUSAL_LM", "completion").encode([conversation(TURNS)])
    assert caught.value.reason == "NoChatTemplate"
    assert "prompt and completion" in caught.value.mend


def test_a_chat_template_that_does_not_compile_is_the_bases_fault_not_the_rows() -> None:
    tokenizer = parts.tokenizer_of(parts.byte_level(), "{% for m in messages %}{{ m.content }")
    with pytest.raises(UserError, match="does not compile"):
        Encoder(tokenizer, "CAUSAL_LM", "completion").encode([conversation(TURNS)])


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("question:", " hello"),
        ("question: ", "hello"),
        ("the qu", "ick brown"),
        ("a \n", "b"),
        ("x", "\n\ny"),
        ("", "hello"),
        ("ü", "€"),
    ],
)
@pytest.mark.parametrize("core", ["byte-level", "sentencepiece"])
def test_a_prompts_ids_are_what_generation_sees_and_the_whole_decodes_unchanged(
    core: str, prompt: str, completion: str
) -> None:
    tokenizer = parts.tokenizer_of(
        parts.sentencepiece_like() if core == "sentencepiece" else parts.byte_level(add_bos=True), bos="<s>"
    )
    encoded = encode(tokenizer, Pair(prompt, completion))
    [(start, end)] = spans(encoded)
    assert encoded.ids[:start] == tokenizer(prompt)["input_ids"]
    assert encoded.ids.count(tokenizer.bos_token_id) == 1
    assert encoded.ids[end - 1] == tokenizer.eos_token_id
    assert end == len(encoded.ids)
    assert tokenizer.decode(encoded.ids, skip_special_tokens=True) == prompt + completion


def test_bos_and_eos_that_are_in_the_text_are_not_doubled() -> None:
    tokenizer = parts.tokenizer_of(parts.byte_level(add_bos=True), bos="<s>")
    for example in (Pair("<s>question", " answer</s>"), Text("<s>question answer</s>")):
        ids = encode(tokenizer, example).ids
        assert (ids[0], ids.count(1), ids[-1], ids.count(2)) == (1, 1, 2, 1)


def test_loss_all_covers_everything_but_the_first_token() -> None:
    tokenizer = base("chatml")
    for example in (conversation(TURNS), Pair("question", " answer"), Text("hello world")):
        encoded = encode(tokenizer, example, loss="all")
        assert spans(encoded) == [(1, len(encoded.ids))]


def test_text_ends_with_eos_and_a_single_token_is_not_enough() -> None:
    tokenizer = parts.tokenizer_of(parts.byte_level())
    assert encode(tokenizer, Text("hello world")).ids == [
        *tokenizer("hello world")["input_ids"],
        tokenizer.eos_token_id,
    ]
    [result] = Encoder(tokenizer, "CAUSAL_LM", "completion").encode([Text("</s>")])
    assert isinstance(result, RowError)


def test_an_encoder_decoder_gets_source_and_target_each_with_eos() -> None:
    tokenizer = parts.tokenizer_of(parts.unigram())
    encoded = encode(tokenizer, Pair("question: hello", "the answer"), task="SEQ_2_SEQ_LM")
    assert encoded.ids == tokenizer("question: hello")["input_ids"]
    assert encoded.target == tokenizer(text_target="the answer")["input_ids"]
    assert encoded.ids[-1] == encoded.target[-1] == tokenizer.eos_token_id
    assert encoded.target[-2] != tokenizer.eos_token_id


def test_instructions_are_alpacas_prompt_without_a_chat_template_and_a_conversation_with_one() -> None:
    row = {"instruction": "Translate.", "input": "hello", "output": "bonjour"}
    form = find_format("auto", {}, row, "")
    plain = to_example(row, form, False)
    assert isinstance(plain, Pair)
    assert plain.prompt.endswith("### Instruction:\nTranslate.\n\n### Input:\nhello\n\n### Response:\n")
    assert "### Input" not in to_example({**row, "input": ""}, form, False).prompt  # type: ignore[union-attr]
    chat = to_example(row, form, True)
    assert isinstance(chat, Conversation)
    assert chat.messages[0] == {"role": "user", "content": "Translate.\n\nhello"}


def test_a_conversational_pair_learns_from_the_completions_answers_only() -> None:
    tokenizer = base("chatml")
    row = {"prompt": TURNS[:3], "completion": TURNS[3:]}
    encoded = encode(tokenizer, to_example(row, find_format("auto", {}, row, ""), True))
    whole = encode(tokenizer, conversation(TURNS))
    assert (encoded.ids, spans(encoded)) == (whole.ids, spans(whole)[1:])


def test_sharegpt_conversations_are_messages_and_an_opening_answer_is_context() -> None:
    turns = [{"from": "gpt", "value": "Hi!"}, {"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}]
    row = {"conversations": turns}
    example = to_example(row, find_format("auto", {}, row, ""), True)
    assert isinstance(example, Conversation)
    assert [message["role"] for message in example.messages] == ["assistant", "user", "assistant"]
    assert example.trained == [False, False, True]


MESSAGE_REASONS = {
    "no list": ("text", "'messages' is a string, not a list of messages"),
    "empty": ([], "'messages' is empty"),
    "null": (None, "'messages' is null, not a list of messages"),
    "message is text": (["hi"], "message 1 of 'messages' is a string"),
    "unknown role": ([{"role": "asistant", "content": "x"}], "has role 'asistant'; known are assistant"),
    "number as content": (
        [{"role": "user", "content": 5}],
        "message 1 of 'messages': content is a number, not a string",
    ),
    "no content": ([{"role": "user"}], "message 1 of 'messages' (user) has no content"),
    "empty answer": ([TURNS[0], {"role": "assistant", "content": " "}], "message 2 of 'messages' (assistant) is empty"),
    "no answer": ([TURNS[0]], "no assistant message in 'messages' to learn from"),
    "all weights zero": ([TURNS[0], {**TURNS[1], "weight": 0}], "no assistant message"),
    "strange weight": ([TURNS[0], {**TURNS[1], "weight": 0.5}], "message 2 of 'messages' has weight 0.5, not 0 or 1"),
    "image": ([{"role": "user", "content": [{"type": "image_url"}]}], "content part of type 'image_url'; only text"),
    "broken arguments": (
        [TURNS[0], {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
        "message 2 of 'messages': the arguments of tool call 'f' are not JSON",
    ),
    "unknown sender": ([{"from": "robot", "value": "x"}], "message 1 of 'messages' is from 'robot'; known are human"),
    "text that is not JSON": ("[{", "'messages' is text that is not JSON"),
}


@pytest.mark.parametrize("name", MESSAGE_REASONS)
def test_a_conversation_that_cannot_be_learned_from_says_why(name: str) -> None:
    value, reason = MESSAGE_REASONS[name]
    row = {"messages": value}
    with pytest.raises(RowError) as caught:
        to_example(row, find_format("messages", {}, row, ""), True)
    assert reason in str(caught.value)


PAIR = {"prompt": "a", "completion": "b"}
PAIR_REASONS = {
    "null": ({**PAIR, "completion": None}, "'completion' is null"),
    "empty": ({**PAIR, "completion": ""}, "'completion' is empty"),
    "blank": ({**PAIR, "completion": " \n"}, "'completion' is blank"),
    "number": ({**PAIR, "prompt": 3}, "'prompt' is a number, not a string"),
    "mixed kinds": (
        {**PAIR, "prompt": [TURNS[0]]},
        "'prompt' is a list and 'completion' a string; both must be the same",
    ),
    "missing": ({"prompt": "a"}, "no 'completion'; the row has 'prompt'"),
    "misspelt": ({"prompt": "a", "completions": "b"}, "the nearest to 'completion' is 'completions'"),
    "another format": ({"messages": TURNS}, "it looks like format messages, while this data set is prompt-completion"),
}


@pytest.mark.parametrize("name", PAIR_REASONS)
def test_a_pair_that_cannot_be_learned_from_says_why(name: str) -> None:
    row, reason = PAIR_REASONS[name]
    with pytest.raises(RowError) as caught:
        to_example(row, find_format("prompt-completion", {}, PAIR, ""), True)
    assert reason in str(caught.value)


def test_auto_takes_the_first_format_that_fits_and_says_so() -> None:
    row = {"messages": TURNS, "text": "x", "id": 1}
    form = find_format("auto", {}, row, "")
    assert (form.name, form.why) == ("messages", "the rows have 'messages'; they would fit text too")


def test_columns_are_renamed_and_what_is_misspelt_is_told_with_the_nearest() -> None:
    row = {"question": "a", "answer": "b"}
    form = find_format("auto", {"question": "prompt", "answer": "completion"}, row, "")
    assert to_example(row, form, False) == Pair("a", "b")
    with pytest.raises(
        UserError, match="'qestion', but the columns are 'question', 'answer'; the nearest to 'qestion' is 'question'"
    ):
        find_format("auto", {"qestion": "prompt"}, row, "a.jsonl:1")
    with pytest.raises(UserError, match="'promt', which no format reads; the nearest to 'promt' is 'prompt'"):
        find_format("auto", {"question": "promt"}, row, "a.jsonl:1")
    with pytest.raises(UserError, match=r"a.jsonl:1: no format fits the columns 'question', 'answer'"):
        find_format("auto", {}, row, "a.jsonl:1")
    with pytest.raises(
        UserError, match=r"format text needs the column 'text', but the columns are 'question', 'answer'"
    ):
        find_format("text", {}, row, "a.jsonl:1")


def test_lists_in_csv_cells_are_parsed() -> None:
    row = {"messages": json.dumps(TURNS)}
    example = to_example(row, find_format("auto", {}, row, ""), True)
    assert isinstance(example, Conversation)
    assert example.messages == TURNS


def test_truncation_keeps_the_beginning_and_drops_what_has_no_loss_left() -> None:
    encoded = Encoded(list(range(10)), [2, 4, 6, 10])
    assert fit(encoded, 7, "CAUSAL_LM", 9) == Encoded(list(range(7)), [2, 4, 6, 7])
    assert fit(encoded, 5, "CAUSAL_LM", 9) == Encoded(list(range(5)), [2, 4])
    assert fit(encoded, 2, "CAUSAL_LM", 9) is None
    assert fit(Encoded([5, 6, 7, 1], [8, 9, 1]), 2, "SEQ_2_SEQ_LM", 1) == Encoded([5, 1], [8, 9])


@pytest.mark.parametrize("core", ["byte-level", "trimmed"])
def test_a_template_whose_prompt_ends_in_the_middle_of_a_token_is_split_where_generation_splits_it(core: str) -> None:
    template = (
        "{% for m in messages %}{{ ('question: ' if m.role == 'user' else 'answer: ') + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'answer: ' }}{% endif %}"
    )
    tokenizer = parts.tokenizer_of(parts.byte_level(trim_offsets=core == "trimmed"), template)
    messages = [{"role": "user", "content": "hello world"}, {"role": "assistant", "content": "the capital"}]
    whole = tokenizer.apply_chat_template(messages)["input_ids"]
    seen = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]
    assert whole[: len(seen)] != seen  # the space goes with the word that follows
    encoded = encode(tokenizer, conversation(messages))
    [(start, end)] = spans(encoded)
    assert encoded.ids[:start] == seen
    assert tokenizer.decode(encoded.ids) == "question: hello world\nanswer: the capital\n"
    assert tokenizer.decode(encoded.ids[start:end]) == "the capital\n"
