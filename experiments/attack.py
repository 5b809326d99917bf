"""Reconstructs a device's images from what it sends, to show what a cut and its noise hide.

  pipar attack --config=digits --config.pipeline.cut=1 --output=cut1.png

The attacker knows the network's weights, the test set and the data of all other devices. It trains
a decoder on these and reconstructs samples of the device from one release of their activations at
its first cut, with the configured codec and privacy.*. Weights are those of the seed, or of
--config.model.weights. What this attack does not find another one may.
"""

import dataclasses
import io
import pathlib

import numpy as np
from PIL import Image

import configs
from comms.arrays import Array
from pipar_jax import data
from pipar_jax.config import Config
from pipar_jax.config.schema import option
from pipar_jax.data.partition import spread
from pipar_jax.data.types import computed
from pipar_jax.disk import files
from pipar_jax.errors import ConfigError
from pipar_jax.launch import flags
from pipar_jax.methods.registry import plan_for
from pipar_jax.privacy.leakage import (
    FEWEST_SAMPLES,
    distance_correlation,
    squared_error,
    structural_similarity,
)

#: Images in a row of the picture, and the least side of one of them in pixels.
SHOWN, LEAST_SIDE = 12, 48


@dataclasses.dataclass
class AttackFlags:
    """Flags of this binary."""

    device: int = option(0, "the device whose samples are reconstructed", at_least=0)
    samples: int = option(
        256, "samples that are reconstructed, spread over its data", at_least=FEWEST_SAMPLES
    )
    known: int = option(4096, "images of others that the attacker knows, at most", at_least=1)
    steps: int = option(500, "steps of the decoder's training", at_least=1)
    output: str = option(
        "",
        "picture of originals above their reconstructions; empty: attack.png here, numbered if it "
        "is taken",
        path="",
    )


def images_of(config: Config, own: AttackFlags) -> tuple[data.Dataset, Array, Array]:
    """Returns the device's data set, its samples, and those that the attacker knows, as stored.

    Raises:
      ConfigError: There is no such device, or samples are not images.
      DataError: The data cannot be read.
    """
    if own.device >= config.devices.count:
        raise ConfigError(
            f"--device={own.device}, but there are {config.devices.count} devices, from 0: choose "
            "one of them, or set --config.devices.count"
        )
    mine = data.load_device(config, own.device)
    shape = mine.input_shape
    if len(shape) != 3 or shape[-1] not in (1, 3) or mine.mean is None:
        raise ConfigError(
            f"samples of {config.data.source} are {list(shape)} {mine.train.x.dtype}, and the "
            "attack reconstructs normalised images [height, width, 1 or 3]"
        )
    others = [data.load_server(config).test.x]
    for index in range(config.devices.count):
        if index != own.device:
            others.append(data.load_device(config, index).train.x)
    known = np.concatenate([np.asarray(one) for one in others])
    victims = np.asarray(mine.train.x)
    if len(victims) < FEWEST_SAMPLES or not len(known):
        raise ConfigError(
            f"device {own.device} has {len(victims)} samples and others {len(known)}: the attack "
            f"needs {FEWEST_SAMPLES} and 1"
        )
    return mine, victims[spread(len(victims), own.samples)], known[spread(len(known), own.known)]


def draw_picture(rows: list[Array]) -> bytes:
    """Returns rows of images as a PNG.

    Args:
      rows: [images, height, width, 1 or 3] each, from 0 to 1.
    """
    _, height, width, channels = rows[0].shape
    gap = max(1, height // 8)
    framed = [np.pad(row, ((0, 0), (gap, 0), (gap, 0), (0, 0)), constant_values=1) for row in rows]
    lines = [np.concatenate(list(row), axis=1) for row in framed]
    whole = np.pad(np.concatenate(lines), ((0, gap), (0, gap), (0, 0)), constant_values=1)
    pixels = np.rint(255 * whole).astype(np.uint8)
    image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    times = -(-LEAST_SIDE // min(height, width))
    scaled = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    scaled.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def main(config: Config, own: AttackFlags) -> None:
    """Attacks the configured run.

    Raises:
      PiparError: The configuration cannot be attacked, or a file cannot be read or written.
    """
    output = own.output or files.unused(".", "attack", ".png")
    files.check_target(output, f"--output={output}")
    # Here, so that --help and wrong flags do not load jax.
    from pipar_jax.roles.start_weights import first_variables
    from pipar_jax.runtime.interception import Interceptor
    from pipar_jax.runtime.setup import fit, set_up_jax
    from pipar_jax.training.inversion import train_decoder

    set_up_jax(config.model)
    mine, victims, known = images_of(config, own)
    model = fit(config, None, mine, f"d{own.device}")
    plan = plan_for(config, model.unit_names).devices[own.device]
    interceptor = Interceptor(config, model, plan, *first_variables(model, config))

    def observe(images: Array) -> Array:
        return interceptor.receive(computed(mine.normalise(images), config.model.weight_dtype))

    low, high = float(known.min()), float(known.max())
    originals, public = (
        np.clip((one.astype(np.float32) - low) / ((high - low) or 1), 0, 1)
        for one in (victims, known)
    )
    decoder = train_decoder(
        lambda chosen: observe(known[chosen]), public, steps=own.steps, seed=config.seed
    )
    sent = observe(victims)
    made = decoder.reconstruct(sent)
    blind = np.broadcast_to(np.clip(decoder.mean, 0, 1), originals.shape)
    noise = f"noise multiplier {interceptor.noise:.3g} at clip {config.privacy.activation_clip:g}"
    print(
        f"{model.name} cut behind {interceptor.unit}: {'x'.join(map(str, sent.shape[1:]))} numbers "
        f"a sample, codec {interceptor.codec}, {noise if interceptor.noise else 'no noise'}"
    )
    print(f"{len(known):,} known images, {own.steps:,} steps, {len(victims)} reconstructed")
    for name, images in (("reconstructions", made), ("the known images' mean", blind)):
        error = float(squared_error(originals, images).mean())
        similarity = float(structural_similarity(originals, images).mean())
        print(f"{name}: mean squared error {error:.4f}, structural similarity {similarity:.3f}")
    print(
        f"distance correlation of images and what is sent {distance_correlation(victims, sent):.3f}"
        " (squared, bias-corrected; 0: independent)"
    )
    shown = spread(len(victims), SHOWN)
    picture = draw_picture([originals[shown], made[shown]])
    files.write_bytes(output, picture, "choose another file with --output")
    print(f"wrote {output}")


if __name__ == "__main__":
    flags.run(
        main,
        AttackFlags,
        doc=__doc__,
        name="attack",
        presets=pathlib.Path(configs.__file__).parent,
    )
