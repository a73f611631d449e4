"""Common parts of regularizers on named tensors: stored copies, names, and squared differences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from rotoopt._torch.modules import unwrapped
from rotoopt._torch.private import without_compiled_prefixes


class NamedTensors(nn.Module):
    """Copies of tensors as buffers, which are moved, cast, copied and saved with the parent module.

    Args:
        tensors: The tensors by name. Dots, which buffer names must not contain, become slashes in the state dict.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.names = tuple(tensors)
        for name, tensor in tensors.items():
            self.register_buffer(name.replace(".", "/"), tensor.detach().clone())

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the original names and the tensors."""
        for name in self.names:
            yield name, self.get_buffer(name.replace(".", "/"))


def named_parameters(model: nn.Module, *, remove_duplicate: bool = True) -> dict[str, nn.Parameter]:
    """Return the parameters by name, without the prefixes of torch.compile."""
    named = unwrapped(model).named_parameters(remove_duplicate=remove_duplicate)
    return {without_compiled_prefixes(name): param for name, param in named}


def squares(tensor: Tensor) -> Tensor:
    """Return |x|^2 of every entry.

    Not the square of a norm, as in tllib: its second derivative at zero, the start of fine-tuning, is NaN.
    """
    return (tensor * tensor.conj()).real
