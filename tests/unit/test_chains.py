"""Certificates from files: what is wrong with each is said in one clear error, which names chain or key."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID

from atoll.model.certificates import check_host, covers
from atoll.model.chains import check_chain, describe
from atoll.model.errors import Invalid
from made_certificates import DAY_S, Maker, new_key, pem

NOW = 1_800_000_000.0
ROOT = Maker("root", now=NOW)
MIDDLE = Maker("middle", ROOT, now=NOW)


def test_a_good_chain_is_taken_and_described() -> None:
    chain, key = MIDDLE.sign("www.test", "*.test")
    checked = check_chain("www.test", chain, key, NOW)
    assert checked.described.names == ("www.test", "*.test")
    assert checked.described.issuer == "CN=middle"
    assert checked.chain.count("BEGIN CERTIFICATE") == 2
    assert describe(checked.chain) == checked.described
    assert "PRIVATE" not in repr(checked)


@pytest.mark.parametrize("host", ["a.test", "*.test"])
def test_a_wildcard_is_for_itself_and_for_every_name_with_one_more_label(host: str) -> None:
    chain, key = ROOT.sign("*.test")
    assert check_chain(host, chain, key, NOW)
    for other in ("test", "a.b.test", "*.a.test"):
        with pytest.raises(Invalid, match="not for"):
            check_chain(other, chain, key, NOW)


@pytest.mark.parametrize("kind", ["rsa2048", "rsa3072"])
def test_rsa_keys_are_taken(kind: str) -> None:
    chain, key = ROOT.sign("a.test", key=new_key(kind))
    assert check_chain("a.test", chain, key, NOW)


def test_what_stands_around_certificates_and_keys_is_left_out() -> None:
    chain, key = MIDDLE.sign("a.test")
    checked = check_chain("a.test", f"subject=CN=leaf\n{chain}\n\n# end", f"bag attributes\n{key}", NOW)
    assert "subject" not in checked.chain
    assert "bag" not in checked.key


def _leaf(**options: object) -> tuple[str, str]:
    return ROOT.sign("a.test", **options)  # type: ignore[arg-type]


def _parts(chain: str) -> list[str]:
    return [f"{part}-----END CERTIFICATE-----\n" for part in chain.split("-----END CERTIFICATE-----\n") if part]


def _wrong_order() -> tuple[str, str]:
    chain, key = MIDDLE.sign("a.test")
    return "".join(reversed(_parts(chain))), key


def _middle_order() -> tuple[str, str]:
    chain, key = Maker("low", MIDDLE, now=NOW).sign("a.test")
    leaf, low = _parts(chain)
    return leaf + MIDDLE.pem + low, key


def _stranger_behind() -> tuple[str, str]:
    chain, key = _leaf()
    return chain + MIDDLE.pem, key


def _encrypted() -> tuple[str, str]:
    key = new_key()
    return _leaf(key=key)[0], pem(key, "secret")


def _old_middle() -> tuple[str, str]:
    old = Maker("old", ROOT, now=NOW - 3651 * DAY_S)
    chain, key = old.sign("a.test", begins_s=3650 * DAY_S, ends_s=3700 * DAY_S)
    return chain, key


BAD: dict[str, tuple[Callable[[], tuple[str, str]], str, str]] = {
    "key of another": (lambda: (_leaf()[0], pem(new_key())), "key", "does not belong"),
    "expired": (lambda: _leaf(ends_s=-1.0), "chain", "expired on"),
    "too early": (lambda: _leaf(begins_s=DAY_S), "chain", "not valid before"),
    "another name": (lambda: ROOT.sign("b.test"), "chain", "is for b.test, not for a.test"),
    "no name": (lambda: ROOT.sign(), "chain", "names no host"),
    "wrong order": (_wrong_order, "chain", "wrong order"),
    "middle in the wrong place": (_middle_order, "chain", "wrong order"),
    "a stranger in the chain": (_stranger_behind, "chain", "has not signed"),
    "an expired one in the chain": (_old_middle, "chain", "CN=old has expired"),
    "encrypted key": (_encrypted, "key", "encrypted"),
    "weak key": (lambda: _leaf(key=new_key("rsa1024")), "key", "1024 bits is too weak"),
    "a curve of no browser": (lambda: _leaf(key=ec.generate_private_key(ec.SECP256K1())), "key", "no use for"),
    "a kind of no browser": (lambda: (_leaf()[0], pem(ed25519.Ed25519PrivateKey.generate())), "key", "no use for"),
    "for clients": (lambda: _leaf(uses=(ExtendedKeyUsageOID.CLIENT_AUTH,)), "chain", "not for servers"),
    "no certificate": (lambda: ("nothing", _leaf()[1]), "chain", "no certificate in it"),
    "no key": (lambda: (_leaf()[0], "nothing"), "key", "no private key in it"),
    "a damaged certificate": (lambda: (_leaf()[0].replace("MII", "AAA", 1), _leaf()[1]), "chain", "damaged"),
    "a damaged key": (lambda: (_leaf()[0], _leaf()[1].replace("MIG", "AAA", 1)), "key", "damaged"),
    "the key in place of the chain": (lambda: (_leaf()[1], _leaf()[1]), "chain", "no certificate in it"),
    "far too long": (lambda: (_leaf()[0] * 200, _leaf()[1]), "chain", "over 65536"),
    "far too many": (lambda: (_leaf()[0] * 11, _leaf()[1]), "chain", "over 10 certificates"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_bad_is_refused_with_one_error_that_names_it(what: str) -> None:
    make, field, words = BAD[what]
    chain, key = make()
    with pytest.raises(Invalid, match=words) as caught:
        check_chain("a.test", chain, key, NOW)
    assert caught.value.field == field
    assert caught.value.mend
    assert "PRIVATE KEY" not in caught.value.message + str(caught.value.mend).replace("BEGIN PRIVATE KEY", "")


@pytest.mark.parametrize("host", ["A.test", "a_b.test", "", "*", "*.*.test", "a.*.test", "10.0.0.1", "a..b", "a.test/", "x" * 64])
def test_what_is_no_hostname_is_refused(host: str) -> None:
    with pytest.raises(Invalid, match="is not a hostname"):
        check_host(host)


def test_a_wildcard_covers_no_wildcard_but_itself() -> None:
    assert covers("*.test", "*.test")
    assert not covers("*.a.test", "*.test")
    assert not covers("*.test", "*.a.test")
