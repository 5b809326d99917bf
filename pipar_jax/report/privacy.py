"""What private runs promised, and what of it they have used."""

from __future__ import annotations

import html
from collections.abc import Sequence

from pipar_jax.report.run import RecordedRun


def privacy_text(runs: Sequence[RecordedRun], names: Sequence[str]) -> str:
    """Returns paragraphs as HTML, for runs that were private; else an empty text."""
    paragraphs = []
    for run, name in zip(runs, names, strict=True):
        if not (promised := run.last("private")):
            continue
        words = "; ".join(map(str, promised["words"]))
        spent = [row for row in run.of("round_finished") if row.get("epsilon")]
        ending = ""
        if spent:
            epsilons = spent[-1]["epsilon"]
            device = max(epsilons, key=lambda key: epsilons[key])
            ending = (
                f" After round {spent[-1]['round'] + 1} epsilon is at most "
                f"{epsilons[device]:.4g} (device {device}) at delta {spent[-1]['delta']:g}."
            )
            if (clip := spent[-1].get("clip")) is not None:
                ending += (
                    f" The clip came to {clip:.4g}; {spent[-1]['within_clip'] or 0:.0%} of the "
                    "last updates were within the one before, as noise lets it be known."
                )
        paragraphs.append(f"<p>{html.escape(f'{name}: {words}.{ending}')}</p>")
    return "".join(paragraphs)
