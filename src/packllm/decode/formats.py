"""Regular expressions of string formats. Every usual parser accepts the strings that match, and dates are real dates.

The formats are those of JSON schema (2020-12, 7.3) and of pydantic's types. Any other format is only an annotation.
"""

from __future__ import annotations

_YEAR = r"(?:[0-9]{3}[1-9]|[0-9]{2}[1-9][0-9]|[0-9][1-9][0-9]{2}|[1-9][0-9]{3})"  # 0000 is no year in Python
_LEAP = (
    r"(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|"
    r"(?:0[48]|[2468][048]|[13579][26])00)"
)
_DATE = (
    rf"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|"
    rf"(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP}-02-29)"
)
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"

_NUMBER = r"[0-9]{1,6}"  # few enough digits for a timedelta, be it years or seconds
_CLOCK = rf"T(?:{_NUMBER}H(?:{_NUMBER}M(?:{_NUMBER}S)?)?|{_NUMBER}M(?:{_NUMBER}S)?|{_NUMBER}S)"
_DAYS = rf"(?:{_NUMBER}Y(?:{_NUMBER}M(?:{_NUMBER}D)?)?|{_NUMBER}M(?:{_NUMBER}D)?|{_NUMBER}D)"
_DURATION = rf"P(?:{_DAYS}(?:{_CLOCK})?|{_CLOCK}|{_NUMBER}W)"

_BYTE = r"(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_IPV4 = rf"(?:{_BYTE}\.){{3}}{_BYTE}"
_H16 = r"[0-9a-fA-F]{1,4}"
_IPV6 = "(?:" + "|".join(
    [
        rf"(?:{_H16}:){{7}}{_H16}",
        *(rf"(?:{_H16}:){{1,{n}}}(?::{_H16}){{1,{7 - n}}}" for n in range(1, 7)),
        rf"(?:{_H16}:){{1,7}}:",
        rf":(?::{_H16}){{1,7}}",
        "::",
    ]
) + ")"  # fmt: skip


def _ipv4_network() -> str:
    """An address, or an address and a prefix length after which all bits are 0."""
    kinds = []
    for prefix in range(33):
        full_bytes, bits = divmod(prefix, 8)
        step = "|".join(str(byte) for byte in range(0, 256, 2 ** (8 - bits)))
        octets = [_BYTE] * full_bytes + [f"(?:{step})"] * (bits > 0)
        kinds.append(r"\.".join([*octets, *["0"] * (4 - len(octets))]) + f"/{prefix}")
    return f"(?:{_IPV4}|{'|'.join(kinds)})"


def _ipv6_network() -> str:
    """As above; the prefix covers at least the groups that are written."""
    kinds = [rf"(?:{_H16}:){{{n}}}:/(?:{'|'.join(map(str, range(16 * n, 129)))})" for n in range(1, 8)]
    return f"(?:{_IPV6}(?:/128)?|::/(?:{'|'.join(map(str, range(129)))})|{'|'.join(kinds)})"


_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
_WORD = r"[a-zA-Z0-9]+(?:-[a-zA-Z0-9]+)*"
_ATOM = r"[a-zA-Z0-9!#$%&'*+/=?^_`{|}~-]+"
_EMAIL = rf"{_ATOM}(?:\.{_ATOM})*@(?:{_WORD}\.)+[a-zA-Z]{{2,}}"

_SAFE = r"(?:[a-zA-Z0-9._~!$&'()*+,;=:@/-]|%[0-9a-fA-F]{2})"
_USER = r"(?:(?:[a-zA-Z0-9._~!$&'()*+,;=:-]|%[0-9a-fA-F]{2})+@)?"
_PORT = r"(?::(?:[0-9]{1,4}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]))?"
# If a last label began with a digit, parsers would take the whole host for an IPv4 address.
_HOST = rf"(?:(?:[a-zA-Z0-9_-]+\.)*[a-zA-Z][a-zA-Z0-9_-]*|{_IPV4}|\[{_IPV6}\])"
_REST = rf"(?:\?(?:{_SAFE}|\?)*)?(?:#(?:{_SAFE}|\?)*)?"
_URI = (
    rf"(?:[a-zA-Z][a-zA-Z0-9+.-]*://{_USER}{_HOST}{_PORT}(?:/{_SAFE}*)?|file:///{_SAFE}*|"
    rf"(?:urn|mailto|tel|data|doi|news|sip|geo):{_SAFE}+){_REST}"
)
_HOSTS = rf"{_USER}{_HOST}{_PORT}(?:,{_USER}{_HOST}{_PORT})*"


def _uuid(version: str) -> str:
    return rf"[0-9a-fA-F]{{8}}-[0-9a-fA-F]{{4}}-{version}[0-9a-fA-F]{{3}}-[89abAB][0-9a-fA-F]{{3}}-[0-9a-fA-F]{{12}}"


FORMATS = {
    "date": _DATE,
    "date-time": f"{_DATE}T{_TIME}",
    "time": _TIME,
    "duration": _DURATION,
    "email": _EMAIL,
    "idn-email": _EMAIL,
    "name-email": _EMAIL,
    "hostname": rf"{_LABEL}(?:\.{_LABEL})*",
    "ipv4": _IPV4,
    "ipv6": _IPV6,
    "ipvanyaddress": f"(?:{_IPV4}|{_IPV6})",
    "ipv4network": _ipv4_network(),
    "ipv6network": _ipv6_network(),
    "ipvanynetwork": f"(?:{_ipv4_network()}|{_ipv6_network()})",
    "ipv4interface": rf"{_IPV4}(?:/(?:3[0-2]|[12]?[0-9]))?",
    "ipv6interface": rf"{_IPV6}(?:/(?:12[0-8]|1[01][0-9]|[1-9]?[0-9]))?",
    "ipvanyinterface": rf"(?:{_IPV4}|{_IPV6})(?:/(?:3[0-2]|[12]?[0-9]))?",
    "uri": _URI,
    "multi-host-uri": rf"[a-zA-Z][a-zA-Z0-9+.-]*://{_HOSTS}(?:/{_SAFE}*)?{_REST}",
    "uuid": r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}",
    **{f"uuid{version}": _uuid(str(version)) for version in (1, 3, 4, 5, 6, 7, 8)},
    "base64": r"(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?",
    "base64url": r"(?:[A-Za-z0-9_-]{4})*(?:[A-Za-z0-9_-]{2}==|[A-Za-z0-9_-]{3}=)?",
}
"""Regular expression of the whole string, by name of the format."""
