"""The marks that models write before, inside and after their tool calls."""

from __future__ import annotations

from packllm.chat.characters import Words

WRAPPERS = {
    "<tool_call>": "</tool_call>",
    "<tool_calls>": "</tool_calls>",
    "<tool_call:opensource>": "</tool_call:opensource>",
    "<tool_calls:opensource>": "</tool_calls:opensource>",
    "<seed:tool_call>": "</seed:tool_call>",
    "<minimax:tool_call>": "</minimax:tool_call>",
    "<function_calls>": "</function_calls>",
    "<atem:function_calls>": "</atem:function_calls>",
    "<｜DSML｜tool_calls>": "</｜DSML｜tool_calls>",
    "<｜DSML｜function_calls>": "</｜DSML｜function_calls>",
    "<TOOLCALL>": "</TOOLCALL>",
    "<|tool_call_start|>": "<|tool_call_end|>",
    "<|tools_prefix|>": "<|tools_suffix|>",
    "<|START_ACTION|>": "<|END_ACTION|>",
    "<｜tool▁calls▁begin｜>": "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>": "<｜tool▁call▁end｜>",
    "<|tool_calls_section_begin|>": "<|tool_calls_section_end|>",
    "<|tool_call_begin|>": "<|tool_call_end|>",
    "<|tool_call:begin|>": "<|tool_call:end|>",
    "<|tool_calls|>": "<|calls|>",
    "<|python_tag|>": "<|eom_id|>",
    "<|tool_call|>": "",
    "<|function_call|>": "",
    "[TOOL_CALLS]": "",
}
"""Marks before and after calls."""
XML = {
    "<function=": "</function>",
    '<invoke name="': "</invoke>",
    '<atem:invoke name="': "</atem:invoke>",
    '<｜DSML｜invoke name="': "</｜DSML｜invoke>",
}
"""Marks before and after a call in XML; the name follows the first."""
NAME_FOLLOWS = ("<｜tool▁sep｜>", "<|tool_call:name|>")
ARGUMENTS_FOLLOW = (
    "[ARGS]",
    "<｜tool▁sep｜>",
    "<|tool_call_argument_begin|>",
    "<|tool_call:args|>",
    "<tool_sep:opensource>",
)
TAGGED = ("<arg_key>", "<arg_key:opensource>")

CALL_MARKS = frozenset({*WRAPPERS, *WRAPPERS.values(), *XML, *NAME_FOLLOWS, *ARGUMENTS_FOLLOW, "[CALL_ID]"} - {""})
"""All marks of calls. If they are control tokens, an answer's text must include them, so that calls can be parsed."""

OPENING = Words([*WRAPPERS, *XML])
CLOSING = Words({*WRAPPERS.values(), "</function>"} - {""})
ENDS_XML = Words({*XML.values(), *CLOSING.whole})
AFTER_NAME = Words({*CLOSING.whole, *NAME_FOLLOWS, *ARGUMENTS_FOLLOW, *TAGGED, "[CALL_ID]"})
FENCE = Words(["```"])
