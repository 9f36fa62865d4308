"""The names that data sets in use give to roles, to what is trained, to thoughts, calls and tools."""

from collections.abc import Mapping

ROLES = ("system", "user", "assistant", "tool")
FUNCTION_CALL = "function_call"  # ShareGPT's speaker whose text is a call as JSON
# OpenAI, ShareGPT and its dumps, Gemini, Cohere, Llama 3 (ipython), Open Assistant; in any case.
ROLE_NAMES: dict[str, str] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatbot", "ai"), "assistant"),
    **dict.fromkeys(("chatgpt", "bing", "bard"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "ipython"), "tool"),
    **dict.fromkeys((FUNCTION_CALL, "tool_call"), FUNCTION_CALL),
}
# Of a message: true or 1 means trained. Axolotl, OpenAI, ms-swift, slime, veRL, OpenChat.
TRAINED = (
    *("train", "training", "trainable", "train_on_turn", "weight", "loss"),
    *("loss_mask", "loss_weight", "loss_scale", "compute_loss", "sample_weight"),
)
UNTRAINED = ("masked", "is_masked", "ignore_loss", "mask_loss")  # true or 1 means not trained
# What these say differs from tool to tool, or is more than whole messages.
UNCLEAR = ("mask", "train_detail", "training_detail", "train_spans")
# Of a record, beside those: what else says that more or less than all answers is trained.
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
FUNCTIONS = ("name", "tool_name", "function_name", "tool")  # what a call calls its function's name


def role_of(speaker: object, roles: Mapping[str, str]) -> str | None:
    """The role that a name stands for, or None.

    Args:
        roles: `dataset.roles`, which go before the names in use.
    """
    if not isinstance(speaker, str):
        return None
    return roles.get(speaker) or ROLE_NAMES.get(speaker.casefold())
