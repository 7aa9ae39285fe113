"""The languages of Whisper: their codes, English names, and which of them have no spaces between words."""

from __future__ import annotations

from mllm_jax.errors import ConfigError

WITHOUT_SPACES = ("zh", "ja", "th", "lo", "my", "yue")


def language_code(language: str) -> str:
    """Returns the code of a language, such as "de", from its code or its English name.

    Raises:
        ConfigError: there is no such language.
    """
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    given = language.strip().lower().removeprefix("<|").removesuffix("|>")
    code = TO_LANGUAGE_CODE.get(given, given)
    if code not in TO_LANGUAGE_CODE.values():
        raise ConfigError(
            f"the language {language!r:.60}",
            "an English name such as german, or a code such as de",
            "correct it, or leave it out: then it is detected",
        )
    return code
