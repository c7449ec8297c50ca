"""`still export`: the result of a run for other libraries."""

from __future__ import annotations

from pathlib import Path

from tyro.conf import Positional


def export(run: Positional[Path], to: str, out: Path | None = None, arch: str | None = None, opset: int | None = None,
           steps: int | None = None, force: bool = False) -> None:
    """Write the result of a finished run in another format, checked by loading it back.

    Formats: safetensors, onnx, torch-export, hf (transformers; of data sets, datasets), diffusers, peft.

    Args:
        run: the folder of the run
        to: safetensors, onnx, torch-export, hf, diffusers or peft
        out: folder to write; default: export-FORMAT in the run's
        arch: module:callable that builds the network, where the run was given one
        opset: of ONNX, 18 to 23
        steps: of a result with several samplers, which one
        force: replace an earlier export
    """
    from stillhouse.deploy.export import export as write

    made = write(run, to, out, arch, opset, steps, force)
    worst = max(made.checks.values())
    print(f"exported to {made.folder} ({', '.join(sorted(p.name for p in made.folder.iterdir()))})\n"
          f"  loaded back and compared: largest difference {worst:.3g}, allowed {made.tolerance:g}")
    for note in made.notes:
        print(f"  {note}")
    print(f"  how to load it: {made.folder / 'README.md'}")
