"""Owners: what was made for one is never given to another, nor to nobody in particular."""

import pytest

from vmm_core.errors import BadRequest, VmmError, WrongOwner
from vmm_core.owner import common_owner


@pytest.mark.parametrize(
    ("bound", "asked", "owner"),
    [(None, None, None), (None, "octo", "octo"), ("octo", "octo", "octo"), ("Octo", "oCTO", "Octo")],
)
def test_what_fits_belongs_to_its_owner(bound: str | None, asked: str | None, owner: str | None) -> None:
    assert common_owner(bound, asked, "a fork") == owner


@pytest.mark.parametrize("asked", [None, "other", "octo-org", "oct"])
def test_another_owner_is_refused_by_name_and_not_told_whose_it_is(asked: str | None) -> None:
    with pytest.raises(WrongOwner, match="a fork of hello") as caught:
        common_owner("octo", asked, "a fork of hello")
    assert isinstance(caught.value, BadRequest | VmmError)
    assert caught.value.code == "wrong_owner"
    assert "octo," not in str(caught.value)


@pytest.mark.parametrize(
    "asked", ["", " ", "a b", "octo\n", "\N{KELVIN SIGN}", "stra\N{LATIN SMALL LETTER SHARP S}e", "x" * 201]
)
def test_what_is_no_owner_is_refused(asked: str) -> None:
    for bound in (None, "octo", "k", "strasse"):
        with pytest.raises(BadRequest, match="no owner"):
            common_owner(bound, asked, "a fork")
