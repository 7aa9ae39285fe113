"""`mllm generate`: answers one question or many; for a model that draws, see draw.py."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from mllm_jax.checkpoints.run import is_run
from mllm_jax.cli.caches import keep_compiled_programs
from mllm_jax.cli.media import MediaOptions, saved, with_paths
from mllm_jax.cli.progress import Count
from mllm_jax.cli.runs import assistant_of
from mllm_jax.cli.timing import Timing
from mllm_jax.data.audio import audio_length
from mllm_jax.data.images import read_image
from mllm_jax.data.message import Audio, Image, Message, Part, Text, Video
from mllm_jax.data.video import video_header
from mllm_jax.errors import ConfigError, MllmError
from mllm_jax.generation.options import Answer, Options
from mllm_jax.generation.sampling import Sampling

if TYPE_CHECKING:
    from mllm_jax.generation.answers_file import AnswersFile
    from mllm_jax.generation.prompts import Prompt, Prompts

BATCH = 8
# options without a value
FLAGS = ("--stats", "--no-stats", "--use-audio-in-video", "--no-use-audio-in-video")
MEDIA = ("--image", "--video", "--audio")  # options of several values


@dataclass(frozen=True)
class Generate:
    """Answers a question, about media if any are given; with --prompts, writes many answers into a file.

    A model that draws, such as a Stable Diffusion, draws the prompt; `mllm generate MODEL --help` lists its options.

    Attributes:
        run: a folder that `mllm train` made, or a model's folder, from Hugging Face or `mllm convert`.
        question: the question.
        image: image files, in the order in which the question mentions them; several may follow one --image.
        video: video files, after the images; several may follow one --video.
        audio: sound files, after images and videos; several may follow one --audio.
        frames: number of frames of each video; default: the model's choice.
        use_audio_in_video: the model also hears the videos' sound, in time with the frames.
        prompts: a .jsonl file of conversations, one a line: a text, a list of messages, {"messages": [...]} or
            {"prompt": "...", "image": "a.png" or ["a.png", "b.png"]}, with an "id" or without; or a folder of images:
            the question is asked about each.
        out: the .jsonl file for the answers to --prompts; if it exists, the same command continues it. For a question:
            folder for media that the model produces; default: the current one.
        media: the folder of the media that a file of prompts names; default: the file's own folder.
        batch_size: number of prompts that are answered together.
        max_new_tokens: maximum number of tokens of an answer.
        stats: also print the time of loading, compiling and answering.
    """

    run: tyro.conf.Positional[Path]
    question: tyro.conf.Positional[str] = ""
    image: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    video: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    audio: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    frames: int | None = None
    use_audio_in_video: bool = False
    prompts: Path | None = None
    out: Path | None = None
    media: Path | None = None
    batch_size: int = BATCH
    max_new_tokens: int = Options.max_new_tokens
    stats: bool = False
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = Sampling()
    making: Annotated[MediaOptions, tyro.conf.arg(name="")] = MediaOptions()

    def __post_init__(self):
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                option = f"--{name.replace('_', '-')}"
                raise ConfigError(f"{name} {getattr(self, name)}", "at least 1", f"change {option}")
        if self.use_audio_in_video and not self.video:
            raise ConfigError("--use-audio-in-video without a video", "it with --video FILE", "name one, or drop it")
        if self.prompts is None:
            self._check_question()
        else:
            self._check_prompts(self.prompts)

    def _check_question(self) -> None:
        given = ["--media"] if self.media is not None else []
        given += ["--batch-size"] if self.batch_size != BATCH else []
        if given:
            raise ConfigError(f"{', '.join(given)} without --prompts", "--prompts FILE or DIR", "name them, or drop it")
        for path in self.image:
            if path.is_dir():
                typed = f'mllm generate {self.run} "{self.question or "question"}" --prompts {path} --out answers.jsonl'
                raise ConfigError(
                    f"--image {path}, a folder", "image files", f"to ask about each of its images: {typed}"
                )
        if self.frames is not None and (self.frames < 1 or not self.video):
            raise ConfigError(f"--frames {self.frames}", "at least 1, with --video FILE", "change or drop it")
        if not self.question:
            raise ConfigError(f"mllm generate {self.run} without a question", "what to ask", "add it, in quotes")
        if (self.image or self.video or self.audio) and os.path.isfile(self.question):
            raise ConfigError(f"the file {self.question} as the question", "what to ask", "add it, in quotes")

    def _check_prompts(self, prompts: Path) -> None:
        if self.out is None:
            raise ConfigError(f"--prompts {prompts} without --out", "a file for the answers", "add --out answers.jsonl")
        if self.making != MediaOptions():
            raise ConfigError("options of media with --prompts", "answers in text", "ask one question, or drop them")
        for name in ("image", "video", "audio", "frames"):
            if getattr(self, name):
                raise ConfigError(f"--{name} with --prompts", f"{name}s in the prompts", "drop one of the two")
        if prompts.is_dir():
            if not self.question:
                raise ConfigError(f"the images in {prompts} without a question", "what to ask", "add it, in quotes")
            if self.media is not None:
                raise ConfigError("--media for a folder of images", "--media with a file of prompts", "drop --media")
        elif self.question:
            raise ConfigError(
                f"the question {self.question!r:.60} beside the file {prompts}",
                "either a folder of images with a question, or a file that holds what is asked",
                "drop one of the two",
            )


def run(arguments: list[str]) -> int:
    from mllm_jax.cli import draw

    if draw.draws(arguments):
        draw.refuse_options(
            arguments, draw.Draw, Generate, "a model that draws", "`mllm generate MODEL --help` lists them"
        )
        return draw.run(arguments)
    draw.refuse_options(
        arguments, Generate, draw.Draw, "a model that writes text", "an option of `mllm generate --help`"
    )
    options = tyro.cli(Generate, args=one_medium_each(arguments), prog="mllm generate")
    keep_compiled_programs()
    return _ask_one(options) if options.prompts is None else _ask_all(options, options.prompts, options.out)


def one_medium_each(arguments: Sequence[str]) -> list[str]:
    """Puts the option, --image, --video or --audio, before each medium.

    Without a question before these, the last word after them is it.
    """
    if "--" in arguments:
        return list(arguments)
    words: list[str] = []  # model and question
    others: list[str] = []
    media: list[tuple[str, list[str]]] = []
    into, wanted = words, 0
    for word in arguments:
        if wanted:
            others.append(word)
            wanted = 0
        elif (option := word.partition("=")[0]) in MEDIA:
            into = [word.partition("=")[2]] if "=" in word else []
            media.append((option, into))
        elif word.startswith("-") and word != "-":
            others.append(word)
            wanted, into = word.startswith("--") and "=" not in word and word not in (*FLAGS, "--help"), words
        else:
            into.append(word)
    missing = max(2 - len(words), 0)
    for _, group in reversed(media):
        if missing and len(group) > missing:
            words += group[-missing:]
            del group[-missing:]
            break
    named = [part for option, group in media for file in group or [""] for part in (option, file)]
    return [*words, *others, *(part for part in named if part)]


def _ask_one(options: Generate) -> int:
    # Checks the media before loading the weights.
    media: list[Part] = [Image(read_image(path)) for path in options.image]
    for path in options.video:
        video_header(path)
        media.append(Video(path, num_frames=options.frames, use_audio_in_video=options.use_audio_in_video))
    for path in options.audio:
        audio_length(path)
        media.append(Audio(path))
    timing = Timing() if options.stats else None
    check = partial(options.making.check, out=options.out)
    assistant = assistant_of(options.run, by_layer=False, check=check)
    if timing is not None:
        timing.loaded()
    asked = (*media, Text(options.question)) if media else options.question
    prompt = assistant.prompt((Message("user", asked),))
    how = Options(max_new_tokens=options.max_new_tokens)
    producing = options.making.producing() if assistant.produces else None
    answer = assistant.complete([prompt], how, options.sampling, producing)[0]
    out = options.out or Path(".")
    paths = [(medium.kind, saved(medium, out, options.question)) for medium in answer.media]
    print(with_paths(answer.text, paths), flush=True)
    if answer.reason == "length":
        count = len(answer.tokens)
        todo = "--max-new-tokens allows more" if count == options.max_new_tokens else "the model takes no longer text"
        print(f"(cut off after {count} tokens; {todo})", file=sys.stderr)
    if timing is not None:
        print(timing.summary(len(answer.tokens)), file=sys.stderr)
    return 0


def _ask_all(options: Generate, source: Path, out: Path) -> int:
    from mllm_jax.generation.answers_file import AnswersFile
    from mllm_jax.generation.prompts import PromptFile, PromptFolder

    # Checks the prompts and the earlier answers before loading the weights.
    prompts: Prompts = PromptFolder(source, options.question) if source.is_dir() else PromptFile(source, options.media)
    with AnswersFile(out, _dependencies(options, source, prompts), len(prompts)) as answers:
        if before := len(answers.done):
            print(f"{out}: {before} of {len(prompts)} are answered already", file=sys.stderr)
        if before == len(prompts):
            return 0
        try:
            failed = _answer_all(options, prompts, answers)
        except KeyboardInterrupt:
            done = f"{len(answers.done)} of {len(prompts)} are answered in {out}"
            print(f"interrupted: {done}; the same command continues from there", file=sys.stderr)
            return 130
    print(f"{out}: {len(answers.done)} answers" + (f", {failed} prompts without one" if failed else ""))
    return 1 if failed else 0


def _answer_all(options: Generate, prompts: Prompts, answers: AnswersFile) -> int:
    """Answers the prompts without an answer; returns the number of those that cannot be answered."""
    from mllm_jax.generation.bulk import outcomes

    timing = Timing() if options.stats else None
    assistant = assistant_of(options.run)
    if timing is not None:
        timing.loaded()
    how = Options(max_new_tokens=options.max_new_tokens)
    before, asked, failed, cut, tokens = answers.done, {}, 0, 0, 0

    def unanswered() -> Iterator[tuple[int, Any]]:
        for prompt in prompts:
            if prompt.index not in before:
                asked[prompt.index] = prompt
                yield prompt.index, prompt.messages

    with Count("answers", len(prompts), len(before)) as progress:
        found = outcomes(assistant, unanswered(), how, options.sampling, batch_size=options.batch_size)
        for done, (index, outcome) in enumerate(found, start=len(before) + 1):
            prompt = asked.pop(index)
            if isinstance(outcome, MllmError):
                failed += 1
                reason = outcome.given.removeprefix(f"{prompt.place}: ")
                progress.message(f"{prompt.place}: {reason}; expected: {outcome.expected}; to do: {outcome.todo}")
            else:
                answers.append(_line(prompt, outcome))
                cut, tokens = cut + (outcome.reason == "length"), tokens + len(outcome.tokens)
            progress.update(done)
        if cut:
            most = f"{options.max_new_tokens} tokens or the model's own bound"
            progress.message(f'({cut} cut off at {most}, "reason": "length"; --max-new-tokens allows more)')
        if timing is not None:
            progress.message(timing.summary(tokens))
    return failed


def _line(prompt: Prompt, answer: Answer) -> dict[str, Any]:
    name = prompt.index if prompt.id is None else prompt.id
    line = dict(id=name, index=prompt.index, text=answer.text, reason=answer.reason, tokens=len(answer.tokens))
    return line if prompt.image is None else line | dict(image=prompt.image)


def _dependencies(options: Generate, source: Path, prompts: Prompts) -> dict[str, Any]:
    """Lists everything that answers depend on, which excludes the number that are answered together."""
    media = source.parent if options.media is None else options.media
    return dict(
        model=str(options.run.resolve()),
        weights=_weights(options.run),
        prompts=str(source.resolve()),
        prompts_content=prompts.digest,
        media=str((source if source.is_dir() else media).resolve()),
        question=options.question,
        max_new_tokens=options.max_new_tokens,
        **asdict(options.sampling),
    )


def _weights(folder: Path) -> str:
    """Makes a checksum that changes with a model's files, and when a run was trained further."""
    if is_run(folder):
        files = [*folder.glob("stages/*"), *folder.glob("checkpoints/*/*")]
    else:
        files = [file for file in folder.glob("*") if file.suffix in (".json", ".safetensors")]
        files = [file for file in files if not file.name.endswith(".asked.json")]
    facts = [(str(file.relative_to(folder)), file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(files)]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
