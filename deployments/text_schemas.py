"""Request bodies of text generation: OpenAI's completions and chat completions, with what vLLM and Fettle add.

What OpenAI documents as harmless is taken and has no effect (`user`, `store`, ...); what would change the answer and is
not done here is refused. What a field has to do with another is `deployments.text_calls`'s.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, JsonValue, StringConstraints

from deployments.schemas import Body, Explained, IdLists, Ids

MOST_CHOICES = 128
MOST_TOP_LOGPROBS = 20
MOST_STOPS, MOST_STOP_CHARACTERS = 16, 32_768
MOST_STOP_IDS = 256
MOST_BIASES = 1024
MOST_MESSAGES = 4096
MOST_TOOLS = 128
MOST_GUIDED_CHOICES = 1024
LONGEST_PATTERN = 10_000
SEED_BOUND = 2**63

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
# As JSON; its own rules are the grammar's to check.
Schema = dict[str, JsonValue]


class StreamOptions(Body):
    """`include_obfuscation` has no effect: nothing is padded."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class JsonSchema(Body):
    name: Name
    description: str | None = None
    schema_: Schema | None = Field(default=None, alias="schema")
    strict: bool | None = Field(default=None, description="no effect: a schema is always kept")


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class EarlyStopRequest(Body):
    """When a generation may end before the model ends it: the client's own thresholds, which nothing certifies."""

    end_probability: float | None = Field(
        default=None, gt=0, le=1, description="ends where the model gave ending at least this probability"
    )
    answer_confidence: float | None = Field(
        default=None, gt=0, le=1, description="ends after an answer whose tokens' probabilities multiply to this"
    )
    answer_pattern: Annotated[str, StringConstraints(min_length=1, max_length=500)] | None = Field(
        default=None, description="a regular expression that finds the answer: its first group, else all of it"
    )
    reasoning_budget: int | None = Field(
        default=None, ge=0, description="tokens of reasoning, after which it is closed and the answer begins"
    )


class GenerateRequest(Explained):
    """What completions and chats have in common. None is the default everywhere, as with OpenAI."""

    model_config = ConfigDict(allow_inf_nan=False)

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(default=None, ge=1, le=MOST_CHOICES)
    max_tokens: int | None = Field(default=None, ge=0, le=2**31 - 1)
    min_tokens: int | None = Field(default=None, ge=0, le=2**31 - 1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, le=2**31 - 1, description="-1 and 0: no limit")
    min_p: float | None = Field(default=None, ge=0, le=1)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, gt=0, le=100)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        default=None, max_length=MOST_BIASES, description="by token id"
    )
    seed: int | None = Field(default=None, ge=-SEED_BOUND, lt=SEED_BOUND)
    stop: str | list[str] | None = None
    stop_token_ids: list[Annotated[int, Field(ge=0, le=2**31 - 1)]] | None = Field(
        default=None, max_length=MOST_STOP_IDS
    )
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    response_format: ResponseFormat | None = None
    guided_json: str | Schema | None = None
    guided_regex: Annotated[str, StringConstraints(min_length=1, max_length=LONGEST_PATTERN)] | None = None
    guided_choice: (
        Annotated[
            list[Annotated[str, StringConstraints(min_length=1)]], Field(min_length=1, max_length=MOST_GUIDED_CHOICES)
        ]
        | None
    ) = None
    early_stop: EarlyStopRequest | None = None
    answers: Literal["all", "vote"] | None = Field(
        default=None, description="`vote`: one choice, the answer that most of the n agree on"
    )
    user: str | None = None


class CompletionRequest(GenerateRequest):
    """OpenAI's `POST /v1/completions`."""

    prompt: str | Annotated[list[str], Field(min_length=1)] | Ids | IdLists
    best_of: int | None = Field(default=None, ge=1, le=MOST_CHOICES)
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=MOST_TOP_LOGPROBS)
    suffix: None = None
    add_special_tokens: bool | None = Field(default=None, description="true by default: a text's first token, if any")


class TextPart(Body):
    type: Literal["text"]
    text: str


class RefusalPart(Body):
    type: Literal["refusal"]
    refusal: str


class CalledFunction(Body):
    name: str
    arguments: str = Field(description="as JSON")


class ToolCall(Body):
    """A call that the model made earlier in the conversation."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class ChatMessage(Body):
    """One message. Fields that only replies have are taken as well, so that a reply can be sent back as it came."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart | RefusalPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    annotations: list[JsonValue] | None = None
    audio: None = None
    function_call: None = None


class FunctionDefinition(Body):
    name: Name
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: FunctionDefinition


class ChosenFunction(Body):
    name: Name


class ToolChoice(Body):
    type: Literal["function"]
    function: ChosenFunction


class Conversation(Body):
    """What a chat template makes a prompt of, in a chat completion and for `/tokenize`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MOST_MESSAGES)]
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS)] | None = None
    documents: list[dict[str, JsonValue]] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, JsonValue] | None = Field(
        default=None, description="what else the template reads, such as `enable_thinking`"
    )


class ChatRequest(GenerateRequest, Conversation):
    """OpenAI's `POST /v1/chat/completions`."""

    max_completion_tokens: int | None = Field(default=None, ge=0, le=2**31 - 1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MOST_TOP_LOGPROBS)
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = Field(default=None, description="told to the template, which may read it")
    modalities: list[Literal["text"]] | None = None
    store: bool | None = None
    metadata: dict[str, JsonValue] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None


# What is said about a field whose value is wrong, where pydantic's own words would be about its inner types.
REMEDIES = {
    "prompt": "must be a text, a list of texts, token ids, or a list of such; lists must not be empty",
    "suffix": "is not supported; write what follows into the prompt as the model's own format has it",
    "stop": "must be a text or a list of texts",
    "logit_bias": f"must map token ids to numbers from -100 to 100, at most {MOST_BIASES} of them",
    "guided_json": "must be a JSON schema, as an object or as text",
    "tool_choice": "must be `none`, `auto`, `required` or the function to call",
    "messages.content": "must be a text or a list of parts of type `text`; this model reads nothing else",
    "messages.audio": "is not supported; this model reads text only",
    "messages.function_call": "is not supported; send `tool_calls`",
}
