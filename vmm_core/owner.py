"""For whom a snapshot is forked and a VM runs. What was made for one owner is never given to another.

An owner is an account of a forge, compared without regard to case; forges allow ASCII only in their names, and
nothing else is allowed here, because other letters can have a case that makes two names one.
"""

import re

from vmm_core.errors import BadRequest, WrongOwner

_OWNER = re.compile(r"[\x21-\x7e]{1,200}")


def common_owner(bound: str | None, asked: str | None, what: str) -> str | None:
    """The owner of ``what``, which is made for ``asked`` out of something that belongs to ``bound``; None: anybody.

    Raises WrongOwner when they are not the same (what belongs to somebody is not for nobody in particular),
    BadRequest for what is no owner.
    """
    if asked is not None and not _OWNER.fullmatch(asked):
        raise BadRequest(f"{asked[:200]!r} is no owner: 1 to 200 visible ASCII characters are possible")
    if bound is None:
        return asked
    if asked is None or asked.lower() != bound.lower():
        raise WrongOwner(
            f"{what} was asked for "
            + ("without an owner" if asked is None else f"for the owner {asked}")
            + ", but it was made for another: ask for it in that owner's name, or use one made for everybody"
        )
    return bound
