"""Points of a training that it can return to: all latents, and what the optimizer knows of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lrconvert.core.dtypes import Array
from lrconvert.refine.attached_student import AttachedStudent

_MOMENTS = {"mean": "exp_avg", "square": "exp_avg_sq"}  # names in files, and in Adam


@dataclass(frozen=True, eq=False)
class Point:
    """The `latents` of a student by their names, the `moments` of its parameters by kind and number, and after how many
    of Adam's steps these are (0: there are none)."""

    latents: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    adam_steps: int

    @classmethod
    def of(cls, student: AttachedStudent, optimizer: torch.optim.Optimizer, adam_steps: int) -> Point:
        """Return the point at which a student is."""
        moments: dict[str, Tensor] = {}
        for n, parameter in enumerate(student.parameters()):
            known = optimizer.state.get(parameter, {})
            moments |= {f"{kind}.{n}": known[key].clone() for kind, key in _MOMENTS.items() if key in known}
        return cls({name: value.detach().clone() for name, value in student.state().items()}, moments, adam_steps)

    def restore(self, student: AttachedStudent, optimizer: torch.optim.Optimizer) -> None:
        """Bring a student here, with an optimizer that is new."""
        student.load(dict(self.latents))
        for n, parameter in enumerate(student.parameters()):
            if self.adam_steps:
                known = {
                    key: self.moments[f"{kind}.{n}"].to(parameter.device).reshape(parameter.shape).clone()
                    for kind, key in _MOMENTS.items()
                }
                optimizer.state[parameter] = {"step": torch.tensor(float(self.adam_steps)), **known}

    def arrays(self, prefix: str = "") -> dict[str, Array]:
        """Return all of it but `adam_steps`, under names that begin with `prefix`."""
        named = {f"now.{name}": value for name, value in self.latents.items()} | dict(self.moments)
        return {f"{prefix}{name}": value.cpu().numpy() for name, value in named.items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array], adam_steps: int, prefix: str = "") -> Point:
        """Return the point that `arrays` was made of."""
        own = {n.removeprefix(prefix): torch.from_numpy(a.copy()) for n, a in arrays.items() if n.startswith(prefix)}
        latents = {n.removeprefix("now."): value for n, value in own.items() if n.startswith("now.")}
        moments = {n: value for n, value in own.items() if n.partition(".")[0] in _MOMENTS}
        return cls(latents, moments, adam_steps)
