"""Pictures and texts to unit vectors in a file, for use in search."""

from __future__ import annotations

import copy
import os
import stat
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mllm_jax.data.chat import ChatTokenizer
from mllm_jax.data.image_processors import ImageProcessor, read_image_processor
from mllm_jax.data.images import as_picture, read_image, resize
from mllm_jax.data.tokenizer import Tokenizer
from mllm_jax.encoders.text import TextModel, TextTowerConfig
from mllm_jax.encoders.vit import ViT, ViTConfig
from mllm_jax.errors import ConfigError, DataError
from mllm_jax.files import write_atomic
from mllm_jax.layers.pixels import normalise_pixels
from mllm_jax.models.clip import DualEncoder, DualEncoderConfig
from mllm_jax.models.registry import from_pretrained, pretrained_config
from mllm_jax.sharding.hosts import fetch

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")


@dataclass(frozen=True)
class Embedder:
    """A model's two ways into its space of unit vectors, in batches of one shape.

    Attributes:
        processor: uint8[H, W, 3] -> float32[H', W', 3], normalised; None where only texts are embedded.
        tokenizer: None where only pictures are.
        truncate: shorten texts that are too long instead of refusing them.
    """

    module: nn.Module
    params: Any
    processor: ImageProcessor | Callable[[np.ndarray], np.ndarray] | None = None
    tokenizer: ChatTokenizer | _Captions | None = None
    batch_size: int = 32
    truncate: bool = False

    def __post_init__(self):
        if self.batch_size < 1:
            raise ConfigError(f"batch size {self.batch_size}", "at least 1", "change the batch size")

    @classmethod
    def load(cls, folder: Path, *, images: bool | None = True, texts: bool | None = True, **options: Any) -> Embedder:
        """The model in a folder, with what it needs for images or texts or both.

        Args:
            images, texts: whether they will be asked for; None: what the model has a tower for.
            options: batch_size, truncate, and dtype and mesh, see `from_pretrained`.

        Raises:
            ConfigError: a model without a tower for what is wanted, or no image processor's settings.
            DataError: no tokenizer.
        """
        # The small files first: who lacks one should not have to wait for the weights.
        if images is None or texts is None:
            config = pretrained_config(folder)
            images, texts = (
                _has_images(config) if images is None else images,
                _has_texts(config) if texts is None else texts,
            )
            if not (images or texts):
                raise no_vectors(config, "vectors")
        processor = read_image_processor(folder) if images else None
        tokenizer = ChatTokenizer.load(folder) if texts else None
        module, params = from_pretrained(folder, dtype=options.pop("dtype", None), mesh=options.pop("mesh", None))
        embedder = cls(module, params, processor, tokenizer, **options)
        for wanted, name in ((images, "_image_function"), (texts, "_text_function")):
            if wanted:
                getattr(embedder, name)  # refuses a model that cannot do it
        return embedder

    @classmethod
    def trained(cls, module: nn.Module, params: Any, tokenizer: Tokenizer, **options) -> Embedder:
        """A dual encoder as a run leaves it; pictures are resized and texts laid out as they were in training.

        Args:
            options: batch_size and truncate.

        Raises:
            ConfigError: a model of another kind.
        """
        if not isinstance(module, DualEncoder):
            raise ConfigError(
                f"a run of a {type(module).__name__}", "a run that trained a dual encoder", "name another run"
            )
        vision = module.config.vision

        def prepare(image: np.ndarray) -> np.ndarray:
            return np.asarray(normalise_pixels(resize(image, vision.image_size), vision))

        return cls(module, params, prepare, _Captions(tokenizer), **options)

    def with_params(self, params: Any) -> Embedder:
        """Gives the same with other parameters; what is compiled for a dual encoder serves both."""
        if isinstance(self.module, DualEncoder):
            _ = self._image_function, self._text_function  # made here, they are in the copy too
        other = copy.copy(self)
        object.__setattr__(other, "params", params)
        return other

    def pictures(self, pictures: Sequence[Any]) -> np.ndarray:
        """Images, see `as_picture`, to float32[N, P]. Raises DataError: no image, or one that cannot be read."""

        def stacked(piece: Sequence[Any]) -> np.ndarray:
            return _stacked([self.processor(as_picture(p)) for p in piece])

        return self._all("image", self._image_function, pictures, stacked)

    def images(self, paths: Sequence[Path], bad: Callable[[DataError], None] | None = None) -> tuple[list, np.ndarray]:
        """Picture files to vectors.

        Args:
            bad: is called with what is wrong with an unreadable picture, which is then left out; None: that is raised.

        Returns:
            (the paths that were read, float32[N, P]).

        Raises:
            DataError: a picture that cannot be read, or none that can.
            ConfigError: pictures that come out of the processor in several sizes.
        """
        compute, size = self._image_function, self._size(len(paths))

        def read(path: Path) -> np.ndarray | DataError:
            try:
                picture = read_image(path)
                try:
                    return self.processor(picture)
                except DataError as error:
                    raise DataError(f"{path}: {error.given}", error.expected, error.todo) from error
            except DataError as error:
                if bad is None:
                    raise
                return error

        kept, out = [], []
        with ThreadPoolExecutor(4) as pool:
            for some, pictures in _ahead(pool, read, paths, size):
                for problem in (p for p in pictures if isinstance(p, DataError)):
                    bad(problem)
                good = [(path, p) for path, p in zip(some, pictures, strict=True) if not isinstance(p, DataError)]
                if good:
                    kept += [path for path, _ in good]
                    out.append(self._run(compute, _stacked([p for _, p in good]), size))
        if not kept:
            raise DataError(f"{len(paths)} pictures, none of which can be read", "pictures", "check the files")
        return kept, np.concatenate(out)

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Texts to float32[N, P].

        Raises:
            DataError: no text, an empty one, or one that is longer than the tower's positions.
        """
        return self._all("text", self._text_function, [self._row(text) for text in texts], np.stack)

    def _all(
        self, what: str, compute: Callable, items: Sequence, stack: Callable[[Sequence], np.ndarray]
    ) -> np.ndarray:
        if not len(items):
            raise DataError(f"no {what}", "at least one", "give some")
        size = self._size(len(items))
        pieces = (items[start : start + size] for start in range(0, len(items), size))
        return np.concatenate([self._run(compute, stack(piece), size) for piece in pieces])

    def _row(self, text: str) -> np.ndarray:
        """int[2, L]: the ids of a text, of the tower's full length, and 1 where they are its own."""
        tower = self._text_config()
        ids = self.tokenizer.encode(text) if text.strip() else []
        if not ids or len(ids) > tower.max_length and not self.truncate:
            raise DataError(
                f"a text of {len(ids)} tokens: {text[:60]!r}",
                f"1 to {tower.max_length} tokens",
                "shorten it, or say truncate",
            )
        if len(ids) > tower.max_length:
            ids = [*ids[: tower.max_length - 1], ids[-1]]  # the last ends the text, and may stand for it
        if tower.dialect.pooling == "last":
            pad = next((i for i in (self.tokenizer.pad_token_id, tower.pad_token_id) if i is not None), None)
            if pad is None:
                raise ConfigError("a tokenizer without padding", "what the texts are padded with", "set pad_token_id")
        else:
            pad = ids[-1]  # no token before it sees what follows, and the first end of text counts
        free = tower.max_length - len(ids)
        return np.array([[*ids, *[pad] * free], [1] * len(ids) + [0] * free], np.int32)

    def _text_config(self) -> TextTowerConfig:
        return self.module.config.text if isinstance(self.module, DualEncoder) else self.module.config

    def _size(self, count: int) -> int:
        """The rows of each batch of `count` images or texts: one shape, which a few do not fill up to batch_size."""
        return min(self.batch_size, 1 << (count - 1).bit_length())

    def _run(self, compute, batch: np.ndarray, size: int) -> np.ndarray:
        """One batch, filled up to the size that is compiled."""
        filled = np.concatenate([batch, np.repeat(batch[:1], size - len(batch), axis=0)])
        vectors = fetch(compute(self.params, filled))[: len(batch)]
        if not np.isfinite(vectors).all():
            raise DataError("vectors that are not finite", "numbers", "try --dtype float32, or check the checkpoint")
        return vectors

    @cached_property  # compiled once, however often it is asked for
    def _image_function(self):
        module = self.module
        if isinstance(module, DualEncoder):
            return jax.jit(lambda p, x: module.apply({"params": p}, x, method="encode_image"))
        if isinstance(module, ViT) and module.config.dialect.pooler != "none":
            return jax.jit(lambda p, x: _unit(module.apply({"params": p}, x).pooler_output))
        raise no_vectors(module.config, "pooled picture vectors")

    @cached_property
    def _text_function(self):
        module = self.module
        if not isinstance(module, (DualEncoder, TextModel)):
            raise no_vectors(module.config, "text vectors")
        dialect = self._text_config().dialect
        # What is read at the last place has padding as part of the text (SigLIP); a causal tower sees nothing behind
        # the place that it reads.
        masked = dialect.pooling == "mean" or (dialect.mask == "full" and dialect.pooling != "last")

        def compute(params, rows):
            texts = rows[:, 0], rows[:, 1] if masked else None
            if isinstance(module, DualEncoder):
                return module.apply({"params": params}, *texts, method="encode_text")
            return _unit(_text_vector(module.apply({"params": params}, *texts)))

        return jax.jit(compute)


@dataclass(frozen=True)
class _Captions:
    """A run's tokenizer, with texts laid out as captions."""

    tokenizer: Tokenizer

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.caption_ids(text)

    @property
    def pad_token_id(self) -> int:
        return self.tokenizer.pad_token_id


def find_pictures(places: Sequence[Path]) -> list[Path]:
    """Files as they are named, folders as the images in them at any depth, by name.

    In a folder, links to files are followed, also out of it; links to folders are not, as they may form a ring. A
    warning names what looks like an image and is left out: links that lead nowhere, pipes, devices; and linked folders.

    Raises:
        DataError: a place that does not exist or is no regular file, a folder without images, or one file twice.
    """
    found: list[Path] = []
    for place in places:
        if _kind(place) == "folder":
            inside, left_out = _inside(place)
            if left_out:
                named = "".join(f"\n  {path} ({what})" for path, what in left_out[:_NAMED])
                more = f"\n  and {len(left_out) - _NAMED:,} more" if len(left_out) > _NAMED else ""
                warnings.warn(f"left out of {place}: {len(left_out):,}{named}{more}", stacklevel=2)
            if not inside:
                raise DataError(f"{place} without pictures", f"files ending in {', '.join(SUFFIXES)}", "check the path")
            found += inside
        elif _kind(place) == "file":
            found.append(place)
        else:
            raise DataError(
                f"no file or folder {place} ({_kind(place)})", "pictures, or folders of pictures", "check the path"
            )
    twice = sorted({str(path) for path in found if found.count(path) > 1}) if len(set(found)) < len(found) else []
    if twice:
        raise DataError(f"{twice[0]} and {len(twice) - 1} more, named twice", "each picture once", "name it once")
    return found


_NAMED = 10  # of what is left out, so many are named


def _inside(folder: Path) -> tuple[list[Path], list[tuple[Path, str]]]:
    """The images in a folder, by name; and what is left out of it, with what it is."""
    images: list[Path] = []
    left_out: list[tuple[Path, str]] = []

    def unreadable(error: OSError) -> None:
        left_out.append((Path(error.filename), f"a folder that cannot be read: {error.strerror}"))

    for root, folders, files in os.walk(folder, onerror=unreadable):
        for name in folders:
            if (path := Path(root, name)).is_symlink():
                left_out.append((path, "a link to a folder"))
        for path in (Path(root, name) for name in files):
            if path.suffix.lower() in SUFFIXES:
                kind = _kind(path)
                images.append(path) if kind == "file" else left_out.append((path, kind))
    return sorted(images), sorted(left_out)


def _kind(path: Path) -> str:
    """What a path leads to, in a word or two."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL byte, or half a character
        return "a link that leads nowhere" if isinstance(error, OSError) and path.is_symlink() else "nothing there"
    kinds = {stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def embed_to_file(
    model: Path | Callable[..., Embedder],
    out: Path,
    *,
    images: Sequence[Path] = (),
    texts: Sequence[str] = (),
    overwrite: bool = False,
    bad: Callable[[DataError], None] | None = None,
    **options,
) -> dict[str, tuple[int, ...]]:
    """Writes `image_names` and `image_embeds`, `texts` and `text_embeds` as an .npz, whole or not at all.

    Args:
        model: a folder for `Embedder.load`, or another function of `images`, `texts` (is there any?) and the options
            that makes an embedder; it is called when all else is seen to be right.
        images: picture files and folders of pictures.
        overwrite: replace a file that is there.
        bad: see `Embedder.images`.
        options: see `Embedder.load`.

    Returns:
        The shape of each array in the file.

    Raises:
        ConfigError: nothing to embed, a name that is taken or no .npz; or what `Embedder` refuses.
        DataError: what `find_pictures` and `Embedder` refuse.
    """
    if not images and not texts:
        raise ConfigError("neither pictures nor texts", "at least one of them", "give --images or --text")
    if out.suffix != ".npz" or not out.parent.is_dir() or out.is_dir():
        raise ConfigError(f"{out} to write to", "a name ending in .npz in a folder that exists", "change --out")
    if out.exists() and not overwrite:
        raise ConfigError(f"{out}, which exists", "a new file", "choose another name, or say --overwrite")
    paths = find_pictures(images)
    load = partial(Embedder.load, model) if isinstance(model, Path) else model
    embedder = load(images=bool(paths), texts=bool(texts), **options)
    arrays: dict[str, np.ndarray] = {}
    if texts:
        arrays |= dict(texts=np.array(texts), text_embeds=embedder.texts(texts))
    if paths:
        kept, vectors = embedder.images(paths, bad)
        arrays |= dict(image_names=np.array([str(path) for path in kept]), image_embeds=vectors)
    write_atomic(out, lambda file: np.savez(file, **arrays))
    return {name: array.shape for name, array in arrays.items()}


def _ahead(pool: ThreadPoolExecutor, work, items: Sequence, size: int) -> Iterator[tuple[Sequence, list]]:
    """(items, results) of each batch; the next is being worked on meanwhile, and no more than it is held."""
    batches = [items[start : start + size] for start in range(0, len(items), size)]
    futures = [pool.submit(work, item) for item in batches[0]] if batches else []
    for number, batch in enumerate(batches):
        following = batches[number + 1] if number + 1 < len(batches) else []
        now, futures = futures, [pool.submit(work, item) for item in following]
        try:
            yield batch, [future.result() for future in now]
        except BaseException:
            for future in futures:
                future.cancel()
            raise


def _stacked(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Processed images as one array. Raises ConfigError: they are of several sizes."""
    sizes = sorted({p.shape[:2] for p in pictures})
    if len(sizes) > 1:
        raise ConfigError(
            f"pictures of {sizes[0]} and {sizes[1]} pixels after processing",
            "a processor with one size, or a crop",
            "set size or crop_size in preprocessor_config.json, or use --batch-size 1",
        )
    return np.stack(pictures)


def _has_images(config: Any) -> bool:
    return isinstance(config, DualEncoderConfig) or (isinstance(config, ViTConfig) and config.dialect.pooler != "none")


def _has_texts(config: Any) -> bool:
    return isinstance(config, (DualEncoderConfig, TextTowerConfig))


def no_vectors(config: Any, what: str) -> ConfigError:
    """The refusal of a model that was asked for vectors that it does not make."""
    name = config.family or type(config).__name__.removesuffix("Config")
    return ConfigError(f"a {name}, asked for {what}", "a model that makes them, such as CLIP", "name another folder")


def _text_vector(out):
    return out.pooler_output if out.text_embeds is None else out.text_embeds


def _unit(x):
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
