"""How members that run produce text together: one file per way of decoding, all of them in DECODINGS."""

from packllm.decode.decodings import DECODINGS, Decoding

__all__ = ["DECODINGS", "Decoding"]
