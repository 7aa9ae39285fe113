"""The Assistant: what asks a model, whatever it reads; command line, chat, evaluation and applications call it."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from mllm_jax.checkpoints.hf import float_dtype
from mllm_jax.checkpoints.run import RunFolder, is_run
from mllm_jax.data.message import Conversation, Example, Message, conversations
from mllm_jax.data.processing.media import Encoded
from mllm_jax.errors import ConfigError, DataError
from mllm_jax.generation.decode_step import steps_of
from mllm_jax.generation.engine import Engine, bucket
from mllm_jax.generation.options import Answer, Options, longest_text
from mllm_jax.generation.quantize import TensorError, quantize
from mllm_jax.generation.sampling import Sampling
from mllm_jax.generation.streaming import Answers, Request
from mllm_jax.models.processor import Processor
from mllm_jax.models.registry import from_pretrained
from mllm_jax.models.run_weights import load_run
from mllm_jax.sharding.hosts import fetch

BATCH = 8


class Assistant:
    """Answers conversations, many at a time or piece by piece.

    In float32 a conversation gets the same answer alone and in any company. A sampled answer is drawn by the seed and
    the conversation's place in the list.

    Args:
        model, params: as `mllm_jax.from_pretrained` gives them.
        processor: the model's.
        mesh: what params are sharded over, if over anything.
        max_length: tokens of a prompt and its answer together, of either for an encoder-decoder; None is the LLM's own
            `max_position_embeddings`.
        int8: store the linear kernels as int8; `quantization_errors` then says what that cost.
        by_layer: see `LanguageSteps`; False compiles faster and decodes more slowly, which suits a single question.
    """

    def __init__(
        self,
        model: nn.Module,
        params: dict,
        processor: Processor,
        *,
        mesh: Mesh | None = None,
        max_length: int | None = None,
        int8: bool = False,
        by_layer: bool | None = None,
    ):
        _require_words(processor.config, type(model).__name__)
        self.model, self.processor, self.mesh = model, processor, mesh
        self.llm = processor.config.llm
        self.max_length = longest_text(self.llm, max_length)
        self.quantization_errors: list[TensorError] = []
        if int8:
            params, self.quantization_errors = quantize(self._one_step, params)
        self.params = params
        self._by_layer = by_layer

    @classmethod
    def load(
        cls, folder_or_run: str | Path, *, mesh: Mesh | None = None, dtype: Any = None, **options: Any
    ) -> Assistant:
        """The assistant of the model in a folder, or of the one that a run has trained so far.

        Args:
            mesh: None: of a folder the default device, of a run the run's own where it fits the devices.
            dtype: of the parameters and of the computation; None is what is stored.
            options: max_length, int8 and by_layer.

        Raises:
            ConfigError, CheckpointError: see `mllm_jax.from_pretrained`; RunFolderError, TrainingError: see
                `mllm_jax.load_run`.
            DataError: no tokenizer.
        """
        folder = Path(folder_or_run)
        if is_run(folder):
            _require_words(RunFolder(folder).experiment().model, folder)
            experiment, model, params, processor, mesh = load_run(RunFolder(folder), mesh=mesh)
            if dtype is not None:
                dtype = float_dtype(dtype)
                params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
                model = experiment.model.with_dtype(str(dtype)).make()
            return cls(model, params, processor, mesh=mesh, **options)
        processor = Processor.from_pretrained(folder)  # first: what is missing should not have to wait for the weights
        _require_words(processor.config, folder)
        model, params = from_pretrained(folder, dtype=dtype, mesh=mesh)
        return cls(model, params, processor, mesh=mesh, **options)

    # ---- answers

    def generate(
        self, conversation: Conversation | Sequence[Conversation], *, batch_size: int = BATCH, **options: Any
    ) -> Answer | list[Answer]:
        """Answers a conversation, or each of a list of them.

        Args:
            conversation: see `mllm_jax.data.message.conversation`; a str is one question or, for a model without a
                chat template, a text to go on with.
            batch_size: conversations that are answered together.
            options: max_new_tokens=256, temperature=0.0, top_k, top_p, min_p, repetition_penalty, seed, stop (a text,
                or several, that end an answer), stop_tokens, num_beams, logprobs, and what else `Options` and
                `Sampling` have.

        Raises:
            DataError: a conversation that cannot be read or is too long; nothing has been computed then.
            ConfigError: options that contradict one another, or that there are not.
        """
        given, several = conversations(conversation)
        answers = self.complete([self.prompt(each) for each in given], *read_options(options), batch_size=batch_size)
        return answers if several else answers[0]

    def stream(self, conversation: Conversation, **options: Any) -> Generator[str, None, Answer]:
        """Yields an answer's text piece by piece, whole characters only, and returns the answer.

        The pieces together are `Answer.text`, but for the end of an answer that is cut off within a character.
        """
        how, sampling = read_options(options)
        if how.num_beams > 1:
            raise ConfigError(f"a stream with num_beams={how.num_beams}", "num_beams=1", "use generate")
        [messages], _ = conversations(conversation)
        return self._stream(self.prompt(messages), how, sampling)

    def _stream(self, prompt: Encoded, how: Options, sampling: Sampling) -> Generator[str, None, Answer]:
        request = self.request([self.room(len(prompt.tokens), how)], [0], how, sampling)
        pieces = self._answers.stream(self._batch([prompt], 1), request)
        while True:
            try:
                piece = next(pieces)[0]
            except StopIteration as end:
                return end.value[0]
            if piece:
                yield piece

    def prompt(self, messages: Sequence[Message]) -> Encoded:
        """A conversation as the model reads it before its answer."""
        if self.processor.tokenizer.has_template or len(messages) > 1 or messages[0].role != "user":
            return self.processor.prompt(messages)
        return self.processor.prompt(messages, plain=True)

    def complete(
        self,
        prompts: Sequence[Encoded],
        options: Options = Options(),
        sampling: Sampling = Sampling(),
        *,
        batch_size: int = BATCH,
    ) -> list[Answer]:
        """The answers to prompts, in their order."""
        options.check(sampling)
        limits = [self.room(len(prompt.tokens), options) for prompt in prompts]
        # Prompts with like media and of like lengths go together, so that shapes repeat.
        order = sorted(range(len(prompts)), key=lambda i: (prompts[i].slots, len(prompts[i].tokens)))
        out: dict[int, Answer] = {}
        while order:
            slots = prompts[order[0]].slots
            chunk = [i for i in order[:batch_size] if prompts[i].slots == slots]
            order = order[len(chunk) :]
            rows = min(batch_size, 1 << (len(chunk) - 1).bit_length())
            request = self.request([limits[i] for i in chunk], chunk, options, sampling)
            batch = self._batch([prompts[i] for i in chunk], rows)
            out |= zip(chunk, self._answers.complete(batch, request), strict=True)
        return [out[i] for i in range(len(prompts))]

    def room(self, length: int, options: Options = Options()) -> int:
        """How many tokens may follow a prompt of `length`: max_new_tokens, or fewer where max_length is nearer.

        Raises:
            DataError: the prompt leaves no room.
        """
        if self.max_length is None:
            return options.max_new_tokens
        shared = not self.llm.encoder_decoder
        if length >= self.max_length + (not shared):
            raise DataError(
                f"a prompt of {length} tokens, media included",
                f"at most {self.max_length - shared}, as the model takes {self.max_length}",
                "shorten the prompt or give it fewer pictures, or raise max_length if the model can read more",
            )
        return min(options.max_new_tokens, self.max_length - length if shared else self.max_length)

    # ---- probabilities

    def score(
        self, conversation: Sequence[Conversation], answers: Sequence[str], *, batch_size: int = BATCH
    ) -> list[np.ndarray]:
        """The natural log of the probability of each token of answers that are given.

        Returns:
            Of each conversation float32[n]: the tokens of its answer, and what ends it.

        Raises:
            DataError: another number of answers, or an example that cannot be laid out.
        """
        given, _ = conversations(list(conversation))
        if len(given) != len(answers):
            raise DataError(f"{len(given)} conversations, {len(answers)} answers", "one for each", "give as many")
        longest = self.max_length or 1 << 20
        examples = [Example((*each, Message("assistant", said))) for each, said in zip(given, answers, strict=True)]
        encoded = [self.processor.encode(example, longest) for example in examples]
        order = sorted(range(len(encoded)), key=lambda i: (encoded[i].slots, encoded[i].length))
        out: dict[int, np.ndarray] = {}
        while order:
            slots = encoded[order[0]].slots
            chunk = [i for i in order[:batch_size] if encoded[i].slots == slots]
            order = order[len(chunk) :]
            length = bucket(max(len(encoded[i].tokens) for i in chunk))
            batch = self.processor.batch([encoded[i] for i in chunk], length=length, learnt=True)
            learnt = batch.pop("loss_weights") > 0
            scores = fetch(self._scored(self.params, {n: self._place(x) for n, x in batch.items()}))
            out |= {i: scores[row][learnt[row]] for row, i in enumerate(chunk)}
        return [out[i] for i in range(len(encoded))]

    @cached_property
    def _scored(self):
        """Compiled: (params, batch) -> float32[B, T], the log probability of each token after those before it."""
        targets = "decoder_tokens" if self.llm.encoder_decoder else "tokens"
        steps = steps_of(self.model, by_layer=False)

        def scored(params, batch):
            logits = steps.logits(params, batch)[:, :-1].astype(jnp.float32)
            chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), batch[targets][:, 1:, None], axis=-1)[..., 0]
            return jnp.pad(chosen, [(0, 0), (1, 0)])

        return jax.jit(scored)

    # ---- inside

    @cached_property
    def _answers(self) -> Answers:
        return Answers(Engine(self.model, self.params, self.mesh, by_layer=self._by_layer))

    def _one_step(self, params: dict) -> Any:
        ones = jnp.ones((1, 1), jnp.int32)
        batch = dict(tokens=ones, segments=ones, positions=0 * ones, media_index=0 * ones - 1)
        return steps_of(self.model, by_layer=False).prefill(params, batch, 1)

    def request(self, limits: list[int], indices: list[int], options: Options, sampling: Sampling) -> Request:
        """What is asked of a batch: see `Request`."""
        own = (*self.llm.eos_token_id, *self.processor.tokenizer.stop_ids)
        stops = options.stop_tokens + (() if options.ignore_eos else own)
        stops = tuple(dict.fromkeys(stops))
        return Request(limits, indices, stops, self.processor.decode, sampling, options)

    def _batch(self, prompts: Sequence[Encoded], rows: int) -> dict[str, jax.Array]:
        """The prompts on the devices, padded to a bucket and to so many rows."""
        longest = max(len(prompt.tokens) for prompt in prompts)
        length = bucket(longest) if self.max_length is None else min(bucket(longest), max(self.max_length, longest))
        batch = self.processor.batch(prompts, length=length)
        padded = {n: np.pad(x, [(0, rows - len(prompts))] + [(0, 0)] * (x.ndim - 1)) for n, x in batch.items()}
        padded["segments"][len(prompts) :, 0] = 1  # a row without a prompt still has something to read
        return {name: self._place(array) for name, array in padded.items()}

    def _place(self, array: np.ndarray) -> jax.Array:
        return self._answers.engine.place(array)


def _require_words(config: Any, what: Any) -> None:
    """Refuses a model that writes no text."""
    if config.llm is None:
        raise ConfigError(
            f"{what}, a {config.family or type(config).__name__.removesuffix('Config')}",
            "a model that generates text",
            "name another; `mllm embed` compares images and texts with this one",
        )


def read_options(given: Mapping[str, Any]) -> tuple[Options, Sampling]:
    """Sorts options by name; `stop` is one text or several.

    Raises:
        ConfigError: a name that neither has, or a value that is refused.
    """
    given = dict(given)
    if (stop := given.pop("stop", None)) is not None:
        given["stop_strings"] = (stop,) if isinstance(stop, str) else tuple(stop)
    if "stop_tokens" in given:
        given["stop_tokens"] = tuple(given["stop_tokens"])
    names = {kind: {field.name for field in fields(kind)} for kind in (Options, Sampling)}
    if unknown := sorted(given.keys() - names[Options] - names[Sampling]):
        known = sorted(names[Options] | names[Sampling] | {"stop"} - {"stop_strings"})
        raise ConfigError(f"generation with {', '.join(unknown)}", f"some of {', '.join(known)}", "correct the name")
    options, sampling = (kind(**{n: given[n] for n in given if n in names[kind]}) for kind in (Options, Sampling))
    return options, sampling
