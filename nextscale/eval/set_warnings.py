"""What a reader of figures about a set of pictures should know of the set."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nextscale.eval.features import Features, Network
from nextscale.eval.images import FileImages, Images

LOSSY = ("JPEG", "MPO", "WEBP", "GIF", "AVIF", "JPEG2000")  # Pillow's names of formats
PLAIN = ("RGB", "L", "P", "1")  # modes that 8-bit RGB holds without loss


def warnings_of(
    images: Images, fake: Features, moments: Sequence[str], network: Network
) -> list[str]:
    """What a reader of figures about this set should know."""
    found = []
    if isinstance(images, FileImages) and images.sheets:
        found.append(f"grids and filmstrips of nextscale generate left out: {images.sheets}")
    if isinstance(images, FileImages) and images.reader.not_images:
        files = images.reader.not_images
        found.append(f"{len(files)} files are no pictures ({files[0]}) and were left out")
    count = fake.count
    if count < 10_000 and {"pool", "spatial"} & set(moments):
        found.append(f"{count} pictures: figures of the FID family are published for 50,000")
    for tap in moments:
        if count < network.taps[tap] + 1:
            found.append(
                f"{count} pictures are fewer than the {network.taps[tap]} {tap} features: the "
                "Fréchet distance is far above its value for many pictures"
            )

    def name(rows: Sequence[int]) -> str:
        return images.name(rows[0])

    sizes = fake.sizes
    if len(sizes) > 1:
        told = ", ".join(f"{w}x{h} ({n})" for (h, w), n in sizes.most_common(4))
        usual = sizes.most_common(1)[0][0]
        other = [i for i, shape in enumerate(fake.shapes) if shape != usual]
        found.append(f"the pictures have {len(sizes)} sizes: {told}, first {name(other)}")
    odd = [i for i, (height, width) in enumerate(fake.shapes) if height != width]
    if odd:
        squeezed = f"{len(odd)} pictures are not square ({name(odd)})"
        found.append(f"{squeezed}: the protocol squeezes them")
    first: dict[bytes, int] = {}
    twins = [i for i, digest in enumerate(fake.digests) if first.setdefault(digest, i) != i]
    if twins:
        twin = images.name(first[fake.digests[twins[0]]])
        found.append(
            f"{len(twins)} pictures repeat another one, pixel for pixel ({name(twins)} is {twin})"
        )
    lossy = [i for i, kind in enumerate(fake.kinds) if kind.split()[0] in LOSSY]
    if lossy:
        found.append(f"{len(lossy)} files are lossy ({name(lossy)}): save samples as PNG")
    other = [i for i, kind in enumerate(fake.kinds) if kind.split()[1] not in PLAIN]
    if other:
        modes = ", ".join(sorted({fake.kinds[i].split()[1] for i in other}))
        found.append(
            f"{len(other)} files are not 8-bit RGB ({modes}; {name(other)}): transparency is laid "
            "over white, 16 bits become 8"
        )
    if images.labels is not None:
        counts = np.bincount(images.labels)
        if counts.max() > counts.min():
            least, most = int(counts.argmin()), int(counts.argmax())
            found.append(
                f"the classes are unbalanced: {counts[least]} pictures of class {least}, "
                f"{counts[most]} of class {most}"
            )
    return found
