"""Encoder-decoders of `transformers`: of text as they are (T5, BART, Marian), of speech (Whisper) from the waveform."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from stillhouse.errors import MissingExtraError, RoleError, require
from stillhouse.hub.architectures import configuration, generation, library_class, with_generation
from stillhouse.hub.refusals import read_json

SETTINGS = ("feature_size", "sampling_rate", "n_fft", "hop_length", "chunk_length")
"""Those of a WhisperFeatureExtractor that say how sound becomes a spectrogram."""


class SpeechToText(nn.Module):
    """A WhisperForConditionalGeneration that reads sound, float32 [batch, samples] at `sampling_rate`, by keyword.

    `settings` are those of its feature extractor: mel bins, samples a second, window and hop in samples, and the
    seconds that it reads. Shorter sound is padded with silence. Log-mel features are computed in torch, on the device
    of the sound and with gradients. Raises RoleError where settings and model do not fit.
    """

    mel: Tensor
    window: Tensor

    def __init__(self, model: Any, settings: Mapping[str, Any]):
        super().__init__()
        self.model, self.settings = model, {name: int(settings[name]) for name in SETTINGS}
        bins, rate, window, hop, seconds = self.settings.values()
        config = model.config
        frames = seconds * rate // hop
        require(bins == config.num_mel_bins, f"the feature extractor makes {bins} mel bins, the model reads "
                f"{config.num_mel_bins}; they are not of the same Whisper", RoleError)
        require(frames == 2 * config.max_source_positions, f"the feature extractor makes {frames} frames of {seconds} "
                f"seconds, the model reads {2 * config.max_source_positions}; they are not of the same Whisper",
                RoleError)
        self.register_buffer("mel", _mel_filters(bins, rate, window), persistent=False)
        self.register_buffer("window", torch.hann_window(window), persistent=False)

    def spec(self) -> dict[str, Any]:
        """All but the weights, for JSON."""
        return {"class": type(self.model).__name__, "config": configuration(self.model),
                "generation": generation(self.model), "settings": self.settings}

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> SpeechToText:
        """A model as `spec` describes it, with fresh weights."""
        kind = library_class("transformers", spec["class"], "PreTrainedModel")
        model = kind(kind.config_class.from_dict(spec["config"]))
        return cls(with_generation(model, spec.get("generation")), spec["settings"])

    @property
    def config(self) -> Any:
        """That of the model inside."""
        return self.model.config

    def features(self, audio: Float[Tensor, "batch samples"]) -> Float[Tensor, "batch bins frames"]:
        """The log-mel spectrogram: log10 of the mel energies, at most 8 below the sound's loudest, then (. + 4) / 4."""
        _, rate, window, hop, seconds = self.settings.values()
        require(audio.dim() == 2, f"sound is [batch, samples], got {tuple(audio.shape)}", RoleError)
        require(audio.shape[1] <= seconds * rate, f"sound of {audio.shape[1]} samples was given to a model that reads "
                f"{seconds * rate} ({seconds} seconds at {rate} samples a second); cut it", RoleError)
        audio = F.pad(audio.to(self.mel.dtype), (0, seconds * rate - audio.shape[1]))
        spectrum = torch.stft(audio, window, hop, window=self.window, return_complex=True)[..., :-1]
        energy = spectrum.real.square() + spectrum.imag.square()
        log = (self.mel.T @ energy).clamp(min=1e-10).log10()
        return (torch.maximum(log, log.amax((1, 2), keepdim=True) - 8) + 4) / 4

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                labels: Tensor | None = None, audio: Tensor | None = None, **more: Any) -> Any:
        """`.logits` [batch, length, vocabulary] for `labels`, or for `decoder_input_ids` among `more`."""
        require(audio is not None and input_ids is None, f"{type(self.model).__name__} reads sound: give audio=, not "
                "input_ids", RoleError)
        return self.model(input_features=self._features(audio), labels=labels, **more)

    def generate(self, input_ids: Tensor | None = None, audio: Tensor | None = None, **options: Any) -> Tensor:
        """The token ids that it writes for `audio`; `options` are those of `generate` of transformers."""
        require(audio is not None and input_ids is None, f"{type(self.model).__name__} reads sound: give audio=, not "
                "input_ids", RoleError)
        options.pop("attention_mask", None)
        return self.model.generate(input_features=self._features(audio), **options)

    def _features(self, audio: Any) -> Tensor:
        with torch.autocast(audio.device.type, enabled=False):
            return self.features(audio).to(next(self.model.parameters()).dtype)


def feature_settings(folder: Path, name: str) -> dict[str, Any]:
    """The settings of the feature extractor in a Whisper's folder. Raises RoleError where there are none."""
    for file, key in (("preprocessor_config.json", None), ("processor_config.json", "feature_extractor")):
        if not (folder / file).is_file():
            continue
        found: Any = read_json(folder / file)
        found = found if key is None else found.get(key) or {}
        if all(setting in found for setting in SETTINGS):
            return {setting: found[setting] for setting in SETTINGS}
    raise RoleError(f"'{name}' comes without the settings of its feature extractor (preprocessor_config.json with "
                    f"{', '.join(SETTINGS)}), so that it is not known how sound becomes its input. Save it beside the "
                    "model: WhisperFeatureExtractor.from_pretrained(…).save_pretrained(folder)")


def _mel_filters(bins: int, rate: int, window: int) -> Tensor:
    """Mel filters [frequencies, bins] as Whisper's: Slaney's scale and norm, from 0 to 8000 Hz."""
    try:
        from transformers.audio_utils import mel_filter_bank
    except ImportError as error:
        raise MissingExtraError("Whisper needs transformers; install it with: pip install 'stillhouse[hf]'") from error
    filters = mel_filter_bank(1 + window // 2, bins, 0.0, 8000.0, rate, norm="slaney", mel_scale="slaney")
    return torch.from_numpy(filters).float()
