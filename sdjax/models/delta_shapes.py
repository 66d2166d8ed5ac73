"""The shape of a gated delta net, from and to config.json."""

from __future__ import annotations

import dataclasses

from sdjax.models.fields import Fields


@dataclasses.dataclass(frozen=True)
class DeltaShape:
    """Key heads, value heads to each of them, their widths, and how many tokens the convolution reads."""

    heads: int
    per_key: int
    key: int
    value: int
    kernel: int

    @property
    def values(self) -> int:
        """The widths of a key head's value heads together."""
        return self.per_key * self.value

    @classmethod
    def read(cls, fields: Fields) -> DeltaShape:
        """From a config.json of Qwen3.5.  Raises ModelError."""
        number = lambda name, default: fields.integer(f"linear_{name}", default)
        keys, values = number("num_key_heads", 16), number("num_value_heads", 32)
        if values % keys:
            fields.refuse(f"{values} value heads of the delta net cannot share {keys} key heads evenly")
        widths = number("key_head_dim", 128), number("value_head_dim", 128), number("conv_kernel_dim", 4)
        return cls(keys, values // keys, *widths)

    def written(self) -> dict[str, int]:
        """The fields that `read` reads."""
        numbers = {"num_key_heads": self.heads, "num_value_heads": self.heads * self.per_key}
        numbers |= {"key_head_dim": self.key, "value_head_dim": self.value, "conv_kernel_dim": self.kernel}
        return {f"linear_{name}": number for name, number in numbers.items()}
