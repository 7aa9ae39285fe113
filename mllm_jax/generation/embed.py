"""Unit vectors of images and texts, in a file for search."""

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

from mllm_jax.data.chat_tokenizer import ChatTokenizer
from mllm_jax.data.image_processors import ImageProcessor, read_image_processor
from mllm_jax.data.images import as_image, read_image, resize
from mllm_jax.data.tokenizer import Tokenizer
from mllm_jax.encoders.text_encoder import TextModel, TextTowerConfig
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
    """The encoders of a model that make unit vectors of images and texts, in batches of one shape.

    Attributes:
        processor: uint8[H, W, 3] -> float32[H', W', 3], normalised; None if only texts are embedded.
        tokenizer: None if only images are embedded.
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
        """Loads the model of a folder for images, texts or both.

        Args:
            images, texts: load that encoder; None: the encoders that the model has.
            options: batch_size, truncate, and dtype and mesh, see `from_pretrained`.

        Raises:
            ConfigError: the model lacks an encoder that is wanted, or the folder has no image processor's settings.
            DataError: the folder has no tokenizer.
        """
        # Check the small files before loading weights.
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
                getattr(embedder, name)  # refuses a model without this encoder
        return embedder

    @classmethod
    def trained(cls, module: nn.Module, params: Any, tokenizer: Tokenizer, **options) -> Embedder:
        """Returns the embedder of a run's dual encoder; it resizes images and lays out texts as training does.

        Args:
            options: batch_size and truncate.

        Raises:
            ConfigError: the model is no dual encoder.
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
        """Returns the same with other parameters; with a dual encoder both share the compiled functions."""
        if isinstance(self.module, DualEncoder):
            _ = self._image_function, self._text_function  # made before the copy, which shares them
        other = copy.copy(self)
        object.__setattr__(other, "params", params)
        return other

    def image_vectors(self, images: Sequence[Any]) -> np.ndarray:
        """Embeds images (see `as_image`) as float32[N, P]. Raises DataError: there are none, or one cannot be read."""

        def stacked(piece: Sequence[Any]) -> np.ndarray:
            return _stacked([self.processor(as_image(image)) for image in piece])

        return self._all("image", self._image_function, images, stacked)

    def images(self, paths: Sequence[Path], bad: Callable[[DataError], None] | None = None) -> tuple[list, np.ndarray]:
        """Embeds image files.

        Args:
            bad: called with the error of an unreadable image, which is then left out. None: the error is raised.

        Returns:
            (the paths that were read, float32[N, P]).

        Raises:
            DataError: an image cannot be read, or none can.
            ConfigError: the processor makes images of several sizes.
        """
        compute, size = self._image_function, self._size(len(paths))

        def read(path: Path) -> np.ndarray | DataError:
            try:
                image = read_image(path)
                try:
                    return self.processor(image)
                except DataError as error:
                    raise DataError(f"{path}: {error.given}", error.expected, error.todo) from error
            except DataError as error:
                if bad is None:
                    raise
                return error

        kept, out = [], []
        with ThreadPoolExecutor(4) as pool:
            for some, images in _ahead(pool, read, paths, size):
                for problem in (i for i in images if isinstance(i, DataError)):
                    bad(problem)
                good = [(path, p) for path, p in zip(some, images, strict=True) if not isinstance(p, DataError)]
                if good:
                    kept += [path for path, _ in good]
                    out.append(self._run(compute, _stacked([p for _, p in good]), size))
        if not kept:
            raise DataError(f"{len(paths)} images, none of which can be read", "images", "check the files")
        return kept, np.concatenate(out)

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Embeds texts as float32[N, P].

        Raises:
            DataError: there is no text, one is empty, or one is longer than the encoder's positions.
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
        """Returns int[2, L], padded to the encoder's length: the ids of a text, and 1 where they are not padding."""
        tower = self._text_config()
        ids = self.tokenizer.encode(text) if text.strip() else []
        if not ids or len(ids) > tower.max_length and not self.truncate:
            raise DataError(
                f"a text of {len(ids)} tokens: {text[:60]!r}",
                f"1 to {tower.max_length} tokens",
                "shorten it, or set truncate",
            )
        if len(ids) > tower.max_length:
            ids = [*ids[: tower.max_length - 1], ids[-1]]  # the last ends the text, and the encoder may read its vector
        if tower.dialect.pooling == "last":
            pad = next((i for i in (self.tokenizer.pad_token_id, tower.pad_token_id) if i is not None), None)
            if pad is None:
                raise ConfigError("a tokenizer without a padding token", "one with it", "set pad_token_id")
        else:
            pad = ids[-1]  # no token before it sees what follows, and the first end of text counts
        free = tower.max_length - len(ids)
        return np.array([[*ids, *[pad] * free], [1] * len(ids) + [0] * free], np.int32)

    def _text_config(self) -> TextTowerConfig:
        return self.module.config.text if isinstance(self.module, DualEncoder) else self.module.config

    def _size(self, count: int) -> int:
        """Returns the rows of each batch of `count` images or texts: batch_size, or fewer if count is small."""
        return min(self.batch_size, 1 << (count - 1).bit_length())

    def _run(self, compute, batch: np.ndarray, size: int) -> np.ndarray:
        """Computes one batch, padded to the compiled size."""
        filled = np.concatenate([batch, np.repeat(batch[:1], size - len(batch), axis=0)])
        vectors = fetch(compute(self.params, filled))[: len(batch)]
        if not np.isfinite(vectors).all():
            raise DataError("vectors that are not finite", "numbers", "try --dtype float32, or check the checkpoint")
        return vectors

    @cached_property  # compiled once
    def _image_function(self):
        module = self.module
        if isinstance(module, DualEncoder):
            return jax.jit(lambda p, x: module.apply({"params": p}, x, method="encode_image"))
        if isinstance(module, ViT) and module.config.dialect.pooler != "none":
            return jax.jit(lambda p, x: _unit(module.apply({"params": p}, x).pooler_output))
        raise no_vectors(module.config, "pooled image vectors")

    @cached_property
    def _text_function(self):
        module = self.module
        if not isinstance(module, (DualEncoder, TextModel)):
            raise no_vectors(module.config, "text vectors")
        dialect = self._text_config().dialect
        # An encoder that reads the last position treats padding as text (SigLIP); a causal encoder sees nothing after
        # the position that it reads.
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


def find_images(places: Sequence[Path]) -> list[Path]:
    """Returns the named files, and the images in folders at any depth, sorted by name.

    In a folder, links to files are followed, also out of it; links to folders are not, as they may form a cycle. A
    warning names files with an image's suffix that are left out: broken links, pipes, devices; and linked folders.

    Raises:
        DataError: a path does not exist or is no regular file, a folder has no images, or a file is named twice.
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
                raise DataError(f"{place} without images", f"files ending in {', '.join(SUFFIXES)}", "check the path")
            found += inside
        elif _kind(place) == "file":
            found.append(place)
        else:
            raise DataError(
                f"no file or folder {place} ({_kind(place)})", "images, or folders of images", "check the path"
            )
    twice = sorted({str(path) for path in found if found.count(path) > 1}) if len(set(found)) < len(found) else []
    if twice:
        raise DataError(f"{twice[0]} and {len(twice) - 1} more, named twice", "each image once", "name it once")
    return found


_NAMED = 10  # the most paths that a warning names


def _inside(folder: Path) -> tuple[list[Path], list[tuple[Path, str]]]:
    """Returns the images in a folder by name, and the paths that are left out with their kinds."""
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
    """Names the kind of file that a path leads to."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL byte, or half a character
        return "a broken link" if isinstance(error, OSError) and path.is_symlink() else "nothing there"
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
        model: a folder for `Embedder.load`, or another function of `images` and `texts` (True if there are any) and
            the options that makes an embedder. It is called after all other checks.
        images: image files and folders of images.
        overwrite: replace an existing file.
        bad: see `Embedder.images`.
        options: see `Embedder.load`.

    Returns:
        The shape of each array in the file.

    Raises:
        ConfigError: there is nothing to embed, `out` exists or is no .npz, or `Embedder` refuses the model.
        DataError: `find_images` or `Embedder` refuses an image or a text.
    """
    if not images and not texts:
        raise ConfigError("neither images nor texts", "at least one of them", "give --images or --text")
    if out.suffix != ".npz" or not out.parent.is_dir() or out.is_dir():
        raise ConfigError(f"{out} to write to", "a name ending in .npz in a folder that exists", "change --out")
    if out.exists() and not overwrite:
        raise ConfigError(f"{out}, which exists", "a new file", "choose another name, or add --overwrite")
    paths = find_images(images)
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
    """Yields (items, results) of each batch, while the pool works on the next batch and no more."""
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


def _stacked(images: Sequence[np.ndarray]) -> np.ndarray:
    """Stacks processed images. Raises ConfigError: their sizes differ."""
    sizes = sorted({image.shape[:2] for image in images})
    if len(sizes) > 1:
        raise ConfigError(
            f"images of {sizes[0]} and {sizes[1]} pixels after processing",
            "a processor with one size, or a crop",
            "set size or crop_size in preprocessor_config.json, or use --batch-size 1",
        )
    return np.stack(images)


def _has_images(config: Any) -> bool:
    return isinstance(config, DualEncoderConfig) or (isinstance(config, ViTConfig) and config.dialect.pooler != "none")


def _has_texts(config: Any) -> bool:
    return isinstance(config, (DualEncoderConfig, TextTowerConfig))


def no_vectors(config: Any, what: str) -> ConfigError:
    """Returns the error for a model that does not make the vectors asked for."""
    name = config.family or type(config).__name__.removesuffix("Config")
    return ConfigError(f"a {name}, asked for {what}", "a model that makes them, such as CLIP", "name another folder")


def _text_vector(out):
    return out.pooler_output if out.text_embeds is None else out.text_embeds


def _unit(x):
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
