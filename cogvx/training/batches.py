"""Which clips and random numbers a micro-step uses."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from cogvx.config import Config
from cogvx.data.encode import EncodedClip
from cogvx.options.train import TimestepSampling
from cogvx.training.order import SampleOrder, order_of
from cogvx.training.prepare import Prepared
from cogvx.training.ranks import Ranks
from cogvx.training.step import CAPTION_CHOICE, CUT, IMAGE_NOISE, Batch, Draw


@dataclass(frozen=True)
class Batches:
    """A micro-step's batch is a function of its number, so a resumed run sees the same ones."""

    config: Config
    data: Prepared
    ranks: Ranks

    def load(self, micro_step: int) -> tuple[Batch, Draw]:
        """This process's part.

        All processes together take consecutive places of the sample order. So the clips of an
        optimizer step depend on the total batch size, and not on how many processes share it.
        """
        draw = self.draw(micro_step)
        clips = [self.data.train[sample.index] for sample in draw.samples]
        cuts = draw.choose(CUT, [clip.cuts for clip in clips])
        return self.data.load_batch(cuts, self.prompts(clips, draw), self.images(draw)), draw

    def prompts(self, clips: list[EncodedClip], draw: Draw) -> list[str]:
        """For each clip one of its captions, with or without data.id_token, or none."""
        pairs = draw.choose(CAPTION_CHOICE, [clip.example.pairs for clip in clips])
        plain = draw.leaves_out_id_token([clip.example.plain_share for clip in clips])
        return [
            "" if drop else pair[without]
            for pair, without, drop in zip(pairs, plain, draw.drops_caption(), strict=True)
        ]

    def draw(self, micro_step: int) -> Draw:
        train, seed = self.config.train, self.config.seed
        size = train.train_batch_size
        start = (micro_step * self.ranks.count + self.ranks.index) * size
        return Draw(
            seed,
            self.order.samples(start, size),
            self.ranks.accelerator.device,
            timestep_sampling=TimestepSampling(
                train.timestep_sampling, train.logit_mean, train.logit_std
            ),
            caption_dropout=train.caption_dropout,
            image_dropout=train.image_dropout,
        )

    @functools.cached_property
    def order(self) -> SampleOrder:
        return order_of(self.config, self.data.train, self.ranks.count)

    def images(self, draw: Draw) -> list[int]:
        """Which encoding of its image each clip starts from. Encoding 0 is without noise."""
        noisy = self.config.data.image_noise_variants
        if not noisy:
            return [0] * len(draw.samples)
        numbers = range(1, 1 + noisy)
        return draw.choose(IMAGE_NOISE, [numbers] * len(draw.samples))

    def names(self, draw: Draw) -> list[str]:
        """Where each clip is listed, and its file."""
        examples = [self.data.train[sample.index].example for sample in draw.samples]
        return [f"{example.origin} {example.video.name}" for example in examples]
