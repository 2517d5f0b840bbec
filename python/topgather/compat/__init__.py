"""Drop-ins for people who come from the published MoBA packages."""

from .moba import flash_moba_attn_varlen_func, flash_moba_varlen_func, moba_attn_varlen, parallel_moba

__all__ = ["flash_moba_attn_varlen_func", "flash_moba_varlen_func", "moba_attn_varlen", "parallel_moba"]
