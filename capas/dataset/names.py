"""List the names in use for roles, training flags, thoughts, calls and tools in data sets."""

from collections.abc import Mapping

ROLES = ("system", "user", "assistant", "tool")
FUNCTION_CALL = "function_call"  # a speaker in ShareGPT whose text is a call as JSON
# OpenAI, ShareGPT and its dumps, Gemini, Cohere, Llama 3 (ipython), Open Assistant; in upper or lower case.
ROLE_NAMES: dict[str, str] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatbot", "ai"), "assistant"),
    **dict.fromkeys(("chatgpt", "bing", "bard"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "ipython"), "tool"),
    **dict.fromkeys((FUNCTION_CALL, "tool_call"), FUNCTION_CALL),
}
# Keys of a message: true or 1 means trained. Axolotl, OpenAI, ms-swift, slime, veRL, OpenChat.
TRAINED = (
    *("train", "training", "trainable", "train_on_turn", "weight", "loss"),
    *("loss_mask", "loss_weight", "loss_scale", "compute_loss", "sample_weight"),
)
UNTRAINED = ("masked", "is_masked", "ignore_loss", "mask_loss")  # true or 1 means not trained
# The meaning of these keys differs between tools, or they select parts of messages.
UNCLEAR = ("mask", "train_detail", "training_detail", "train_spans")
# Further keys of a record: they extend or restrict training to more or less than all answers.
PROMPT_TRAINED = ("train_on_inputs", "train_on_input", "train_on_prompt")
PARTLY_TRAINED = ("mask_history",)
# DeepSeek and Qwen, gpt-oss and Ollama, OpenRouter.
THOUGHTS = (
    *("reasoning_content", "thinking", "reasoning", "thought", "thoughts"),
    *("thinking_content", "reasoning_details", "chain_of_thought"),
)
CALLS = ("tool_calls", "function_call", "function_calls", "tool_call", "toolCalls")
TOOLS = ("tools", "functions", "available_tools")
SYSTEM_PROMPTS = ("system", "system_prompt")
ARGUMENTS = (
    *("arguments", "parameters", "args", "input", "kwargs", "params"),
    *("tool_input", "tool_args", "tool_arguments"),
)
FUNCTIONS = ("name", "tool_name", "function_name", "tool")  # keys for the name of a call's function


def role_of(speaker: object, roles: Mapping[str, str]) -> str | None:
    """Return the role that a speaker's name stands for, or None.

    Args:
        roles: `dataset.roles`, which take precedence over the names in use.
    """
    if not isinstance(speaker, str):
        return None
    return roles.get(speaker) or ROLE_NAMES.get(speaker.casefold())
