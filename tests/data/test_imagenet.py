"""ImageNet class names."""

from __future__ import annotations

import pytest

from nextscale.data.imagenet import imagenet_class, imagenet_names
from nextscale.errors import UserError


def test_names_and_ids():
    assert len(imagenet_names()) == 1000
    assert imagenet_class("golden retriever") == imagenet_class(" Golden_Retriever ") == 207
    assert imagenet_class(88) == imagenet_class("88") == 88
    assert imagenet_class("crane bird") == 134


def test_every_unambiguous_name_leads_to_its_id():
    for i, name in enumerate(imagenet_names()):
        if name.lower() not in ("crane", "cardigan", "maillot"):
            assert imagenet_class(name) == i


@pytest.mark.parametrize(
    ("name", "ids"),
    [("crane", ("134", "517")), ("cardigan", ("264", "474")), ("Maillot", ("638", "639"))],
)
def test_names_of_two_classes_list_both_ids(name, ids):
    with pytest.raises(UserError, match=rf"{ids[0]} .*{ids[1]} "):
        imagenet_class(name)


@pytest.mark.parametrize("bad", [1000, -1, "1000"])
def test_ids_out_of_range(bad):
    with pytest.raises(UserError, match=r"0\.\.999"):
        imagenet_class(bad)


def test_misspelt_names_get_suggestions():
    with pytest.raises(UserError, match="golden retriever"):
        imagenet_class("goldn retriver")
    with pytest.raises(UserError, match="retriever"):
        imagenet_class("retriever")
    with pytest.raises(UserError, match="no ImageNet class"):
        imagenet_class("")
