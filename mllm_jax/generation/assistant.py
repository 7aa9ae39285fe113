"""The Assistant: it asks any model; the command line, the chat, evaluations and applications call it."""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterable, Iterator, Sequence
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
from mllm_jax.data.message import TEXT_ROLE, Conversation, Message
from mllm_jax.data.message import conversations as read_conversations
from mllm_jax.data.processing.media import Encoded
from mllm_jax.errors import ConfigError, DataError
from mllm_jax.generation.bulk import outcomes
from mllm_jax.generation.decode_step import steps_of
from mllm_jax.generation.draw import Drawer
from mllm_jax.generation.draws import DRAWERS, Draws
from mllm_jax.generation.embed import Embedder, no_vectors
from mllm_jax.generation.engine import Engine, Request, or_raise
from mllm_jax.generation.media import Media
from mllm_jax.generation.options import Answer, Options, longest_text, read_options
from mllm_jax.generation.produce import Producer, Producing
from mllm_jax.generation.program import Program, bucket
from mllm_jax.generation.quantize import TensorError, quantize
from mllm_jax.generation.rows import in_batches, padded_slots, rows_for
from mllm_jax.generation.sampling import Sampling
from mllm_jax.generation.scores import AnswerScores
from mllm_jax.generation.transcribe import Transcriber
from mllm_jax.generation.transcribes import Transcribes
from mllm_jax.layers.compute import with_compute
from mllm_jax.llms.protocol import LLMConfig
from mllm_jax.models.processor import Processor
from mllm_jax.models.protocol import WritesText, produced
from mllm_jax.models.registry import from_pretrained, pretrained_config
from mllm_jax.models.run_weights import load_run
from mllm_jax.models.whisper import WhisperConfig

BATCH = 8
CHUNK = 4  # tokens of each piece of a stream


class Assistant(Transcribes, Draws, AnswerScores):
    """Answers conversations, many at a time or piece by piece; makes vectors with a dual encoder or a part of it.

    In float32 a conversation gets the same answer alone and in any batch. A sampled answer depends on the seed and on
    the conversation's position in the list.

    Args:
        model, params: from `mllm_jax.from_pretrained`. Without params, `with_params` gives them.
        processor: the model's; None with an embedder.
        mesh: the mesh over which params are sharded, or None.
        max_length: tokens of a prompt and its answer together; for an encoder-decoder, of each. None is the LLM's
            `max_position_embeddings`.
        int8: store the linear kernels as int8; `quantization_errors` then holds the rounding errors.
        by_layer: see `LanguageSteps`; False compiles faster and decodes more slowly, which suits a single question.
        embedder: for a model that makes vectors. None: made from model and processor, unless there is a transcriber
            or a drawer.
        transcriber: for a model that writes down speech.
        drawer: for a model that draws images.
    """

    def __init__(
        self,
        model: nn.Module,
        params: dict | None,
        processor: Processor | None,
        *,
        mesh: Mesh | None = None,
        max_length: int | None = None,
        int8: bool = False,
        by_layer: bool | None = None,
        embedder: Embedder | None = None,
        transcriber: Transcriber | None = None,
        drawer: Drawer | None = None,
    ):
        self.model, self.processor, self.mesh = model, processor, mesh
        self.quantization_errors: list[TensorError] = []
        self.params, self._by_layer, self._embedder, self.max_length = params, by_layer, embedder, None
        self._transcriber, self._drawer = transcriber, drawer
        if processor is not None and writes_text(processor.config):
            self.max_length = longest_text(self.llm, max_length)
            if int8:
                self.params, self.quantization_errors = quantize(self._one_step, params)
        elif int8 or max_length is not None:
            self._require_text()
        elif embedder is None and transcriber is None and drawer is None:
            self._embedder = Embedder.trained(model, params, processor.tokenizer)

    @classmethod
    def load(
        cls, folder_or_run: str | Path, *, mesh: Mesh | None = None, dtype: Any = None, **options: Any
    ) -> Assistant:
        """Loads the model of a folder, or the model that a run has trained so far.

        Args:
            mesh: None: the default device for a folder; for a run its own mesh, if it fits the devices.
            dtype: of the parameters and of the computation; None is the stored dtype.
            options: max_length, int8 and by_layer.

        Raises:
            ConfigError, CheckpointError: see `mllm_jax.from_pretrained`; RunFolderError, TrainingError: see
                `mllm_jax.load_run`.
            DataError: the folder has no tokenizer.
        """
        folder = Path(folder_or_run)
        if is_run(folder):
            experiment, model, params, processor, mesh = load_run(RunFolder(folder), mesh=mesh)
            if dtype is not None:
                dtype = float_dtype(dtype)
                params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
                model = with_compute(experiment.model_of(), dtype=str(dtype)).make()
            return cls(model, params, processor, mesh=mesh, **options)
        # Check the small files before loading weights.
        config = pretrained_config(folder)
        if isinstance(config, WhisperConfig):
            heard = Transcriber.load(folder, dtype=dtype, mesh=mesh)
            return cls(heard.model, heard.params, None, mesh=mesh, transcriber=heard, **options)
        if type(config) in DRAWERS:
            drawer = DRAWERS[type(config)].load(folder, dtype=dtype, mesh=mesh)
            return cls(drawer.model, drawer.params, None, mesh=mesh, drawer=drawer, **options)
        if not writes_text(config):
            embedder = Embedder.load(folder, images=None, texts=None, dtype=dtype, mesh=mesh)
            return cls(embedder.module, embedder.params, None, mesh=mesh, embedder=embedder, **options)
        processor = Processor.from_pretrained(folder)
        model, params = from_pretrained(folder, dtype=dtype, mesh=mesh)
        return cls(model, params, processor, mesh=mesh, **options)

    def with_params(self, params: dict) -> Assistant:
        """Returns the same assistant with other parameters; both share the compiled functions."""
        other = copy.copy(self)
        other.params = params
        if self._embedder is not None:
            other._embedder = self._embedder.with_params(params)
        if self._transcriber is not None:
            other._transcriber = self._transcriber.with_params(params)
        if self._drawer is not None:
            other._drawer = self._drawer.with_params(params)
        if self.processor is not None and writes_text(self.processor.config):
            other._scored, other.program = self._scored, self.program.of(params)
        if self._producer is not None:
            other._producer = self._producer.of(other)
        return other

    @property
    def llm(self) -> Any:
        """The language model's config. Raises ConfigError: the model writes no text."""
        self._require_text()
        return self.processor.config.llm

    @property
    def produces(self) -> tuple[str, ...]:
        """The modalities of media that its answers may hold."""
        return () if self._producer is None else produced(self.processor.config)

    def _require_text(self) -> None:
        if self.processor is None or not writes_text(self.processor.config):
            raise no_text(self.model.config)

    # ---- answers

    def generate(
        self,
        conversation: Conversation | Sequence[Conversation] | Iterator[Conversation],
        *,
        batch_size: int = BATCH,
        **options: Any,
    ) -> Answer | list[Answer] | Iterator[Answer]:
        """Answers a conversation, a list of conversations, or those of an iterator.

        An iterator is read a little ahead (see `mllm_jax.generation.bulk`) and answered by an iterator in its order:
        it may yield more conversations than fit in memory.

        Args:
            conversation: see `mllm_jax.data.message.conversation`; a str is one question or, for a model without a
                chat template, a text to continue. Anything with `__next__` is an iterator of conversations.
            batch_size: conversations that are answered together; where an answer has ended, the next begins.
            options: max_new_tokens=256, temperature=0.0, top_k, top_p, min_p, repetition_penalty, seed, stop (one or
                several texts that end an answer), stop_tokens, num_beams, logprobs, and the other fields of `Options`
                and `Sampling`. For a model that also produces media: produce=("image",), incomplete, drawing and most,
                the fields of `Producing`; `Answer.media` are the media, and "<image 1>" in the text is their place.

        Raises:
            DataError: a conversation cannot be read or is too long; nothing has been computed then. An iterator
                raises it in place of the answer; `bulk.outcomes` continues after it.
            ConfigError: options contradict one another or do not exist, or the model writes no text.
        """
        producing = self._read_producing(options)
        how, sampling = read_options(options)
        if isinstance(conversation, Iterator) and producing is not None:
            return self._producer.each(conversation, how, sampling, producing, batch_size=batch_size)
        if isinstance(conversation, Iterator):
            found = outcomes(self, enumerate(conversation), how, sampling, batch_size=batch_size)
            return (or_raise(outcome) for _, outcome in found)
        given, several = read_conversations(conversation)
        prompts = [self.prompt(each) for each in given]
        answers = self.complete(prompts, how, sampling, producing, batch_size=batch_size)
        return answers if several else answers[0]

    def _read_producing(self, options: dict[str, Any]) -> Producing | None:
        """Takes the options of media out of all options; None for a model that produces none."""
        given = {field.name: options.pop(field.name) for field in fields(Producing) if field.name in options}
        if self._producer is not None:
            return Producing(**given)
        if given:
            name, value = next(iter(given.items()))
            raise ConfigError(f"{name}={value!r} for a model of text alone", "a model with an output branch", "drop it")
        return None

    def stream(self, conversation: Conversation, **options: Any) -> Generator[str | Media, None, Answer]:
        """Yields an answer's text in pieces of whole characters, and each medium at its place; returns the answer.

        The pieces together are `Answer.text`, except for the end of an answer that is cut off within a character, and
        for the marks of media. The arguments and errors are those of `generate`, for one conversation.
        """
        producing = self._read_producing(options)
        how, sampling = read_options(options)
        if how.num_beams > 1:
            raise ConfigError(f"a stream with num_beams={how.num_beams}", "num_beams=1", "use generate")
        given, several = read_conversations(conversation)
        if several:
            raise DataError(f"a stream of {len(given)} conversations", "one", "use generate, or a stream for each")
        prompt = self.prompt(given[0])
        if producing is not None:
            return self._producer.stream(prompt, how, sampling, producing)
        engine = self.engine(1)
        engine.submit(self.asked(prompt, 0, how, sampling))
        return self.streamed(engine)

    def streamed(self, engine: Engine) -> Generator[str, None, Answer]:
        """Yields the pieces of the only request of an engine; returns its answer."""
        done: list[tuple[int, Answer | Exception]] = []
        while not done:
            done = engine.step(CHUNK)
            yield from filter(None, engine.pieces.values())
        return or_raise(done[0][1])

    def prompt(self, messages: Sequence[Message]) -> Encoded:
        """Encodes a conversation as the model reads it before its answer."""
        self._require_text()
        return self.processor.prompt(messages, plain=self._is_plain(messages))

    def _is_plain(self, messages: Sequence[Message]) -> bool:
        """Returns whether a conversation is one text, to be continued as it is."""
        if len(messages) > 1 or messages[0].role not in ("user", TEXT_ROLE):
            return False
        return messages[0].role == TEXT_ROLE or not self.processor.tokenizer.has_template

    def complete(
        self,
        prompts: Sequence[Encoded],
        options: Options = Options(),
        sampling: Sampling = Sampling(),
        producing: Producing | None = None,
        *,
        batch_size: int = BATCH,
    ) -> list[Answer]:
        """Returns the answers to prompts, in their order.

        Args:
            producing: of a model that produces media; None: only their signal tokens are written.
        """
        if producing is not None:
            return self._producer.answers(prompts, options, sampling, producing, batch_size=batch_size)
        options.check(sampling)
        requests = [self.asked(prompt, i, options, sampling) for i, prompt in enumerate(prompts)]
        requests.sort(key=lambda request: request.likeness)
        engine = self.engine(rows_for(len(requests), batch_size))
        found = {r.index: a for r, a in zip(requests, engine.answer(requests), strict=True)}
        return [found[i] for i in range(len(prompts))]

    def room(self, length: int, options: Options = Options()) -> int:
        """Returns the number of tokens that may follow a prompt of `length`: max_new_tokens, or what max_length leaves.

        Raises:
            DataError: max_length leaves no room for an answer.
        """
        if self.max_length is None:
            return options.max_new_tokens
        shared = not self.llm.encoder_decoder
        if length >= self.max_length + (not shared):
            raise DataError(
                f"a prompt of {length} tokens, media included",
                f"at most {self.max_length - shared}, as the model takes {self.max_length}",
                "shorten the prompt or give it fewer images, or raise max_length if the model can read more",
            )
        return min(options.max_new_tokens, self.max_length - length if shared else self.max_length)

    def request(
        self, prompt: Any, length: int, limit: int, index: int, options: Options, sampling: Sampling, media: tuple = ()
    ) -> Request:
        """Makes a request to an engine; see `Request`."""
        own = (*self.llm.eos_token_id, *self.processor.tokenizer.stop_ids)
        stops = tuple(dict.fromkeys(options.stop_tokens + (() if options.ignore_eos else own)))
        return Request(prompt, length, limit, self.processor.decode, index, stops, options, sampling, media)

    def asked(self, prompt: Encoded, index: int, options: Options, sampling: Sampling) -> Request:
        """Makes the request for the answer to a prompt.

        Raises:
            DataError: a prompt has no tokens, has a token that the model lacks, or leaves no room.
        """
        self._require_tokens([prompt])
        length, media = len(prompt.tokens), tuple(sorted(self._slots(prompt).items()))
        return self.request(prompt, length, self.room(length, options), index, options, sampling, media)

    def engine(self, rows: int) -> Engine:
        """Makes an engine that answers `rows` requests at a time. Raises ConfigError: the model writes no text."""
        self._require_text()
        return Engine(self.program, self._batch, rows, self.max_length)

    # ---- vectors

    def embed(self, texts: str | Sequence[str] | None = None, images: Any = None) -> np.ndarray:
        """Returns unit vectors of texts or of images, in one space if the model is a dual encoder.

        Args:
            images: one or a list of what a message's `Image` takes.

        Returns:
            float32[n, d]

        Raises:
            DataError: both or neither are given, a list is empty, a text is too long, or an image cannot be read.
            ConfigError: the model makes no such vectors.
        """
        if self._embedder is None:
            raise no_vectors(self.model.config, "vectors")
        if (texts is None) == (images is None):
            raise DataError(
                "neither texts nor images" if texts is None else "texts and images at once",
                "one of them: one array of both would not show which vectors are which",
                "call embed for each",
            )
        if texts is not None:
            return self._embedder.texts([texts] if isinstance(texts, str) else list(texts))
        one = isinstance(images, (str, bytes)) or not isinstance(images, Iterable) or getattr(images, "ndim", 4) == 3
        return self._embedder.image_vectors([images] if one else list(images))

    # ---- inside

    @cached_property
    def _producer(self) -> Producer | None:
        return Producer(self) if self.processor is not None and produced(self.processor.config) else None

    @cached_property
    def program(self) -> Program:
        """The compiled functions of generation."""
        return Program(self.model, self.params, self.mesh, by_layer=self._by_layer)

    def _one_step(self, params: dict) -> Any:
        ones = jnp.ones((1, 1), jnp.int32)
        batch = dict(tokens=ones, segments=ones, positions=0 * ones, media_index=0 * ones - 1)
        return steps_of(self.model, by_layer=False).prefill(params, batch, 2)

    def _require_tokens(self, prompts: Sequence[Encoded]) -> None:
        """Raises DataError: a prompt has no tokens, or a token that the model lacks."""
        size = self.llm.vocab_size
        for prompt in prompts:
            words = prompt.tokens[prompt.row.owners < 0]  # ids at positions of media are not read
            if not len(prompt.tokens):
                raise DataError("an empty prompt", "at least one token", "give it a text")
            if strange := sorted({int(i) for i in words if not 0 <= i < size}):
                raise DataError(
                    f"a prompt with the token {strange[0]}",
                    f"tokens from 0 to {size - 1}",
                    "take the tokenizer that belongs to the model",
                )

    def _slots(self, encoded: Encoded) -> dict[str, int]:
        return padded_slots(encoded.slots, self.processor.config)

    def batches(
        self, encoded: Sequence[Encoded], batch_size: int, *, learnt: bool = False
    ) -> Iterator[tuple[list[int], dict[str, np.ndarray]]]:
        """Yields batches of examples of similar lengths and with equal media: the examples' indices, and the arrays.

        Args:
            learnt: whether the arrays have the loss weights too.
        """
        for chunk, rows in in_batches([(self._slots(each), each.length) for each in encoded], batch_size):
            length = bucket(max(len(encoded[i].tokens) for i in chunk), self.max_length)
            yield chunk, self._batch([encoded[i] for i in chunk], rows, length, learnt)

    def _batch(self, encoded: Sequence[Encoded], rows: int, length: int, learnt: bool = False) -> dict[str, np.ndarray]:
        """Collates examples with equal slots, padded to `length` and to `rows` rows."""
        batch = self.processor.batch(encoded, self._slots(encoded[0]), length, learnt=learnt)
        spec, more = self.processor.declared(batch), rows - len(encoded)
        batch = {name: np.concatenate([array, spec[name].empty(more)]) for name, array in batch.items()}
        batch["segments"][len(encoded) :, 0] = 1  # a row without a prompt still reads one token
        if learnt and self.llm.encoder_decoder:
            width = batch["decoder_tokens"].shape[1]
            for name in self.processor.config.target_spec(1, 1).keys() & batch.keys():
                batch[name] = np.pad(batch[name], [(0, 0), (0, bucket(width) - width)])
        return batch


def writes_text(config: Any) -> bool:
    """Returns whether the model of a config generates text."""
    return isinstance(config, (LLMConfig, WritesText))


def no_text(config: Any) -> ConfigError:
    """Returns the error for a model that generates no text."""
    name = config.family or type(config).__name__.removesuffix("Config")
    return ConfigError(
        f"a {name}, asked for text",
        "a model that generates text: a language model, or one with images, such as LLaVA",
        "name another; `embed` makes vectors with a dual encoder or one of its encoders",
    )
