"""The tokenizer of a Hugging Face folder, as the rest of train/ sees it.

Ids outside the model's vocabulary are refused here, before an embedding is asked for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar


class ModelFolderError(ValueError):
    """A Hugging Face folder that cannot be used as asked."""

    exit_code: ClassVar[int] = 1


class NoModelFolder(ModelFolderError):
    """Something else was named where a Hugging Face folder is needed."""

    exit_code: ClassVar[int] = 2


class FolderTokenizer:
    """The tokenizer of a Hugging Face folder."""

    def __init__(self, tokenizer: Any, folder: Path, *, num_embeddings: int) -> None:
        self._tokenizer = tokenizer
        self._folder = folder
        self.num_embeddings = num_embeddings
        self.eos_id: int | None = self._tokenizer.eos_token_id
        self.bos_id: int | None = self._tokenizer.bos_token_id
        self.pad_id: int | None = self._tokenizer.pad_token_id
        self.vocab_size = len(self._tokenizer)
        self.max_tokens: int = self._tokenizer.model_max_length
        """Where the folder cuts its inputs; huge when it says nothing."""
        self.has_chat_template = bool(self._tokenizer.chat_template)
        self.prefix_ids = self._prefix_ids()
        """Ids that the tokenizer itself puts in front of every text, such as BOS; often none."""

    @property
    def fill_token(self) -> str:
        """What fills up short inputs: padding token, else EOS; ModelFolderError without both."""
        token: str | None = self._tokenizer.pad_token or self._tokenizer.eos_token
        if token is None:
            raise ModelFolderError(
                f"{self._folder}: its tokenizer has no padding and no end-of-sequence token; "
                'name one as "pad_token" in its tokenizer_config.json'
            )
        return token

    @property
    def fill_id(self) -> int:
        """Id of `fill_token`."""
        found: int = self._tokenizer.convert_tokens_to_ids(self.fill_token)
        return found

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of the texts alone, nothing added."""
        return self._encode(texts, add_special_tokens=False)

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone, nothing added."""
        return self.encode_batch([text])[0]

    def encode_inputs(
        self, texts: Sequence[str], *, max_tokens: int | None = None
    ) -> list[tuple[list[int], bool]]:
        """Model inputs as the tokenizer itself makes them, with BOS, CLS ... where it adds any.

        Each with whether its end was cut to fit `max_tokens`.
        """
        inputs = self._encode(texts, add_special_tokens=True)
        long = [
            i for i, ids in enumerate(inputs) if max_tokens is not None and len(ids) > max_tokens
        ]
        # Cut by the tokenizer, so that what it puts at the end stays there.
        cut = self._encode([texts[i] for i in long], truncation=True, max_length=max_tokens)
        found = [(ids, False) for ids in inputs]
        for i, ids in zip(long, cut, strict=True):
            found[i] = (ids, True)
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, special tokens left out."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def chat(self, prompt: str, response: str) -> tuple[str, str]:
        """(what the model reads, what it answers) in the folder's chat template."""
        user = {"role": "user", "content": prompt}
        assistant = {"role": "assistant", "content": response}
        apply = self._tokenizer.apply_chat_template
        try:
            start: str = apply([user], tokenize=False, add_generation_prompt=True)
            whole: str = apply([user, assistant], tokenize=False)
        # A template is a program in a sandbox: it raises what it likes.
        except Exception as error:
            raise ModelFolderError(
                f"{self._folder}: its chat template cannot be applied: {error}; mend "
                "chat_template.jinja, or chat_template in tokenizer_config.json"
            ) from error
        return start, whole.removeprefix(start) if whole.startswith(start) else response

    def context_ids(self) -> list[int]:
        """What stands before the first token of a text when its likelihood is measured.

        What the tokenizer itself puts there, else EOS (documents of a training stream follow one),
        else BOS.
        """
        if self.prefix_ids:
            return self.prefix_ids
        return [id for id in (self.eos_id, self.bos_id) if id is not None][:1]

    def _encode(self, texts: Sequence[str], **options: Any) -> list[list[int]]:
        if not texts:
            return []
        found: list[list[int]] = self._tokenizer(list(texts), verbose=False, **options)["input_ids"]
        largest = max((max(ids) for ids in found if ids), default=0)
        if largest >= self.num_embeddings:
            raise ModelFolderError(
                f"{self._folder}: its tokenizer gives id {largest}, outside the model's vocabulary "
                f"of {self.num_embeddings} ids; tokenizer and model do not belong together, copy "
                "or export the folder again"
            )
        return found

    def _prefix_ids(self) -> list[int]:
        plain, whole = self.encode("a"), self._encode(["a"], add_special_tokens=True)[0]
        for start in range(len(whole)):
            if plain and whole[start : start + len(plain)] == plain:
                return whole[:start]
        return []
