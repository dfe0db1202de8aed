"""How the released demo keeps a conversation: one string, stripped and encoded again every turn; for parity only."""

from collections.abc import Iterable

from duologue.released.text import RELEASED_TEMPLATE
from duologue.turns import Role
from duologue.vocabulary import BEGIN_OF_AUDIO, END_OF_AUDIO, ROLE_TOKENS, ChatTemplate, Vocabulary


def user_string(user: str | Iterable[int]) -> str:
    """What a user's turn is in the string: text as it stands, markers in it included; speech codes by name."""
    if isinstance(user, str):
        return user
    return BEGIN_OF_AUDIO + "".join(f"<|audio_{code}|>" for code in user) + END_OF_AUDIO


def released_prompt(
    user: str | Iterable[int], previous: str = "", completion: str = "", template: ChatTemplate = RELEASED_TEMPLATE
) -> str:
    """The string that the released demo would send, faults included (docs/checkpoints.md 2.1; for parity only).

    Text of the user is not escaped: markers in it act. The joined history loses whitespace at both ends.

    Args:
        user: the text, or speech codes.
        previous: the prompt of the turn before, empty at first; completion: what was answered to it.
    """
    prompt = (previous + completion).strip()
    if ROLE_TOKENS[Role.SYSTEM] not in prompt:
        instruction = template.text_instruction if isinstance(user, str) else template.speech_instruction
        prompt += ROLE_TOKENS[Role.SYSTEM] + template.role_break + instruction
    prompt += ROLE_TOKENS[Role.USER] + template.role_break + user_string(user)
    return prompt + ROLE_TOKENS[Role.ASSISTANT] + template.reply_marker


def released_ids(vocabulary: Vocabulary, prompt: str) -> list[int]:
    """Ids of a prompt string with its prefix, markers in it taken as the tokens they name."""
    return list(vocabulary.tokenizer.encode(prompt, add_special_tokens=True).ids)
